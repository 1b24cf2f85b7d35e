//! `cuda/params.h` in Rust: the same structs, field by field. Sizes are compared in
//! `tests/cuda_kernels.rs`; what a field means stands in the header.
#![allow(missing_docs, reason = "the fields are documented in cuda/params.h")]

/// An address on the device; 0 is null.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// No address.
    pub const NULL: Ptr = Ptr(0);

    /// `bytes` further on.
    pub fn offset(self, bytes: u64) -> Ptr {
        Ptr(self.0 + bytes)
    }
}

/// No page, no group, no limit.
pub const NONE: u32 = u32::MAX;
/// [`ActivateParams::kind`] of sums that are only added.
pub const NO_ACTIVATION: u32 = 3;
/// Flag of [`LinearParams::late`]: `w` is no constant.
pub const LATE_WEIGHTS: u32 = 1;
/// Flag of [`LinearParams::late`]: the next kernel starts only when the one ahead has ended.
pub const LATE_SUCCESSOR: u32 = 2;
/// Flag of [`DecodeParams::early`]: kernels ahead write the newest page of each sequence only.
pub const EARLY_PAGES: u32 = 1;
/// Flag of [`DecodeParams::early`]: none of them writes `selected`.
pub const EARLY_SELECTED: u32 = 2;
/// Virtual pages that opening a segment of a sequence costs.
pub const SEGMENT_COST: u32 = 4;
/// Bins of a row's first histogram when sampling.
pub const SAMPLE_BINS: usize = 2048;
/// Tokens of a row's list of candidates.
pub const SAMPLE_LIST: usize = 4096;

/// A struct that a kernel takes by value.
///
/// # Safety
/// `repr(C)`, no padding bytes that matter, laid out as the struct of the same name in `params.h`.
pub unsafe trait Params: Copy {}

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct $name { $(pub $field: $ty),* }
        // SAFETY: repr(C) with the header's fields in the header's order; sizes are tested.
        unsafe impl Params for $name {}
    )*};
}

