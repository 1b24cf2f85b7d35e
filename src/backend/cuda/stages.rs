//! What each stage launches. No product has an epilogue: it leaves sums, and the kernel that comes
//! next adds them, with bias and activation.

use super::device::{Device, Product, start};
use super::heads::Units;
use super::launch::{LIBRARY_COLUMNS, LIBRARY_ROWS, Launch};
use super::params::*;
use super::projection::UnitLogits;
use super::scratch::{CudaScratch, Mode, Pending};
use super::weights::{CudaWeights, Pair};
use super::{Cuda, CudaKv};
use crate::backend::{Live, Step};
use crate::error::{Error, Result, try_vec};
use crate::model::{Activation, Norm};
use crate::sparsity::select::random_score;
use crate::sparsity::{Site, Source};

impl<D: Device> Cuda<D> {
    pub(super) fn go<P: Params>(&self, s: &CudaScratch<D>, launch: &Launch, params: &P) -> Result<()> {
        debug_assert!(!matches!(s.mode, Mode::Replay(_)), "a program has this stage");
        if launch.grid.0 == 0 {
            return Ok(());
        }
        start(&*self.device, launch, params)
    }

    /// Hands a product of many rows to the device's library, if it has one, with what goes beside it: sums in one part.
    pub(super) fn by_library(
        &self,
        s: &CudaScratch<D>,
        (own, params): &(Launch, LinearParams),
        transposed: bool,
        beside: Option<(&Launch, &[u8])>,
    ) -> Result<Option<Partial>> {
        let many = params.rows > LIBRARY_ROWS || params.n >= LIBRARY_COLUMNS || transposed;
        if !many || params.index != Ptr::NULL {
            return Ok(None);
        }
        let dtype = s.shape.dtype;
        let taken = self.device.product(&Product { params, transposed, dtype, own: Some(own), beside })?;
        Ok(taken.then(|| Partial { splits: 1, ..params.sums() }))
    }

    /// A product, by the device's library or by our own kernel.
    fn multiply(
        &self,
        s: &CudaScratch<D>,
        own: &(Launch, LinearParams),
        transposed: bool,
    ) -> Result<Partial> {
        if let Some(sums) = self.by_library(s, own, transposed, None)? {
            return Ok(sums);
        }
        self.go(s, &own.0, &own.1)?;
        Ok(own.1.sums())
    }

    /// `x` times a matrix stored `[n, k]`, sums to `out`.
    pub(super) fn product(
        &self,
        s: &CudaScratch<D>,
        of: (Ptr, Ptr),
        size: (u32, u32, u32),
        out: Ptr,
    ) -> Result<Partial> {
        self.multiply(s, &s.kernels.product(of, size, out), false)
    }

    /// The same for a matrix stored `[k, n]`; `index`: for these of its rows only.
    pub(super) fn product_transposed(
        &self,
        s: &CudaScratch<D>,
        of: (Ptr, Ptr, Ptr),
        size: (u32, u32, u32),
        out: Ptr,
    ) -> Result<Partial> {
        self.multiply(s, &s.kernels.product_transposed(of, size, out), true)
    }

    /// [`Kernels::product_activated`](super::launch::Kernels::product_activated) where it serves; whether it does.
    pub(super) fn product_activated(
        &self,
        s: &CudaScratch<D>,
        of: (Ptr, Ptr, u32),
        act: &ActivateParams,
    ) -> Result<bool> {
        let Some((launch, params)) = s.kernels.product_activated(of, act) else { return Ok(false) };
        self.go(s, &launch, &params)?;
        Ok(true)
    }

    /// Adds the pending sums to the residual stream and norms it; `late`: what attention left is used by kernels that
    /// read it before they wait for this one.
    pub(super) fn norm(
        &self,
        w: &CudaWeights<D>,
        s: &mut CudaScratch<D>,
        weights: Pair,
        (out, map, rows): (Ptr, Ptr, u32),
        late: bool,
    ) -> Result<()> {
        let pending = std::mem::take(&mut s.pending);
        let params = NormParams {
            residual: s.buffers.residual,
            delta: pending.sum,
            delta_bias: pending.bias,
            weight: weights.weight,
            bias: if w.spec.norm == Norm::Layer { weights.bias } else { Ptr::NULL },
            out,
            row_map: map,
            rows: s.tables.rows().all,
            hidden: s.shape.hidden as u32,
            epsilon: w.spec.norm_eps,
            late: late.into(),
        };
        self.go(s, &s.kernels.norm(rows, s.shape.hidden as u32), &params)
    }

