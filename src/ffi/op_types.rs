//! Structs of the operator level. Sizes and strides count elements; addresses are the device's.

use super::constants::*;

/// The kernels, loaded into one CUDA context of the host.
pub struct polar_op_library {
    _opaque: [u8; 0],
}

/// An address in device memory: a `CUdeviceptr`, or a pointer of the CUDA runtime as an integer
/// (torch: `tensor.data_ptr()`). 0 is NULL.
pub type polar_device_ptr = u64;

/// Bits of `polar_op_attention.flags`.
pub type polar_op_flags = u32;

/// What is not computed keeps what it holds in `out` and `lse`: saves a small kernel where something
/// else put the zeros there (`polar_op_head_selection_run` can) or nobody reads them.
pub const POLAR_OP_LEAVE_REST: polar_op_flags = 1;

/// Decode attention over pages of the host's KV cache: one query token per sequence, only the KV heads
/// that the sequence keeps. Dense attention is the same with `keep` and `selected` 0.
///
/// A page is 16 tokens of one layer, head by head, so that a head that is not kept is not read at all:
/// `kv[page][kv_head][K or V][16][head_dim]`. K and V of a head and its 16 tokens lie together; pages and
/// heads may lie anywhere (`page_stride`, `head_stride`), so one pool may hold all layers.
///
/// `keep`, `seq_lens` and the block table are read on the device, so a recorded graph follows them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_op_attention {
    /// `sizeof(polar_op_attention)`, set by the caller.
    pub struct_size: u32,
    /// `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of q, pages and output. Sums are f32.
    pub dtype: polar_dtype,
    /// Sequences in the batch, padding included.
    pub num_sequences: u32,
    /// Query heads.
    pub num_heads: u32,
    /// KV heads, at most 256. Query heads h * group and up share KV head h, with
    /// group = num_heads / num_kv_heads from 1 to 16.
    pub num_kv_heads: u32,
    /// 64, 80, 96, 128 or (up to 8 query heads per KV head) 256.
    pub head_dim: u32,
    /// Entries of a sequence's block table. A sequence longer than 16 times this is cut.
    pub max_pages: u32,
    /// From one sequence's block table to the next; 0 = `max_pages`.
    pub block_table_stride: u32,
    /// Only so many newest tokens are seen; 0 = all.
    pub window: u32,
    /// Factor of q k; 0 = 1 / sqrt(head_dim).
    pub scale: f32,
    /// `POLAR_OP_` bits.
    pub flags: polar_op_flags,
    /// Must be 0.
    pub reserved: u32,
    /// From one sequence's q to the next, a multiple of 8; 0 = packed. For q inside a fused QKV output.
    pub q_stride: u64,
    /// From one page to the next, a multiple of 8; 0 = packed.
    pub page_stride: u64,
    /// From one KV head of a page to the next, a multiple of 8; 0 = packed.
    pub head_stride: u64,
    /// Queries, `[num_sequences][num_heads][head_dim]`, rotated; 16-byte aligned.
    pub q: polar_device_ptr,
    /// Pages; 16-byte aligned, best 128.
    pub kv: polar_device_ptr,
    /// int32 `[num_sequences][max_pages]`: numbers of pages, the oldest first. Entries behind a sequence's
    /// last page are not read.
    pub block_table: polar_device_ptr,
    /// int32 `[num_sequences]`: tokens in the cache, the one that is decoded included. 0 (or less) =
    /// padding.
    pub seq_lens: polar_device_ptr,
    /// int32 `[num_sequences]`: KV heads each sequence keeps; what is outside 0 to `num_kv_heads` means
    /// all. 0 = all of every sequence.
    pub keep: polar_device_ptr,
    /// uint16 `[num_sequences][num_kv_heads]`: the kept heads, `keep[b]` of them, each once. 0 = the
    /// first ones.
    pub selected: polar_device_ptr,
    /// Result, packed `[num_sequences][num_heads][head_dim]`; zeros for heads that are not kept and for
    /// padding. 16-byte aligned.
    pub out: polar_device_ptr,
    /// float `[num_sequences][num_heads]`: natural log of the sum of exponentials, to merge with other
    /// attention over the same query; -infinity where nothing was computed. 0 = not wanted.
    pub lse: polar_device_ptr,
    /// `polar_op_attention_workspace` bytes, 256-byte aligned; holds the plan.
    pub workspace: polar_device_ptr,
    /// Its size.
    pub workspace_bytes: u64,
}

