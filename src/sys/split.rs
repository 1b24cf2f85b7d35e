//! Safe ways to hand each task of a job its own part of a mutable array.
//!
//! Invariant: the parts of two different tasks never overlap; a pool runs each task once.

use super::alloc::Pod;
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;

/// Something with one part per task.
///
/// # Safety
/// Parts of different tasks must be disjoint, for every task below [`Split::tasks`].
pub unsafe trait Split: Sync {
    /// What one task gets.
    type Part;
    /// How many tasks there are.
    fn tasks(&self) -> usize;
    /// The part of `task`.
    ///
    /// # Safety
    /// `task` is below [`Split::tasks`], and each task is asked for at most once per job.
    unsafe fn part(&self, task: usize) -> Self::Part;
}

struct Base<'a, T> {
    data: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: only disjoint parts of it are ever handed out.
unsafe impl<T: Send> Sync for Base<'_, T> {}
// SAFETY: it stands for a `&mut [T]`.
unsafe impl<T: Send> Send for Base<'_, T> {}

impl<'a, T> Base<'a, T> {
    fn new(data: &'a mut [T]) -> Base<'a, T> {
        Base { data: data.as_mut_ptr(), len: data.len(), life: PhantomData }
    }
}

/// No data: `.0` tasks.
pub struct Tasks(pub usize);

// SAFETY: the parts are empty.
unsafe impl Split for Tasks {
    type Part = ();
    fn tasks(&self) -> usize {
        self.0
    }
    unsafe fn part(&self, _: usize) {}
}

/// Consecutive pieces of an array; the last may be shorter.
pub struct Chunks<'a, T> {
    base: Base<'a, T>,
    size: usize,
}

impl<'a, T: Send> Chunks<'a, T> {
    /// Pieces of `size` elements.
    pub fn new(data: &'a mut [T], size: usize) -> Chunks<'a, T> {
        Chunks { base: Base::new(data), size: size.max(1) }
    }
}

// SAFETY: piece `i` is `[i * size, (i + 1) * size)` cut to the array.
unsafe impl<'a, T: Send> Split for Chunks<'a, T> {
    type Part = &'a mut [T];
    fn tasks(&self) -> usize {
        self.base.len.div_ceil(self.size)
    }
    unsafe fn part(&self, task: usize) -> &'a mut [T] {
        let first = task * self.size;
        let len = self.size.min(self.base.len - first);
        // SAFETY: inside the array; disjoint from other tasks' pieces; each asked for once.
        unsafe { std::slice::from_raw_parts_mut(self.base.data.add(first), len) }
    }
}

/// A run of rows of a [`Grid`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// First row.
    pub first: u32,
    /// How many.
    pub rows: u32,
}

/// A row-major matrix cut into blocks of columns, and optionally into bands of rows. Task
/// `b * column_blocks + c` gets column block `c` of band `b`.
pub struct Grid<'a, T> {
    base: Base<'a, T>,
    stride: usize,
    columns: usize,
    block: usize,
    bands: Bands<'a>,
}

enum Bands<'a> {
    Whole(usize),
    List(&'a [Band]),
}

impl<'a, T: Send> Grid<'a, T> {
    /// Column blocks of `block` of all rows of `data`, rows `stride` apart, `columns` used.
    pub fn columns(data: &'a mut [T], stride: usize, columns: usize, block: usize) -> Grid<'a, T> {
        assert!(columns <= stride && block > 0, "columns {columns} of stride {stride}, block {block}");
        let rows = data.len() / stride.max(1);
        Grid { base: Base::new(data), stride, columns, block, bands: Bands::Whole(rows) }
    }

    /// Column blocks of bands of rows. The bands must be ascending, disjoint and inside the matrix.
    pub fn bands(
        data: &'a mut [T],
        stride: usize,
        columns: usize,
        block: usize,
        bands: &'a [Band],
    ) -> Result<Grid<'a, T>> {
        let mut grid = Grid::columns(data, stride, columns, block);
        let rows = grid.base.len / stride.max(1);
        let mut end = 0;
        for b in bands {
            if (b.first as usize) < end || b.first as usize + b.rows as usize > rows {
                return Err(Error::invalid("rows of a step overlap or lie outside its limits"));
            }
            end = b.first as usize + b.rows as usize;
        }
        grid.bands = Bands::List(bands);
        Ok(grid)
    }

