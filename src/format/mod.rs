//! Files from strangers: safetensors and JSON, with every limit in [`limits`].

use crate::error::Result;
use crate::tensor::TensorInfo;

/// Named tensors that can be read piece by piece. Sizes and shapes were checked against the file
/// before one of these exists.
pub trait TensorSource: Send + Sync {
    /// Names, in file order.
    fn names(&self) -> &[String];

    /// Type and shape of a tensor; `None` when there is no such name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Reads `dst.len()` bytes of the tensor's data from byte `offset` on.
    fn read(&self, name: &str, offset: u64, dst: &mut [u8]) -> Result<()>;

    /// A metadata value of the file's `__metadata__`.
    fn metadata(&self, key: &str) -> Option<&str>;
}
