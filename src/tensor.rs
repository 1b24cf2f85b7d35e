//! Shapes with checked sizes.

use crate::dtype::DType;
use crate::error::{Error, Result};
use std::fmt;

/// Highest rank of any tensor we read.
pub const MAX_RANK: usize = 4;

/// A shape of rank at most [`MAX_RANK`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Shape {
    /// A shape; an error when the rank is above [`MAX_RANK`].
    pub fn new(dims: &[usize]) -> Result<Shape> {
        if dims.len() > MAX_RANK {
            return Err(Error::limit(format!("rank {} stored, at most {MAX_RANK} allowed", dims.len())));
        }
        let mut out = [0; MAX_RANK];
        out[..dims.len()].copy_from_slice(dims);
        Ok(Shape { dims: out, rank: dims.len() })
    }

    /// A vector's shape.
    pub fn d1(n: usize) -> Shape {
        Shape { dims: [n, 0, 0, 0], rank: 1 }
    }

    /// A matrix's shape, rows first.
    pub fn d2(rows: usize, columns: usize) -> Shape {
        Shape { dims: [rows, columns, 0, 0], rank: 2 }
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Elements, or `None` when the product overflows.
    pub fn checked_len(&self) -> Option<usize> {
        self.dims().iter().try_fold(1usize, |n, &d| n.checked_mul(d))
    }

    /// Bytes of this shape in `dtype`, or `None` when the product overflows.
    pub fn checked_bytes(&self, dtype: DType) -> Option<usize> {
        self.checked_len()?.checked_mul(dtype.size())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.dims(), f)
    }
}

/// A stored tensor's type and shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Shape, rows first.
    pub shape: Shape,
}
