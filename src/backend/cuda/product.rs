//! A dense product by our own kernel: its launch, its parameters, and where its sums lie.

use super::cut::{ActivatedCut, WideCut, variant};
use super::device::Device;
use super::launch::{Kernels, LIBRARY_COLUMNS, LIBRARY_ROWS, Launch, MADE_ROWS, SKINNY_ROWS};
use super::params::{ActivateParams, ActivatedParams, LATE_WEIGHTS, LinearParams, Partial, Ptr};
use crate::dtype::DType;
use crate::error::Result;

impl Kernels {
    /// The kernels for a device, with all that it has.
    pub fn for_device<D: Device>(dtype: DType, head_dim: u32, group: u32, device: &D) -> Result<Kernels> {
        let (multiprocessors, shared) = (device.multiprocessors(), device.shared_per_block());
        let kernels = Kernels::new(dtype, head_dim, group, multiprocessors, shared)?;
        Ok(kernels.with_warpgroups(device.warpgroups()))
    }

    /// For a GPU that has the products by warpgroups ([`Device::warpgroups`]), or
    /// has not, as [`Kernels::new`] says.
    pub fn with_warpgroups(mut self, has: bool) -> Kernels {
        self.warpgroups = has;
        self
    }

    /// Whether the down product of listed rows makes its input from the up product's sums. Not by warpgroups, which are
    /// faster with an activation ahead of them (on an H200 a step of one sequence of OPT-6.7B 2 %).
    pub(super) fn makes_input(&self, rows: u32) -> bool {
        rows <= MADE_ROWS && self.tuning.made && !self.warpgroups
    }

    /// Whether a QKV product of so many columns is our own, so that the attention router's rows go with it. By warpgroups
    /// also where the device's library would be about as fast (on an H200 steps of 64 sequences get .5 to 1 % faster; with
    /// 12,288 columns the library's product is).
    pub(super) fn carries_router(&self, rows: u32, n: u32) -> bool {
        rows <= LIBRARY_ROWS && n < LIBRARY_COLUMNS
            || self.warpgroups && rows <= SKINNY_ROWS && n <= LIBRARY_COLUMNS / 2
    }

    /// The product of `x` and `w` of `k` columns with what `act` makes of its sums, for few rows; with a gate `w` has twice as
    /// many rows as `act` columns. None where other kernels must do it, or are as a rule faster.
    pub fn product_activated(
        &self,
        (x, w, k): (Ptr, Ptr, u32),
        act: &ActivateParams,
    ) -> Option<(Launch, ActivatedParams)> {
        let &ActivateParams { index, gate_bias, up_bias, masks, out, rows, n, valid, kind, .. } = act;
        if !self.tuning.activated || masks != Ptr::NULL {
            return None;
        }
        let gated = kind == 1 || kind == 2;
        let per = if gated { 2 } else { 1 };
        // The norm ahead fills a multiprocessor for each row. Where it runs in clusters it leaves room for one block there, and
        // all of a large matrix's blocks, which have enough to do, are started beside it (on an H200 dense steps of 8 sequences of
        // OPT-6.7B get .7 % faster; selective ones would get .3 % slower).
        let listed = index != Ptr::NULL;
        let reserved = if self.warpgroups && !listed { 0 } else { rows };
        let few =
            ActivatedCut::new(rows, (n, per, k), (self.multiprocessors, reserved), self.shared_per_block);
        let launch = if let Some(ActivatedCut { blocks, threads, shared }) = few {
            Launch::new(self.activated, (blocks, 1), threads, shared)
        } else {
            // With more columns the device's library is faster; but it reads no list.
            let own = listed || n <= LIBRARY_COLUMNS;
            if !self.warpgroups || gated || !own || rows > SKINNY_ROWS || !n.is_multiple_of(2) {
                return None;
            }
            let WideCut { variant, grid: (tiles, parts), shared } =
                WideCut::activated(rows, n, k, self.multiprocessors);
            let launch = Launch::new(self.wide_activated[variant], (tiles * parts, 1), 256, shared);
            Launch { cluster: parts, ..launch }
        };
        Some((launch, ActivatedParams { x, w, index, gate_bias, up_bias, out, rows, n, k, valid, kind }))
    }

