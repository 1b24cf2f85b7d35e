//! The selective MLP: its router, and the two products that read only the chosen neurons' rows.
//!
//! Where decode attention takes the scores along ([`Kernels::takes_scores`](super::launch::Kernels::takes_scores)): the
//! router's first product goes with QKV's, the `qkv` kernel makes bytes of it, the blocks of decode attention multiply
//! these ahead of their pages, and one block more chooses ([`Kernels::chooses`](super::launch::Kernels::chooses)), or
//! a kernel on the side stream. The list is complete when attention ends; what comes next has waited for that, and the
//! norm lets its successor start only then (`NormParams::late`).
//!
//! Elsewhere the router is a chain beside QKV and attention. Main: attention norm, router down, QKV, attention, output
//! projection, MLP norm, up, down. Side: fork after router down; its bytes, scores, selection; join before the MLP norm.
//! Router down is in line because it is small and its blocks would wait for those of QKV, which come early, to end: what
//! depends on it can then take the places that QKV's first blocks leave. The norm waits for the side too, and lets its
//! successor start only then.
//!
//! Either way, what comes after that norm may read the list, and start on weights, before the norm ends. No buffer
//! that the side writes is used by the main stream in between, nor the other way round.

use super::Cuda;
use super::device::{Device, start_beside};
use super::launch::{Launch, MOST_RANK, SKINNY_ROWS};
use super::params::*;
use super::routers::{LayerRouters, PIECE_COLUMNS};
use super::scratch::{CudaScratch, Pending};
use super::tables::Groups;
use super::weights::CudaWeights;
use crate::backend::{Site, Step};
use crate::error::Result;
use crate::sparsity::Rule;
use std::ops::RangeInclusive;

/// Share of neurons above which a layer runs dense. Measured at the shapes of OPT-6.7B (H200): at .517 of the neurons 32
/// rows gain 7 %, at .623 64 rows 3 to 4 %. With more rows the dense products get cheaper per row, and the router is a
/// chain that waits for room beside attention.
pub(super) fn break_even(batch: u32) -> f32 {
    match batch {
        0..=16 => 0.6,
        17..=64 => 0.65,
        _ => 0.2,
    }
}

/// Sequences of a step whose router chain goes ahead of the main stream where both wait for room. With fewer, the chain
/// is short and the QKV product, which it would hold up, is what counts (1: 2 % slower); with more, neurons are
/// not chosen, as a rule. At 8 and 32 on an H200 steps become 1 to 4 % faster.
pub(super) const SIDE_FIRST: RangeInclusive<u32> = 8..=32;

/// How a layer's neurons are chosen.
#[derive(Clone, Copy)]
pub(super) struct Routing {
    layer: usize,
    pub(super) router: LayerRouters,
    /// Groups that choose: which, the first, and how many.
    groups: (Groups, u32, u32),
    /// Decode attention takes the scores along.
    pub(super) along: bool,
}

impl Routing {
    /// Whether only the sequences that share their neurons choose any.
    pub(super) fn shared_only(&self) -> bool {
        self.groups.0 == Groups::Reference
    }
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

    /// How the layer's neurons are to be chosen, if they are by its router.
    pub(super) fn routing(
        &self,
        router: Option<&LayerRouters>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
    ) -> Option<Routing> {
        let routed = step.plan.mlp_sparse(layer) && step.plan.needs_router(Site::Mlp);
        let l = router.filter(|l| routed && l.rank > 0)?;
        s.neurons_selected = Some(layer);
        let groups = Self::choosing(s, step, layer)?;
        let along = s.kernels.takes_scores(s.tables.rows().decode) && l.rank <= MOST_RANK as usize;
        Some(Routing { layer, router: *l, groups, along })
    }

    /// What makes the router's bytes of its first product's sums, which have so many rows a part.
    pub(super) fn narrowing(
        &self,
        s: &CudaScratch<D>,
        routing: &Routing,
        (sums, rows): (Partial, u32),
    ) -> NarrowParams {
        let b = s.buffers;
        NarrowParams {
            sums,
            out: b.z,
            scales: b.z_scales,
            factors: routing.router.down_scales,
            rows,
            sequences: s.tables.rows().decode,
            columns: routing.router.rank as u32,
            pieces: routing.router.up_pieces() as u32,
        }
    }

    /// The router's second product of up to [`SKINNY_ROWS`] rows from `first` on.
    pub(super) fn scoring(&self, s: &CudaScratch<D>, routing: &Routing, first: u32) -> RouterBytesParams {
        let (b, l, (which, first_group, _)) = (s.buffers, &routing.router, routing.groups);
        let (all, pieces) = (s.tables.rows().decode, l.up_pieces() as u32);
        RouterBytesParams {
            z: b.z.offset(u64::from(first) * u64::from(pieces) * PIECE_COLUMNS as u64),
            z_scales: b.z_scales.offset(4 * u64::from(first)),
            w: l.up,
            scales: l.up_scales,
            scores: b.neuron_scores,
            group: s.tables.groups(which).offset(4 * u64::from(first)),
            rows: SKINNY_ROWS.min(all - first),
            n: s.shape.ffn as u32,
            pieces,
            first_group,
            more: u32::from(first > 0),
            ..Default::default()
        }
    }

    /// The router's first product where QKV's does not do it. In line: it is small, and its blocks would wait for those.
    pub(super) fn route_apart(&self, s: &CudaScratch<D>, routing: &Routing) -> Result<Partial> {
        let (b, l) = (s.buffers, &routing.router);
        let size = (s.tables.rows().decode, l.rank as u32, s.shape.hidden as u32);
        let mut product = s.kernels.product((b.h, l.down), size, b.router_sums);
        if s.kernels.takes_bytes(size.0) {
            product = s.kernels.from_bytes(product, l.down_bytes, (0, 0));
        }
        let (launch, params) = product;
        self.go(s, &launch, &params)?;
        Ok(params.sums())
    }

    /// Forks: bytes, scores, lists and masks, where decode attention does not take the scores along. `sums` are those of the
    /// first product.
    pub(super) fn choose_beside(
        &self,
        s: &CudaScratch<D>,
        step: &Step,
        routing: &Routing,
        sums: Partial,
    ) -> Result<()> {
        self.fork(s)?;
        let rows = s.tables.rows().decode;
        self.go_beside(
            &s.kernels.narrow_rows(rows, routing.router.up_pieces() as u32),
            &self.narrowing(s, routing, (sums, rows)),
        )?;
        for first in (0..rows).step_by(SKINNY_ROWS as usize) {
            let params = self.scoring(s, routing, first);
            self.go_beside(&s.kernels.router_scores_bytes(params.rows, params.n), &params)?;
        }
        self.select_neurons(s, step, routing)
    }

    /// Lists and masks from the scores.
    pub(super) fn choice(&self, s: &CudaScratch<D>, step: &Step, routing: &Routing) -> NeuronParams {
        let (b, ffn, (which, first_group, _)) = (s.buffers, s.shape.ffn as u32, routing.groups);
        let keep = |r| if let Rule::TopK(k) = r { k } else { NONE };
        let rule = step.plan.mlp_rule(routing.layer);
        NeuronParams {
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
        }
    }

    /// The same on the side.
    pub(super) fn select_neurons(&self, s: &CudaScratch<D>, step: &Step, routing: &Routing) -> Result<()> {
        let launch = s.kernels.select_neurons(routing.groups.2, s.shape.ffn as u32);
        self.go_beside(&launch, &self.choice(s, step, routing))
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