    pub(super) fn run_embed(&self, w: &CudaWeights<D>, s: &mut CudaScratch<D>) -> Result<()> {
        s.pending = Pending::default();
        let params = EmbedParams {
            tokens: s.tables.tokens(),
            positions: s.tables.positions(),
            table: w.shared.embed,
            position_table: w.shared.positions,
            residual: s.buffers.residual,
            hidden: s.shape.hidden as u32,
            position_offset: s.shape.position_offset,
        };
        self.go(s, &s.kernels.embed(s.tables.rows().all), &params)
    }

    /// Both routers' work went with the projection.
    pub(super) fn run_route(&self, s: &CudaScratch<D>, layer: usize, site: Site) -> Result<()> {
        if s.selected(site) == Some(layer) {
            return Ok(());
        }
        Err(Error::invalid(format!("layer {layer} has no {site:?} router")))
    }

    pub(super) fn run_select(
        &self,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
        site: Site,
    ) -> Result<()> {
        if s.selected(site) == Some(layer) {
            return Ok(());
        }
        if site == Site::Mlp {
            return Err(Error::invalid(format!("layer {layer}: no MLP router scores")));
        }
        let (rows, units, b) = (s.tables.rows().decode, s.shape.kv_heads as u32, s.buffers);
        let seed = match step.plan.source {
            Source::Router => return Err(Error::invalid(format!("layer {layer}: no {site:?} router sums"))),
            Source::Oracle => return Err(Error::unsupported("selection by oracle on a CUDA device")),
            Source::Random { seed } => seed,
        };
        self.random_scores(s, step, layer, seed)?;
        let sums = Partial { data: b.scores, splits: 1, columns: units };
        let params = self.selection(s, layer, UnitLogits::by_sequence(sums, rows), (Ptr::NULL, units));
        self.go(s, &s.kernels.select_heads(rows, units), &params)
    }