params! {
    /// Sum of partial matrices.
    Partial { data: Ptr, splits: u32, columns: u32 }
    /// See the header.
    EmbedParams {
        tokens: Ptr, positions: Ptr, table: Ptr, position_table: Ptr, residual: Ptr,
        hidden: u32, position_offset: u32,
    }
    /// See the header.
    NormParams {
        residual: Ptr, delta: Partial, delta_bias: Ptr, weight: Ptr, bias: Ptr, out: Ptr, row_map: Ptr,
        rows: u32, hidden: u32, epsilon: f32, late: u32,
    }
    /// See the header.
    LinearParams {
        x: Ptr, w: Ptr, index: Ptr, out: Ptr, rows: u32, n: u32, k: u32, splits: u32, more: Ptr, first: u32, late: u32,
        bytes: Ptr, first_byte: u32, ends: u32,
    }
    /// See the header.
    SelectParams {
        logits: Partial, bias: Ptr, keep: Ptr, selected: Ptr, attention: Ptr, nan_count: Ptr,
        rows: u32, sequences: u32, units: u32, per_unit: u32, unit_width: u32, by_unit: u32,
    }
    /// See the header.
    ChoosingParams { product: LinearParams, select: SelectParams, arrived: Ptr, q: u32, routing: u32 }
    /// See the header.
    ChosenParams { product: LinearParams, selected: Ptr, keep: Ptr, sequences: u32, units: u32 }
    /// See the header.
    DownParams {
        up: Partial, up_bias: Ptr, w: Ptr, index: Ptr, out: Ptr,
        rows: u32, n: u32, k: u32, valid: u32, splits: u32,
    }
    /// See the header.
    NarrowParams {
        sums: Partial, out: Ptr, scales: Ptr, factors: Ptr, rows: u32, sequences: u32, columns: u32, pieces: u32,
    }
    /// See the header.
    QkvParams {
        qkv: Partial, bias: Ptr, q_norm: Ptr, k_norm: Ptr, rotation: Ptr, positions: Ptr, kv_slot: Ptr,
        q: Ptr, kv: Ptr, rows: u32, heads: u32, kv_heads: u32, head_dim: u32, norm_dim: u32, epsilon: f32, select: SelectParams,
        narrow: NarrowParams, arrived: Ptr,
    }
    /// See the header.
    RouterBytesParams {
        z: Ptr, z_scales: Ptr, w: Ptr, scales: Ptr, scores: Ptr, group: Ptr,
        rows: u32, n: u32, pieces: u32, first_group: u32, more: u32, reserved: u32, arrived: Ptr,
    }
    /// See the header.
    NeuronParams {
        logits: Partial, scores: Ptr, group: Ptr, last_group: Ptr, index: Ptr, masks: Ptr, nan_count: Ptr,
        rows: u32, n: u32, keep0: u32, keep_other: u32, first_group: u32,
    }
    /// See the header.
    DecodeParams {
        q: Ptr, kv: Ptr, pages: Ptr, first_page: Ptr, tokens: Ptr, skip: Ptr, selected: Ptr, keep: Ptr,
        prefix: Ptr, out: Ptr, lse: Ptr, parts: Ptr, counters: Ptr,
        page_stride: u64, head_stride: u64, q_stride: u64,
        sequences: u32, heads: u32, kv_heads: u32, stages: u32, segment_cost: u32, early: u32, scale: f32, late: u32,
        router: RouterBytesParams, choice: NeuronParams,
    }
    /// See the header.
    PlanParams {
        lengths: Ptr, wanted: Ptr, first_page: Ptr, tokens: Ptr, skip: Ptr, keep: Ptr, prefix: Ptr, counters: Ptr,
        sequences: u32, kv_heads: u32, max_pages: u32, table_stride: u32, window: u32,
        segment_cost: u32, min_pages: u32,
    }
    /// See the header.
    ZeroParams { selected: Ptr, keep: Ptr, out: Ptr, lse: Ptr, kv_heads: u32, unit_width: u32, group: u32 }
    /// See the header.
    MarkParams { active: Ptr, group: Ptr, rows: u32 }
    /// See the header.
    PrefillTile { first_row: u32, tokens: u32, position: u32, context: u32, first_page: u32 }
    /// See the header.
    PrefillParams {
        q: Ptr, kv: Ptr, pages: Ptr, tiles: Ptr, out: Ptr, heads: u32, kv_heads: u32, window: u32, scale: f32,
    }
    /// See the header.
    ActivateParams {
        input: Partial, gate_bias: Ptr, up_bias: Ptr, index: Ptr, masks: Ptr, group: Ptr, out: Ptr,
        rows: u32, n: u32, valid: u32, kind: u32,
    }
    /// See the header.
    ActivatedParams {
        x: Ptr, w: Ptr, index: Ptr, gate_bias: Ptr, up_bias: Ptr, out: Ptr,
        rows: u32, n: u32, k: u32, valid: u32, kind: u32,
    }
    /// See the header.
    RouterParams {
        z: Ptr, w: Ptr, scores: Ptr, group: Ptr,
        rows: u32, n: u32, rank: u32, first_group: u32, more: u32, reserved: u32,
    }
    /// See the header.
    ArgmaxParams { logits: Ptr, token: Ptr, logprob: Ptr, parts: Ptr, counters: Ptr, vocab: u32 }
    /// See the header.
    SampleJob {
        uniform: f64, row: u32, occurrences: u32, repetition: f32, presence: f32, frequency: f32,
        inverse: f32, floor: f32, bin_scale: f32, top_k: u32, top_p: f32, kind: u32, reserved: u32,
    }
    /// See the header.
    SampleState {
        best: u64, before: u64, total: u64, bin: u32, listed: u32, arrived: u32, reserved: u32,
    }
    /// See the header.
    SampleParams {
        logits: Ptr, jobs: Ptr, occurrences: Ptr, likeliest: Ptr, likeliest_logprob: Ptr, token: Ptr,
        logprob: Ptr, top_token: Ptr, top_logprob: Ptr, states: Ptr, bins: Ptr, list: Ptr,
        vocab: u32, index_bits: u32, first_job: u32, reserved: u32,
    }
    /// See the header.
    CountParams { entries: Ptr, occurrences: Ptr, count: u32, vocab: u32 }
    /// See the header.
    TransposeParams { input: Ptr, out: Ptr, in_rows: u32, columns: u32, out_columns: u32, first: u32 }
    /// See the header.
    ConvertParams { input: Ptr, out: Ptr, count: u64, in_kind: u32, out_kind: u32 }
    /// See the header.
    StreamParams { at: Ptr, sink: Ptr, count: u64 }
    /// See the header.
    FillParams { at: Ptr, count: u64, seed: u64, scale: f32, offset: f32 }
}

/// `size_of` of each struct, in the header's order.
pub fn sizes() -> [usize; 30] {
    use std::mem::size_of as s;
    [
        s::<Partial>(),
        s::<EmbedParams>(),
        s::<NormParams>(),
        s::<LinearParams>(),
        s::<SelectParams>(),
        s::<ChoosingParams>(),
        s::<ChosenParams>(),
        s::<DownParams>(),
        s::<NarrowParams>(),
        s::<QkvParams>(),
        s::<RouterBytesParams>(),
        s::<NeuronParams>(),
        s::<DecodeParams>(),
        s::<PlanParams>(),
        s::<ZeroParams>(),
        s::<MarkParams>(),
        s::<PrefillTile>(),
        s::<PrefillParams>(),
        s::<ActivateParams>(),
        s::<ActivatedParams>(),
        s::<RouterParams>(),
        s::<ArgmaxParams>(),
        s::<SampleJob>(),
        s::<SampleState>(),
        s::<SampleParams>(),
        s::<CountParams>(),
        s::<TransposeParams>(),
        s::<ConvertParams>(),
        s::<StreamParams>(),
        s::<FillParams>(),
    ]
}
