//! Structs of the operator level into the backend's. What they say is checked there, where the tests
//! without a GPU can see it; here only what C alone knows.

use super::constants::*;
use super::convert::{flags, zero};
use super::op_types::*;
use crate::dtype::DType;
use crate::engine::ops::{Attention, DevicePtr, HeadSelection, Mlp, NeuronSelection, Workspace};
use crate::error::{Error, Result};

fn dtype(value: polar_dtype) -> Result<DType> {
    match value {
        POLAR_DTYPE_F16 => Ok(DType::F16),
        POLAR_DTYPE_BF16 => Ok(DType::BF16),
        other => Err(Error::invalid(format!("dtype is {other}, allowed are float16 and bfloat16"))),
    }
}

fn workspace(at: polar_device_ptr, bytes: u64) -> Workspace {
    Workspace { at: DevicePtr(at), bytes }
}

pub(super) fn attention(o: &polar_op_attention) -> Result<Attention> {
    flags("polar_op_attention.flags", o.flags, POLAR_OP_LEAVE_REST)?;
    zero("polar_op_attention.reserved", &[o.reserved])?;
    Ok(Attention {
        dtype: dtype(o.dtype)?,
        sequences: o.num_sequences,
        heads: o.num_heads,
        kv_heads: o.num_kv_heads,
        head_dim: o.head_dim,
        max_pages: o.max_pages,
        table_stride: o.block_table_stride,
        window: o.window,
        scale: o.scale,
        q_stride: o.q_stride,
        page_stride: o.page_stride,
        head_stride: o.head_stride,
        q: DevicePtr(o.q),
        kv: DevicePtr(o.kv),
        block_table: DevicePtr(o.block_table),
        lengths: DevicePtr(o.seq_lens),
        keep: DevicePtr(o.keep),
        selected: DevicePtr(o.selected),
        out: DevicePtr(o.out),
        lse: DevicePtr(o.lse),
        workspace: workspace(o.workspace, o.workspace_bytes),
        leave_rest: o.flags & POLAR_OP_LEAVE_REST != 0,
    })
}

pub(super) fn head_selection(o: &polar_op_head_selection) -> Result<HeadSelection> {
    zero("polar_op_head_selection.reserved", &[o.reserved])?;
    Ok(HeadSelection {
        dtype: dtype(o.dtype)?,
        sequences: o.num_sequences,
        hidden: o.hidden_size,
        kv_heads: o.num_kv_heads,
        router_rows: o.router_rows,
        unit_width: o.group_width,
        x: DevicePtr(o.x),
        weight: DevicePtr(o.weight),
        bias: DevicePtr(o.bias),
        logits: DevicePtr(o.logits),
        keep: DevicePtr(o.keep),
        selected: DevicePtr(o.selected),
        zero: DevicePtr(o.attention_out),
        nan_count: DevicePtr(o.nan_count),
        workspace: workspace(o.workspace, o.workspace_bytes),
    })
}

pub(super) fn neuron_selection(o: &polar_op_neuron_selection) -> Result<NeuronSelection> {
    zero("polar_op_neuron_selection.reserved", &[o.reserved])?;
    Ok(NeuronSelection {
        dtype: dtype(o.dtype)?,
        rows: o.num_rows,
        hidden: o.hidden_size,
        rank: o.rank,
        neurons: o.num_neurons,
        keep: o.keep,
        x: DevicePtr(o.x),
        down: DevicePtr(o.router_down),
        up: DevicePtr(o.router_up),
        logits: DevicePtr(o.logits),
        active_rows: DevicePtr(o.active_rows),
        index: DevicePtr(o.index),
        nan_count: DevicePtr(o.nan_count),
        workspace: workspace(o.workspace, o.workspace_bytes),
    })
}

pub(super) fn mlp(o: &polar_op_mlp) -> Result<Mlp> {
    Ok(Mlp {
        dtype: dtype(o.dtype)?,
        rows: o.num_rows,
        hidden: o.hidden_size,
        neurons: o.num_neurons,
        keep: o.keep,
        x: DevicePtr(o.x),
        up: DevicePtr(o.up),
        up_bias: DevicePtr(o.up_bias),
        down: DevicePtr(o.down),
        down_bias: DevicePtr(o.down_bias),
        index: DevicePtr(o.index),
        out: DevicePtr(o.out),
        workspace: workspace(o.workspace, o.workspace_bytes),
    })
}