/// The KV heads each sequence keeps: those with the largest scores, ties to the lower head, NaN last.
/// Scores come from a linear router, `x weight^T + bias`, or from the host.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_op_head_selection {
    /// `sizeof(polar_op_head_selection)`, set by the caller.
    pub struct_size: u32,
    /// `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x, weight, bias and `attention_out`.
    pub dtype: polar_dtype,
    /// Sequences in the batch.
    pub num_sequences: u32,
    /// KV heads, at most 256.
    pub num_kv_heads: u32,
    /// Scores per sequence: `num_kv_heads`, or one per query head, of which the largest of a group counts.
    pub router_rows: u32,
    /// Width of x, a multiple of 8. Not read with `logits`.
    pub hidden_size: u32,
    /// Elements of one KV head in `attention_out`, a multiple of 8: its query heads times head_dim.
    pub group_width: u32,
    /// Must be 0.
    pub reserved: u32,
    /// `[num_sequences][hidden_size]`: the layer's input after its norm. 16-byte aligned.
    pub x: polar_device_ptr,
    /// `[router_rows][hidden_size]`, 16-byte aligned.
    pub weight: polar_device_ptr,
    /// `[router_rows]`; 0 = none. Added to `logits` too.
    pub bias: polar_device_ptr,
    /// float `[num_sequences][router_rows]`: scores of the host's own making, then `x` and `weight` are
    /// not read; 0 = the router makes them.
    pub logits: polar_device_ptr,
    /// int32 `[num_sequences]`: heads to keep. For density d: max(1, floor(d * num_kv_heads)).
    pub keep: polar_device_ptr,
    /// Result, uint16 `[num_sequences][num_kv_heads]`: the first `keep[b]` are the kept heads, ascending;
    /// the rest is not written.
    pub selected: polar_device_ptr,
    /// The attention's `out`, to be zeroed where heads are not kept (then the attention can run with
    /// `POLAR_OP_LEAVE_REST`), 16-byte aligned; 0 = not wanted.
    pub attention_out: polar_device_ptr,
    /// uint32, raised by one for every score that is NaN; 0 = not wanted.
    pub nan_count: polar_device_ptr,
    /// `polar_op_head_selection_workspace` bytes, 256-byte aligned.
    pub workspace: polar_device_ptr,
    /// Its size.
    pub workspace_bytes: u64,
}

/// The neurons a batch runs: those with the largest sums, over its rows, of positive router scores; ties
/// to the lower neuron, NaN last. The router is `x router_down^T router_up^T`, or the host brings scores.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_op_neuron_selection {
    /// `sizeof(polar_op_neuron_selection)`, set by the caller.
    pub struct_size: u32,
    /// `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x and the router.
    pub dtype: polar_dtype,
    /// Rows (sequences) in the batch.
    pub num_rows: u32,
    /// Neurons of the layer, a multiple of 8.
    pub num_neurons: u32,
    /// Neurons to keep, at least 1.
    pub keep: u32,
    /// Width of x, a multiple of 8. Not read with `logits`.
    pub hidden_size: u32,
    /// Width of the router's middle, a multiple of 8. Not read with `logits`.
    pub rank: u32,
    /// Must be 0.
    pub reserved: u32,
    /// `[num_rows][hidden_size]`, 16-byte aligned.
    pub x: polar_device_ptr,
    /// `[rank][hidden_size]`, 16-byte aligned.
    pub router_down: polar_device_ptr,
    /// `[num_neurons][rank]`, 16-byte aligned.
    pub router_up: polar_device_ptr,
    /// float `[num_rows][num_neurons]`: scores of the host's own making, then x and the router are not
    /// read; 0 = the router makes them.
    pub logits: polar_device_ptr,
    /// int32, one: rows from this number on are padding and have no say; 0 = there is none.
    pub active_rows: polar_device_ptr,
    /// Result, uint32 `[keep up to a multiple of 8]`: the kept neurons, ascending, then zeros. 16-byte
    /// aligned.
    pub index: polar_device_ptr,
    /// uint32, raised by one for every sum that is NaN; 0 = not wanted.
    pub nan_count: polar_device_ptr,
    /// `polar_op_neuron_selection_workspace` bytes, 256-byte aligned.
    pub workspace: polar_device_ptr,
    /// Its size.
    pub workspace_bytes: u64,
}

/// A ReLU MLP, `relu(x up^T + up_bias) down + down_bias`, of the listed neurons only: a neuron is a row
/// of `up` and a row of `down`, and those of the others are not read.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct polar_op_mlp {
    /// `sizeof(polar_op_mlp)`, set by the caller.
    pub struct_size: u32,
    /// `POLAR_DTYPE_F16` or `POLAR_DTYPE_BF16`: of x, weights and output. Sums are f32.
    pub dtype: polar_dtype,
    /// Rows in the batch; at most 64 with `index`.
    pub num_rows: u32,
    /// Width of x and out, a multiple of 8.
    pub hidden_size: u32,
    /// Neurons of the layer, a multiple of 8.
    pub num_neurons: u32,
    /// Neurons in `index`. Not read without it.
    pub keep: u32,
    /// `[num_rows][hidden_size]`, 16-byte aligned.
    pub x: polar_device_ptr,
    /// `[num_neurons][hidden_size]`, 16-byte aligned.
    pub up: polar_device_ptr,
    /// `[num_neurons]`; 0 = none.
    pub up_bias: polar_device_ptr,
    /// `[num_neurons][hidden_size]`: the transpose of how checkpoints have it, so that a neuron is a row.
    /// 16-byte aligned.
    pub down: polar_device_ptr,
    /// `[hidden_size]`, 8-byte aligned; 0 = none.
    pub down_bias: polar_device_ptr,
    /// As `polar_op_neuron_selection_run` leaves it; 0 = every neuron.
    pub index: polar_device_ptr,
    /// Result, `[num_rows][hidden_size]`, 16-byte aligned.
    pub out: polar_device_ptr,
    /// `polar_op_mlp_workspace` bytes, 256-byte aligned.
    pub workspace: polar_device_ptr,
    /// Its size.
    pub workspace_bytes: u64,
}