    fn blocks(&self) -> usize {
        self.columns.div_ceil(self.block)
    }
}

// SAFETY: blocks of columns are disjoint, and so are bands (checked in `bands`).
unsafe impl<'a, T: Send> Split for Grid<'a, T> {
    type Part = Block<'a, T>;
    fn tasks(&self) -> usize {
        let bands = match self.bands {
            Bands::Whole(rows) => usize::from(rows > 0),
            Bands::List(list) => list.len(),
        };
        bands * self.blocks()
    }
    unsafe fn part(&self, task: usize) -> Block<'a, T> {
        let first = task % self.blocks() * self.block;
        let (row, rows) = match self.bands {
            Bands::Whole(rows) => (0, rows),
            Bands::List(list) => {
                let b = list[task / self.blocks()];
                (b.first as usize, b.rows as usize)
            }
        };
        let columns = first..(first + self.block).min(self.columns);
        // SAFETY: the band lies inside the array.
        let data = unsafe { self.base.data.add(row * self.stride) };
        Block { data, stride: self.stride, first_row: row, rows, columns, life: PhantomData }
    }
}

/// A task's block of a [`Grid`].
pub struct Block<'a, T> {
    data: *mut T,
    stride: usize,
    first_row: usize,
    rows: usize,
    columns: Range<usize>,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a block is a unique borrow of its elements.
unsafe impl<T: Send> Send for Block<'_, T> {}

impl<T> Block<'_, T> {
    /// Its columns in the whole matrix.
    pub fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// Its first row in the whole matrix.
    pub fn first_row(&self) -> usize {
        self.first_row
    }

    /// Rows it has.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its part of row `row` (counted from its first row).
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of a block of {}", self.rows);
        // SAFETY: row and columns lie inside the matrix, no other block has them, and `self` is
        // borrowed mutably as long as the slice lives.
        unsafe {
            let start = self.data.add(row * self.stride + self.columns.start);
            std::slice::from_raw_parts_mut(start, self.columns.len())
        }
    }
}

impl<T: Pod> Block<'_, T> {
    /// Zeros everywhere.
    pub fn clear(&mut self) {
        for r in 0..self.rows {
            self.row(r).fill(T::default());
        }
    }
}

macro_rules! tuple { ($($name:ident $index:tt),*) => {
    // SAFETY: each member's parts are disjoint.
    unsafe impl<$($name: Split),*> Split for ($($name,)*) {
        type Part = ($($name::Part,)*);
        fn tasks(&self) -> usize {
            let counts = [$(self.$index.tasks()),*];
            assert!(counts.iter().all(|&n| n == counts[0]), "arrays of one job differ: {counts:?}");
            counts[0]
        }
        unsafe fn part(&self, task: usize) -> Self::Part {
            // SAFETY: passed on.
            unsafe { ($(self.$index.part(task),)*) }
        }
    }
} }
tuple!(A 0, B 1);
tuple!(A 0, B 1, C 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_matrix_once() {
        let mut m = vec![0u32; 3 * 10];
        let bands = [Band { first: 0, rows: 1 }, Band { first: 1, rows: 2 }];
        let grid = Grid::bands(&mut m, 10, 9, 4, &bands).unwrap();
        for task in 0..grid.tasks() {
            // SAFETY: each task once.
            let mut b = unsafe { grid.part(task) };
            for r in 0..b.rows() {
                b.row(r).iter_mut().for_each(|v| *v += 1);
            }
        }
        assert!(m.iter().enumerate().all(|(i, &v)| v == u32::from(i % 10 < 9)));
    }

    #[test]
    fn overlapping_bands_are_refused() {
        let mut m = vec![0u32; 30];
        for bad in [[(0, 2), (1, 1)], [(1, 1), (0, 1)], [(0, 1), (2, 2)]] {
            let bands = bad.map(|(first, rows)| Band { first, rows });
            assert!(Grid::bands(&mut m, 10, 10, 4, &bands).is_err());
        }
    }
}
