//! A layer's q, k and v, and the choice of its heads, whose router's product goes with theirs.

use super::cut::WideCut;
use super::device::{Device, bytes_of};
use super::heads::Units;
use super::launch::{Launch, SKINNY_ROWS};
use super::params::*;
use super::routers::{CudaRouters, LayerRouters};
use super::scratch::CudaScratch;
use super::weights::CudaWeights;
use super::{Cuda, CudaKv};
use crate::backend::Step;
use crate::error::Result;
use crate::model::Position;
use crate::sparsity::Site;

/// An attention router's logits.
pub(super) struct UnitLogits {
    sums: Partial,
    /// Of one of its parts.
    rows: u32,
    /// A row has one unit's logits of all sequences, not one sequence's of all units.
    by_unit: bool,
}

impl UnitLogits {
    /// A row of all units for each sequence.
    pub(super) fn by_sequence(sums: Partial, rows: u32) -> UnitLogits {
        UnitLogits { sums, rows, by_unit: false }
    }
}

/// How far the choice of a layer's heads is when its projection is under way.
enum Heads {
    /// There is none, or not by its router.
    Open,
    /// The kernel behind the product selects.
    Scored(SelectParams),
    /// In the product, which left out q of the others.
    Chosen,
}

/// What comes of a layer's products.
struct Projected {
    qkv: Partial,
    heads: Heads,
    /// Sums of the MLP router's first product, and rows of one of their parts.
    z: Option<(Partial, u32)>,
}

/// The column where the sums of the MLP router's first product begin, behind `columns` of the same product.
pub(super) fn z_column(columns: u32, from_bytes: bool) -> u32 {
    columns.next_multiple_of(if from_bytes { WideCut::COLUMNS } else { 1 })
}

impl<D: Device> Cuda<D> {
    pub(super) fn run_project(
        &self,
        w: &CudaWeights<D>,
        r: Option<&CudaRouters<D>>,
        kv: &CudaKv<D>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
    ) -> Result<()> {
        let (l, rows) = (&w.layers[layer], s.tables.rows().all);
        let b = s.buffers;
        self.norm(w, s, l.attn_norm, (b.h, Ptr::NULL, rows), false)?;
        let of_layer = r.and_then(|r| r.layers.get(layer));
        let router = of_layer.filter(|l| {
            let sparse = s.tables.rows().decode > 0 && step.plan.attn_sparse(layer);
            l.attn_rows > 0 && sparse && step.plan.needs_router(Site::Attn)
        });
        let routing = self.routing(of_layer, s, step, layer);
        let (along, apart) = (routing.filter(|r| r.along), routing.filter(|r| !r.along));
        s.scored = along;
        s.list_is_beside = apart.is_some();
        let sums = apart.map(|r| self.route_apart(s, &r)).transpose()?;
        // Where the attention router's product is on the side too, it goes first.
        let first = router.is_none() || s.kernels.carries_router(rows, s.shape.qkv() as u32);
        let choose = |now: bool| match apart.zip(sums) {
            Some((routing, sums)) if now => self.choose_beside(s, step, &routing, sums),
            _ => Ok(()),
        };
        choose(first)?;
        let Projected { qkv, heads, z } =
            self.project_qkv(s, layer, l.qkv.weight, router, along.map(|r| r.router).as_ref())?;
        choose(!first)?;
        let narrow = s.scored.zip(z).map(|(routing, z)| self.narrowing(s, &routing, z));
        let selects = !matches!(heads, Heads::Open);
        if selects {
            s.heads_selected = Some(layer);
        }
        s.heads_chosen = matches!(heads, Heads::Chosen);
        s.heads_left_out =
            selects && s.kernels.leaves_out((rows, s.tables.rows().decode), Units::of(&s.shape));
        let select = if let Heads::Scored(select) = heads { select } else { SelectParams::default() };
        let shape = &s.shape;
        let params = QkvParams {
            qkv,
            bias: l.qkv.bias,
            q_norm: l.q_norm,
            k_norm: l.k_norm,
            rotation: if matches!(w.spec.position, Position::Rope { .. }) { b.rotation } else { Ptr::NULL },
            positions: s.tables.positions(),
            kv_slot: s.tables.kv_slot(),
            q: b.q,
            kv: kv.layer(layer),
            rows,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.hd as u32,
            norm_dim: shape.head_dim as u32,
            epsilon: w.spec.norm_eps,
            select,
            narrow: narrow.unwrap_or_default(),
            arrived: if s.heads_chosen { b.arrived } else { Ptr::NULL },
        };
        let heads = (shape.heads + 2 * shape.kv_heads) as u32;
        let launch = if s.heads_chosen {
            s.kernels.qkv_chosen(heads)
        } else {
            s.kernels.qkv((rows, heads, qkv.splits), select.units * select.per_unit, narrow.is_some())
        };
        self.go(s, &launch, &params)
    }