    /// A product of up to [`SKINNY_ROWS`](super::launch::SKINNY_ROWS) rows by warpgroups, where they can; `k_lines`: the
    /// matrix is stored `[k, n]`.
    pub(super) fn by_warpgroups(&self, k_lines: bool, rows: u32, n: u32, k: u32) -> Option<(Launch, u32)> {
        let cut = self.warpgroups.then(|| WideCut::new(rows, n, k, k_lines, self.multiprocessors))?;
        let WideCut { variant, grid, shared } = cut?;
        Some((Launch::new(self.wide[usize::from(k_lines)][variant], grid, 256, shared), grid.1))
    }

    /// `x` times a matrix stored `[n, k]`, sums to `out`.
    pub(super) fn product(
        &self,
        (x, w): (Ptr, Ptr),
        (rows, n, k): (u32, u32, u32),
        out: Ptr,
    ) -> (Launch, LinearParams) {
        let (launch, splits) = self.linear(rows, n, k);
        (launch, LinearParams { x, w, out, rows, n, k, splits, ..Default::default() })
    }

    /// The same with the sums in at most so many parts.
    pub(super) fn product_in_parts(
        &self,
        most: u32,
        of: (Ptr, Ptr),
        size: (u32, u32, u32),
        out: Ptr,
    ) -> (Launch, LinearParams) {
        let (mut launch, params) = self.product(of, size, out);
        let splits = params.splits.min(most);
        launch.grid.1 = launch.grid.1 / params.splits * splits;
        (launch, LinearParams { splits, ..params })
    }

    /// The same in so few blocks that they find room beside a product of the device's library, whose blocks do not fill
    /// the device.
    pub(super) fn product_beside(
        &self,
        of: (Ptr, Ptr),
        size: (u32, u32, u32),
        out: Ptr,
    ) -> (Launch, LinearParams) {
        let (launch, params) = self.product(of, size, out);
        let blocks = launch.grid.0 * launch.grid.1;
        let most = self.multiprocessors * params.splits / (4 * blocks).max(1);
        self.product_in_parts(most.max(1), of, size, out)
    }

    /// Whether the product of so many rows can have columns from bytes.
    pub fn takes_bytes(&self, rows: u32) -> bool {
        self.warpgroups && rows <= SKINNY_ROWS
    }

    /// A product with its columns from `first` on out of bytes (`cuda/wide_bytes.cuh`); those before it end at `ends`.
    pub fn from_bytes(
        &self,
        (launch, params): (Launch, LinearParams),
        bytes: Ptr,
        (first, ends): (u32, u32),
    ) -> (Launch, LinearParams) {
        let launch = Launch { kernel: self.wide_bytes[variant(params.rows)], ..launch };
        (launch, LinearParams { bytes, first_byte: first, ends, ..params })
    }

    /// The product turned round, for a narrow `w` and many rows of `x`: sums `[w's rows][x's rows]`. For up to
    /// [`SKINNY_ROWS`](super::launch::SKINNY_ROWS) rows of `w`.
    pub(super) fn product_turned(
        &self,
        (x, w): (Ptr, Ptr),
        (rows, n, k): (u32, u32, u32),
        out: Ptr,
    ) -> (Launch, LinearParams) {
        let (launch, params) = self.product((w, x), (n, rows, k), out);
        (launch, LinearParams { late: LATE_WEIGHTS, ..params })
    }

    /// A product with a matrix stored `[k, n]`; `index`: for these of its rows only.
    pub(super) fn product_transposed(
        &self,
        (x, w, index): (Ptr, Ptr, Ptr),
        (rows, n, k): (u32, u32, u32),
        out: Ptr,
    ) -> (Launch, LinearParams) {
        let (launch, splits) = self.linear_transposed(rows, n, k);
        (launch, LinearParams { x, w, index, out, rows, n, k, splits, ..Default::default() })
    }
}

impl LinearParams {
    /// What the product leaves.
    pub(super) fn sums(&self) -> Partial {
        Partial { data: self.out, splits: self.splits, columns: self.n }
    }
}