    /// Scores of [`Source::Random`], made on the host.
    fn random_scores(&self, s: &CudaScratch<D>, step: &Step, layer: usize, seed: u64) -> Result<()> {
        let units = s.shape.kv_heads;
        let mut bytes = try_vec(4 * units * step.n_decode(), 0u8, "random scores")?;
        for (i, out) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let row = i / units;
            *out = random_score(seed, layer, step.positions[row], step.tokens[row], i % units).to_le_bytes();
        }
        self.device.copy_in(s.buffers.scores, &bytes)
    }

    pub(super) fn run_attend(
        &self,
        w: &CudaWeights<D>,
        kv: &CudaKv<D>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()> {
        let (l, b) = (&w.layers[layer], s.buffers);
        let (heads, kv_heads) = (s.shape.heads as u32, s.shape.kv_heads as u32);
        let scale = w.spec.attention_scale() * std::f32::consts::LOG2_E;
        let sequences = s.tables.rows().decode;
        if sequences > 0 {
            let selected = live == Live::Selected;
            let plan = if selected { s.tables.layer_plan[layer] } else { 0 };
            let (keep, prefix) = s.tables.plan(plan);
            let scored = s.scored.take();
            let mut params = DecodeParams {
                q: b.q,
                kv: kv.layer(layer),
                pages: s.tables.pages(),
                first_page: s.tables.first_page(),
                tokens: s.tables.context(),
                skip: s.tables.skip(),
                selected: if selected { b.selected } else { Ptr::NULL },
                keep,
                prefix,
                out: b.attention,
                lse: Ptr::NULL,
                parts: b.parts,
                counters: b.counters,
                page_stride: s.shape.layer_page_bytes(),
                head_stride: s.shape.layer_page_bytes() / s.shape.kv_heads as u64,
                q_stride: s.shape.q() as u64,
                sequences,
                heads,
                kv_heads,
                stages: s.kernels.stages,
                segment_cost: SEGMENT_COST,
                early: if s.heads_chosen { EARLY_PAGES | EARLY_SELECTED } else { EARLY_PAGES },
                scale,
                late: (s.heads_left_out && !s.heads_chosen).into(),
                ..Default::default()
            };
            let worker = s.tables.workers[usize::from(plan)];
            if let Some(routing) = scored {
                let chooses = routing.shared_only() && s.kernels.chooses(s.shape.ffn as u32, worker);
                let launch =
                    s.kernels.decode_scored(sequences, worker, chooses.then_some(s.shape.ffn as u32));
                let (launch, stages) =
                    launch.ok_or_else(|| Error::invalid("decode attention takes no scores along"))?;
                params.stages = stages;
                params.router = self.scoring(s, &routing, 0);
                if chooses {
                    params.router.arrived = b.arrived;
                    params.choice = self.choice(s, step, &routing);
                }
                self.go(s, &launch, &params)?;
                s.list_is_late = chooses;
                s.list_is_beside = !chooses;
                if !chooses {
                    self.fork(s)?;
                    self.select_neurons(s, step, &routing)?;
                }
            } else {
                let beside = s.neurons_selected == Some(layer);
                self.go(s, &s.kernels.decode(sequences, worker, beside), &params)?;
            }
        }
        if s.tables.n_tiles > 0 {
            let params = PrefillParams {
                q: b.q,
                kv: kv.layer(layer),
                pages: s.tables.pages(),
                tiles: s.tables.tiles(),
                out: b.attention,
                heads,
                kv_heads,
                window: w.spec.window.unwrap_or(NONE),
                scale,
            };
            self.go(s, &s.kernels.prefill(s.tables.tile_size, s.tables.n_tiles, kv_heads), &params)?;
        }
        s.pending = Pending { sum: self.project_out(s, l.o.weight, layer)?, bias: l.o.bias };
        Ok(())
    }

    /// The output projection.
    fn project_out(&self, s: &mut CudaScratch<D>, w: Ptr, layer: usize) -> Result<Partial> {
        let (rows, b) = (s.tables.rows().all, s.buffers);
        let (n, k) = (s.shape.hidden as u32, s.shape.q() as u32);
        if s.heads_left_out {
            let units = Units::of(&s.shape);
            let keep = s.tables.plan(s.tables.layer_plan[layer]).0;
            let (launch, params) =
                s.kernels.chosen((b.attention, w, b.delta), (rows, n), units, (b.selected, keep));
            self.go(s, &launch, &params)?;
            return Ok(params.product.sums());
        }
        let mut own = s.kernels.product((b.attention, w), (rows, n, k), b.delta);
        if s.list_is_late {
            own.1.late = LATE_SUCCESSOR;
        }
        if let Some(sum) = self.by_library(s, &own, false, None)? {
            return Ok(sum);
        }
        self.go(s, &own.0, &own.1)?;
        s.list_is_late = false;
        Ok(own.1.sums())
    }

    pub(super) fn run_mlp(
        &self,
        w: &CudaWeights<D>,
        s: &mut CudaScratch<D>,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()> {
        let (l, rows, b) = (&w.layers[layer], s.tables.rows().all, s.buffers);
        self.device.join_early()?;
        let late = std::mem::take(&mut s.list_is_late) | std::mem::take(&mut s.list_is_beside);
        self.norm(w, s, l.mlp_norm, (b.h, Ptr::NULL, rows), late)?;
        if live == Live::Selected && self.selected_mlp(w, s, step, layer)? {
            return Ok(());
        }
        let (d, neurons) = (s.shape.hidden as u32, s.shape.neurons as u32);
        let mut act = ActivateParams {
            gate_bias: l.gate_bias,
            up_bias: l.up_bias,
            out: b.y,
            rows,
            n: neurons,
            valid: s.shape.ffn as u32,
            kind: match w.spec.activation {
                Activation::Relu => 0,
                Activation::SiluGated => 1,
                Activation::ReluGated => 2,
            },
            ..Default::default()
        };
        if live == Live::Selected
            && let Some(which) = s.tables.layer_groups(step, layer)
        {
            act.masks = b.masks;
            act.group = s.tables.groups(which);
        }
        if !self.product_activated(s, (b.h, l.first, d), &act)? {
            let width = s.shape.first() as u32;
            act.input = self.product(s, (b.h, l.first), (rows, width, d), b.sums)?;
            self.go(s, &s.kernels.activate(rows, neurons), &act)?;
        }
        let size = (rows, d, neurons);
        let sum = if s.shape.gated {
            self.product(s, (b.y, l.down.weight), size, b.delta)?
        } else {
            self.product_transposed(s, (b.y, l.down.weight, Ptr::NULL), size, b.delta)?
        };
        s.pending = Pending { sum, bias: l.down.bias };
        Ok(())
    }

    pub(super) fn run_logits(&self, w: &CudaWeights<D>, s: &mut CudaScratch<D>) -> Result<()> {
        let (n, b) = (s.tables.rows().logits, s.buffers);
        if n > 0 {
            self.norm(w, s, w.shared.final_norm, (b.last, s.tables.logit_rows(), n), false)?;
            let (vocab, d) = (s.shape.vocab as u32, s.shape.hidden as u32);
            self.multiply(
                s,
                &s.kernels.product_in_parts(1, (b.last, w.shared.head), (n, vocab, d), b.logits),
                false,
            )?;
            let (launch, params) = s.sampling.likeliest(b.logits, n);
            self.go(s, &launch, &params)?;
        }
        s.pending = Pending::default();
        Ok(())
    }
}
