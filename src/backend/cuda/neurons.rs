//! The selective MLP: its router chain, which runs beside QKV and attention, and the two products that
//! read only the chosen neurons' rows.
//!
//! Main: attention norm, QKV, attention, output projection, MLP norm, up, down.
//! Side: fork after the attention norm (after the QKV product if the attention router's ran beside that);
//! router down, up, selection; join before the MLP norm. So the list is complete before that norm begins (the
//! join makes it start in order, not early), and what comes after it may read it, and start on weights, before
//! the kernels ahead end. No buffer that the side writes is used by the main stream in between, nor the other
//! way round: `h` is read by both, and written again after the join.

use super::Cuda;
use super::device::{Device, start_beside};
use super::launch::{Launch, MADE_ROWS, SKINNY_ROWS};
use super::params::*;
use super::scratch::{CudaScratch, Pending};
use super::tables::Groups;
use super::weights::{CudaWeights, LayerRouters};
use crate::backend::{Site, Step};
use crate::error::{Error, Result};
use crate::sparsity::Rule;

/// Share of neurons above which a layer runs dense. Measured on an H200 at the shapes of OPT-6.7B: with more
/// rows the dense products get cheaper per row, and the router chain waits for room beside attention.
pub(super) fn break_even(batch: u32) -> f32 {
    match batch {
        0..=8 => 0.6,
        9..=16 => 0.5,
        17..=32 => 0.35,
        _ => 0.2,
    }
}

impl<D: Device> Cuda<D> {
    /// A kernel of the router chain. Its products are never the device's library's, whose workspace belongs
    /// to the main stream.
    pub(super) fn go_beside<P: Params>(&self, launch: &Launch, params: &P) -> Result<()> {
        if launch.grid.0 == 0 {
            return Ok(());
        }
        start_beside(&*self.device, launch, params)
    }

    /// Lets side work start.
    pub(super) fn fork(&self, s: &CudaScratch<D>) -> Result<()> {
        if s.kernels.tuning.beside { self.device.fork() } else { Ok(()) }
    }

    /// Lets the layer's router chain start, if it will have one.
    pub(super) fn fork_neurons(&self, s: &CudaScratch<D>, step: &Step, layer: usize) -> Result<()> {
        let routed = step.plan.mlp_sparse(layer) && step.plan.needs_router(Site::Mlp);
        if routed { self.fork(s) } else { Ok(()) }
    }

    /// Groups of the step that may choose neurons in this layer: the first, and how many. As many as there
    /// could be: those without rows end at once.
    fn choosing(s: &CudaScratch<D>, step: &Step, layer: usize) -> Option<(Groups, u32, u32)> {
        let (which, rows) = (s.tables.layer_groups(step, layer)?, s.tables.rows().decode);
        Some(match which {
            Groups::Both => (which, 0, 1 + rows),
            Groups::Reference => (which, 0, 1),
            Groups::Invariant => (which, 1, rows),
        })
    }

    /// Scores of the neurons from the hidden state that entered `project`.
    pub(super) fn route_neurons(
        &self,
        l: &LayerRouters,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
    ) -> Result<()> {
        let (rows, d, b) = (s.tables.rows().decode, s.shape.hidden as u32, s.buffers);
        let (rank, ffn) = (l.rank as u32, s.shape.ffn as u32);
        let Some((which, first_group, groups)) = Self::choosing(s, step, layer) else { return Ok(()) };
        let (launch, narrow) = s.kernels.product((b.h, l.down), (rows, rank, d), b.router_sums);
        self.go_beside(&launch, &narrow)?;
        let z = ActivateParams {
            input: narrow.sums(),
            out: b.z,
            rows,
            n: rank,
            valid: rank,
            kind: 3,
            ..Default::default()
        };
        self.go_beside(&s.kernels.activate(rows, rank), &z)?;
        let group = s.tables.groups(which);
        if rows <= SKINNY_ROWS {
            let scores = b.neuron_scores;
            let params = RouterParams { z: b.z, w: l.up, scores, group, rows, n: ffn, rank, first_group };
            self.go_beside(&s.kernels.router_scores(rows, ffn), &params)?;
        } else {
            let size = (rows, s.shape.neurons as u32, rank);
            let (launch, logits) = s.kernels.product((b.z, l.up), size, b.router_sums);
            self.go_beside(&launch, &logits)?;
            let params = NeuronParams {
                logits: logits.sums(),
                scores: b.neuron_scores,
                group,
                last_group: s.tables.last_group(),
                rows,
                n: ffn,
                first_group,
                ..Default::default()
            };
            self.go_beside(&s.kernels.neuron_scores(groups, ffn), &params)?;
        }
        s.scored = Some(layer);
        Ok(())
    }

