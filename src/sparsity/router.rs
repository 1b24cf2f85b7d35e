//! Router files: shapes, metadata and their match with a model.

use crate::format::TensorSource;

/// Rows of an attention router's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttnUnit {
    /// One per query head; a KV head's score is the maximum over its group.
    Head,
    /// One per KV head.
    KvHead,
}

/// Attention routers of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct AttnInfo {
    /// Per layer; `None` = no router, the layer is dense.
    pub layers: Vec<Option<AttnUnit>>,
    /// Default density per layer; layer 0 is 1.
    pub density: Vec<f32>,
}

/// MLP routers of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpInfo {
    /// Router rank per layer; `None` = no router, the layer is dense.
    pub ranks: Vec<Option<u32>>,
    /// Batch sizes of the table, ascending.
    pub batch_sizes: Vec<u32>,
    /// `[batch size][layer]`: neurons kept.
    pub table: Vec<Vec<u32>>,
}

impl MlpInfo {
    /// `K_l(B)` at the nearest tabled batch size that is at least `batch`; `None` above the table.
    pub fn k(&self, layer: usize, batch: u32) -> Option<u32> {
        let i = self.batch_sizes.partition_point(|&b| b < batch);
        self.table.get(i).map(|row| row[layer])
    }
}

/// What a router file says, as plain numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterInfo {
    /// Attention routers, if the file has any.
    pub attention: Option<AttnInfo>,
    /// MLP routers, if the file has any.
    pub mlp: Option<MlpInfo>,
}

/// A tensor of a router file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the file's own")]
pub enum RouterTensor {
    AttnWeight,
    AttnBias,
    MlpDown,
    MlpUp,
}

/// An open router file, checked against its model.
pub struct RouterFile {
    info: RouterInfo,
    source: Box<dyn TensorSource>,
}

impl RouterFile {
    /// The plain numbers.
    pub fn info(&self) -> &RouterInfo {
        &self.info
    }
}
