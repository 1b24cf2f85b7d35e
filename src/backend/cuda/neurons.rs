//! The selective MLP: its router chain, most of which runs beside QKV and attention, and the two products that
//! read only the chosen neurons' rows.
//!
//! Main: attention norm, router down, QKV, attention, output projection, MLP norm, up, down.
//! Side: fork after router down; its sums, router up, selection; join before the MLP norm. Router down is in line
//! because it is small and its blocks would wait for those of QKV, which come early, to end: what depends on it
//! can then take the places that QKV's first blocks leave. The join makes the norm start in order, not early, so the
//! list is complete before that norm begins, and what comes after it may read it, and start on weights, before
//! the kernels ahead end. No buffer that the side writes is used by the main stream in between, nor the other
//! way round.

use super::Cuda;
use super::device::{Device, start_beside};
use super::launch::{Launch, ROUTER_MADE_ROWS, ROUTER_MADE_SPLITS, SKINNY_ROWS};
use super::params::*;
use super::routers::LayerRouters;
use super::scratch::{CudaScratch, Pending};
use super::tables::Groups;
use super::weights::CudaWeights;
use crate::backend::{Site, Step};
use crate::error::Result;
use crate::sparsity::Rule;
use std::ops::RangeInclusive;

/// Share of neurons above which a layer runs dense. Measured at the shapes of OPT-6.7B: at .517 of the neurons 32
/// rows gain 5 %, at .5 64 rows 4 %, and at .623 they lose 1 %. With more rows the dense products get cheaper per row,
/// and the router chain waits for room beside attention.
pub(super) fn break_even(batch: u32) -> f32 {
    match batch {
        0..=16 => 0.6,
        17..=64 => 0.55,
        _ => 0.2,
    }
}

/// Sequences of a step whose router chain goes ahead of the main stream where both wait for room. With fewer, the chain
/// is short and the QKV product, which it would hold up, is what counts (1: 2 % slower); with more, neurons are
/// not chosen, as a rule. At 8 and 32 on an H200 steps become 1 to 4 % faster.
pub(super) const SIDE_FIRST: RangeInclusive<u32> = 8..=32;

/// A layer's neurons on the way to being chosen.
pub(super) struct Routing {
    layer: usize,
    rank: u32,
    /// The router's second matrix, its scales, and bytes of a row.
    up: (Ptr, Ptr, u32),
    /// Of its first product; none: that left its output itself.
    sums: Option<Partial>,
    /// Groups that choose: which, the first, and how many.
    groups: (Groups, u32, u32),
}

impl<D: Device> Cuda<D> {
    /// A kernel of the side work. Its products are never the device's library's, whose workspace belongs to the
    /// main stream.
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

    /// The router's first product, of the normed hidden state, if the layer's neurons are chosen by it. Ahead of
    /// the fork.
    pub(super) fn route_neurons(
        &self,
        router: Option<&LayerRouters>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
    ) -> Result<Option<Routing>> {
        let routed = step.plan.mlp_sparse(layer) && step.plan.needs_router(Site::Mlp);
        let Some(l) = router.filter(|l| routed && l.rank > 0) else { return Ok(None) };
        s.neurons_selected = Some(layer);
        let Some(groups) = Self::choosing(s, step, layer) else { return Ok(None) };
        let (rows, rank) = (s.tables.rows().decode, l.rank as u32);
        let (b, size) = (s.buffers, (rows, rank, s.shape.hidden as u32));
        let z = ActivateParams {
            out: b.z,
            rows,
            n: rank,
            valid: rank,
            kind: NO_ACTIVATION,
            ..Default::default()
        };
        let sums = if self.product_activated(s, (b.h, l.down, size.2), &z)? {
            None
        } else {
            let most = if rows <= ROUTER_MADE_ROWS { ROUTER_MADE_SPLITS } else { u32::MAX };
            let (launch, narrow) = s.kernels.product_in_parts(most, (b.h, l.down), size, b.router_sums);
            self.go(s, &launch, &narrow)?;
            Some(narrow.sums())
        };
        let up = (l.up, l.up_scales, l.up_stride() as u32);
        Ok(Some(Routing { layer, rank, up, sums, groups }))
    }

    /// Forks: scores of the neurons, and their lists and masks.
    pub(super) fn choose_neurons(
        &self,
        s: &CudaScratch<D>,
        step: &Step,
        routing: Option<Routing>,
    ) -> Result<()> {
        let Some(Routing {
            layer,
            rank,
            up: (up, scales, stride),
            sums,
            groups: (which, first_group, groups),
        }) = routing
        else {
            return Ok(());
        };
        self.fork(s)?;
        let (rows, ffn, b) = (s.tables.rows().decode, s.shape.ffn as u32, s.buffers);
        let whole = RouterParams {
            z: b.z,
            first: sums.unwrap_or_default(),
            w: up,
            scales,
            scores: b.neuron_scores,
            group: s.tables.groups(which),
            rows,
            n: ffn,
            rank,
            stride,
            first_group,
            more: 0,
        };
        let made = sums.and_then(|_| s.kernels.router_scores_made(rows, ffn, rank));
        if let Some(launch) = made {
            self.go_beside(&launch, &whole)?;
        } else {
            if let Some(input) = sums {
                let (out, n, valid) = (b.z, rank, rank);
                let z =
                    ActivateParams { input, out, rows, n, valid, kind: NO_ACTIVATION, ..Default::default() };
                self.go_beside(&s.kernels.activate(rows, rank), &z)?;
            }
            for first in (0..rows).step_by(SKINNY_ROWS as usize) {
                let rows = SKINNY_ROWS.min(rows - first);
                let params = RouterParams {
                    z: b.z.offset(2 * u64::from(first) * u64::from(rank)),
                    group: whole.group.offset(4 * u64::from(first)),
                    rows,
                    more: u32::from(first > 0),
                    ..whole
                };
                self.go_beside(&s.kernels.router_scores_bytes(rows, ffn), &params)?;
            }
        }
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
        let index = b.index;
        let (up_bias, out) = (l.up_bias, b.y);
        let mut act = ActivateParams { up_bias, index, out, rows, n, valid: kept, ..Default::default() };
        let both = self.product_activated(s, (b.h, l.first, d), &act)?;
        let made = !both && s.kernels.makes_input(rows);
        if !both {
            let (launch, splits) = s.kernels.linear_up(rows, n, d);
            let (x, w, out) = (b.h, l.first, b.sums);
            let up = LinearParams { x, w, index, out, rows, n, k: d, splits, ..Default::default() };
            self.go(s, &launch, &up)?;
            act.input = up.sums();
            if !made {
                self.go(s, &s.kernels.activate(rows, n), &act)?;
            }
        }
        let sum = if made {
            let (launch, splits) = s.kernels.mlp_down(d, n);
            let (up, w, out) = (act.input, l.down.weight, b.delta);
            let down = DownParams { up, up_bias, w, index, out, rows, n: d, k: n, valid: kept, splits };
            self.go(s, &launch, &down)?;
            Partial { data: out, splits, columns: d }
        } else {
            self.product_transposed(s, (b.y, l.down.weight, index), (rows, d, n), b.delta)?
        };
        s.pending = Pending { sum, bias: l.down.bias };
        Ok(true)
    }
}