    /// Sums of q, k and v, the logits of the attention router `router` or its choice by them, and sums of the MLP router `along`.
    ///
    /// Where the product is our own, the routers' rows go with it and hardly show. Where it may be the device's library's,
    /// theirs is a product of its own, on the side: the kernel that follows starts in order there, join or not. (Heads selected
    /// there too, behind it, were tried: on an H200 steps of 64 and 128 sequences got 1 to 3 % slower.) With many sequences it
    /// is turned round.
    fn project_qkv(
        &self,
        s: &CudaScratch<D>,
        layer: usize,
        w: Ptr,
        router: Option<&LayerRouters>,
        along: Option<&LayerRouters>,
    ) -> Result<Projected> {
        let (b, k, first) = (s.buffers, s.shape.hidden as u32, s.shape.qkv() as u32);
        let (rows, sequences) = (s.tables.rows().all, s.tables.rows().decode);
        let whole = (rows, first, k);
        // Rows of the routers' one matrix, and those of the attention router among them.
        let units = router.map_or(0, |r| r.attn_room() as u32);
        let rank = along.map_or(0, |r| r.rank as u32);
        // The MLP router's may come from bytes, then in whole blocks of their own: where they begin, behind so many columns.
        let bytes = along.filter(|_| s.kernels.takes_bytes(sequences)).map(|r| r.down_bytes);
        let z_at = |first: u32| z_column(first + units, bytes.is_some());
        let with_bytes = |product, first: u32| match bytes {
            Some(bytes) => s.kernels.from_bytes(product, bytes, (z_at(first), first + units)),
            None => product,
        };
        let Some(matrix) = router.map(|r| r.attn.weight).or(along.map(|r| r.down)) else {
            let qkv = self.product(s, (b.h, w), whole, b.sums)?;
            return Ok(Projected { qkv, heads: Heads::Open, z: None });
        };
        let select = |logits: UnitLogits| {
            router.map(|r| self.selection(s, layer, logits, (r.attn.bias, r.attn_rows as u32)))
        };
        let scored = |logits: UnitLogits| select(logits).map_or(Heads::Open, Heads::Scored);
        let z = |sums: Partial, rows: u32, first: u32| {
            let data = sums.data.offset(4 * u64::from(z_at(first)));
            along.map(|_| (Partial { data, ..sums }, rows))
        };
        if along.is_none()
            && let Some(select) = select(UnitLogits::by_sequence(Partial::default(), rows))
            && let Some((launch, params)) =
                s.kernels.choosing((b.h, w, matrix, b.sums), whole, &select, b.arrived)
        {
            self.go(s, &launch, &params)?;
            return Ok(Projected { qkv: params.product.sums(), heads: Heads::Chosen, z: None });
        }
        if s.kernels.carries_router(rows, first) {
            let product = s.kernels.product((b.h, w), (rows, z_at(first) + rank, k), b.sums);
            let (launch, both) = with_bytes(product, first);
            self.go(s, &launch, &LinearParams { more: matrix, first, ..both })?;
            let qkv = both.sums();
            let sums = Partial { data: b.sums.offset(4 * u64::from(first)), ..qkv };
            let heads = scored(UnitLogits::by_sequence(sums, rows));
            return Ok(Projected { qkv, heads, z: z(qkv, rows, first) });
        }
        let of = (b.h, matrix);
        let n = router.map_or(0, |r| r.attn_rows as u32);
        if sequences > SKINNY_ROWS && n > SKINNY_ROWS {
            let sums = self.product(s, of, (sequences, n, k), b.unit_sums)?;
            let qkv = self.product(s, (b.h, w), whole, b.sums)?;
            return Ok(Projected { qkv, heads: scored(UnitLogits::by_sequence(sums, sequences)), z: None });
        }
        let ((launch, small), logits, z) = if sequences > SKINNY_ROWS {
            let small = s.kernels.product_turned(of, (sequences, n, k), b.unit_sums);
            let logits = UnitLogits { sums: small.1.sums(), rows: n, by_unit: true };
            (small, logits, None)
        } else {
            let small = s.kernels.product_beside(of, (sequences, z_at(0) + rank, k), b.unit_sums);
            let small = with_bytes(small, 0);
            let sums = small.1.sums();
            (small, UnitLogits::by_sequence(sums, sequences), z(sums, sequences, 0))
        };
        let qkv = self.beside_qkv(s, (&launch, &small), (b.h, w), whole)?;
        Ok(Projected { qkv, heads: scored(logits), z })
    }

    /// The product of q, k and v with a small one beside it.
    fn beside_qkv(
        &self,
        s: &CudaScratch<D>,
        (launch, small): (&Launch, &LinearParams),
        of: (Ptr, Ptr),
        size: (u32, u32, u32),
    ) -> Result<Partial> {
        let own = s.kernels.product(of, size, s.buffers.sums);
        if s.kernels.tuning.beside
            && let Some(qkv) = self.by_library(s, &own, false, Some((launch, bytes_of(small))))?
        {
            return Ok(qkv);
        }
        self.fork(s)?;
        self.go_beside(launch, small)?;
        self.go(s, &own.0, &own.1)?;
        self.device.join_early()?;
        Ok(own.1.sums())
    }

    /// What to select the heads of a layer by.
    pub(super) fn selection(
        &self,
        s: &CudaScratch<D>,
        layer: usize,
        logits: UnitLogits,
        (bias, columns): (Ptr, u32),
    ) -> SelectParams {
        let (Units { count: units, width: unit_width }, b) = (Units::of(&s.shape), s.buffers);
        SelectParams {
            logits: logits.sums,
            bias,
            keep: s.tables.plan(s.tables.layer_plan[layer]).0,
            selected: b.selected,
            attention: b.attention,
            nan_count: s.sampling.nan_count(),
            rows: logits.rows,
            sequences: s.tables.rows().decode,
            units,
            per_unit: columns / units,
            unit_width,
            by_unit: logits.by_unit.into(),
        }
    }
}