    /// Lists and masks from the scores.
    pub(super) fn select_neurons(&self, s: &mut CudaScratch<D>, step: &Step, layer: usize) -> Result<()> {
        let Some((which, first_group, groups)) = Self::choosing(s, step, layer) else { return Ok(()) };
        if s.scored.take() != Some(layer) {
            return Err(Error::invalid(format!("layer {layer}: no MLP router scores")));
        }
        let (b, ffn) = (s.buffers, s.shape.ffn as u32);
        let keep = |r| if let Rule::TopK(k) = r { k } else { NONE };
        let rule = step.plan.mlp_rule(layer);
        let params = NeuronParams {
            scores: b.neuron_scores,
            group: s.tables.groups(which),
            last_group: s.tables.last_group(),
            index: b.index,
            masks: b.masks,
            nan_count: s.sampling.nan_count(),
            rows: s.tables.rows().decode,
            n: ffn,
            keep0: keep(rule.reference),
            keep_other: keep(rule.invariant),
            first_group,
            ..Default::default()
        };
        self.go_beside(&s.kernels.select_neurons(groups, ffn), &params)
    }

    /// The MLP when every row runs the same neurons: only their rows are read. False: they do not.
    pub(super) fn selected_mlp(
        &self,
        w: &CudaWeights<D>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
    ) -> Result<bool> {
        let (l, rows, b) = (&w.layers[layer], s.tables.rows().all, s.buffers);
        let all_share = s.tables.all_reference
            && rows <= SKINNY_ROWS
            && s.tables.layer_groups(step, layer) == Some(Groups::Reference);
        let Rule::TopK(kept) = step.plan.mlp_rule(layer).reference else { return Ok(false) };
        if !all_share || s.shape.gated {
            return Ok(false);
        }
        let (d, n) = (s.shape.hidden as u32, kept.next_multiple_of(8));
        let (launch, splits) = s.kernels.linear_up(rows, n, d);
        let (x, w, index, out) = (b.h, l.first, b.index, b.sums);
        let up = LinearParams { x, w, index, out, rows, n, k: d, splits, ..Default::default() };
        self.go(s, &launch, &up)?;
        let input = up.sums();
        let sum = if rows <= MADE_ROWS && s.kernels.tuning.made {
            let (launch, splits) = s.kernels.mlp_down(d, n);
            let params = DownParams {
                up: input,
                up_bias: l.up_bias,
                w: l.down.weight,
                index: b.index,
                out: b.delta,
                rows,
                n: d,
                k: n,
                valid: kept,
                splits,
            };
            self.go(s, &launch, &params)?;
            Partial { data: b.delta, splits, columns: d }
        } else {
            let act = ActivateParams {
                input,
                up_bias: l.up_bias,
                index: b.index,
                out: b.y,
                rows,
                n,
                valid: kept,
                ..Default::default()
            };
            self.go(s, &s.kernels.activate(rows, n), &act)?;
            self.product_transposed(s, (b.y, l.down.weight, b.index), (rows, d, n), b.delta)?
        };
        s.pending = Pending { sum, bias: l.down.bias };
        Ok(true)
    }
}
