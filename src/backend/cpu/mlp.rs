//! Stages `route`, `select` and `mlp`.

use super::attention::{norm_rows, site_name};
use super::load::{CpuRouters, CpuWeights, Layer, Linear};
use super::product::{Act, Cx, Into, MAX_BLOCK, ROW_BLOCK, add, block, product};
use super::scratch::{CpuScratch, Local, Selection};
use super::simd::{self, Acts, Pick, dots, outer};
use crate::backend::{Live, Step};
use crate::error::{Error, Result};
use crate::model::Activation;
use crate::sparsity::router::AttnUnit;
use crate::sparsity::select::{group_score, random_score};
use crate::sparsity::{MlpMode, Rule, Site, Source};
use crate::sys::ahead::Ahead;
use crate::sys::split::{Block, Grid};
use std::ops::Range;

/// Router logits of the decode rows.
pub(super) fn route(
    cx: Cx<'_>,
    r: &CpuRouters,
    s: &mut CpuScratch,
    step: &Step,
    layer: usize,
    site: Site,
) -> Result<()> {
    let missing = || Error::invalid(format!("layer {layer} has no {} router", site_name(site)));
    let routers = r.layers.get(layer).ok_or_else(missing)?;
    let CpuScratch { locals, h, hidden_stride, select, .. } = s;
    match site {
        Site::Attn => {
            let (unit, linear) = routers.attn.as_ref().ok_or_else(missing)?;
            let rows = Pick::Range(0, step.n_decode());
            let to = (&mut select.attn_logits[..], select.attn_width);
            product(cx, locals, (Acts::F32(h), *hidden_stride), rows, linear.parts(), Into::Store, to);
            select.attn_layer = Some((layer, *unit));
        }
        Site::Mlp => {
            let (down, up) = routers.mlp.as_ref().ok_or_else(missing)?;
            list_routed(select, step, layer);
            let rows = Pick::List(&select.routed);
            let n = rows.len();
            let (x, width) = ((Acts::F32(h), *hidden_stride), select.low_stride);
            product(cx.before(&[up]), locals, x, rows, (down, None), Into::Store, (&mut select.low, width));
            let (low, rows) = ((Acts::F32(&select.low), width), Pick::Range(0, n));
            let to = (&mut select.mlp_logits[..], up.rows);
            product(cx, locals, low, rows, (up, None), Into::Store, to);
            select.mlp_layer = Some((layer, up.rows));
        }
    }
    Ok(())
}

/// Decode rows whose MLP is sparse in this layer: reference rows, then invariant rows.
fn list_routed(select: &mut Selection, step: &Step, layer: usize) {
    let rule = step.plan.mlp_rule(layer);
    select.routed.clear();
    for mode in [MlpMode::Reference, MlpMode::Invariant] {
        if rule.of(mode) != Rule::Dense {
            let decode = step.seqs.iter().take_while(|s| s.decode);
            select.routed.extend(decode.filter(|s| s.mlp == mode).map(|s| s.first_row));
        }
        if mode == MlpMode::Reference {
            select.n_reference = select.routed.len();
        }
    }
}

/// Lists of units to compute.
pub(super) fn select(s: &mut CpuScratch, step: &Step, layer: usize, site: Site) -> Result<()> {
    let unrouted = || Error::invalid(format!("layer {layer}: no {} router logits", site_name(site)));
    match site {
        Site::Attn => {
            let unit = match (step.plan.source, s.select.attn_layer) {
                (Source::Router, Some((l, unit))) if l == layer => Some(unit),
                (Source::Router, _) => return Err(unrouted()),
                // The oracle selects inside `attend`, from what it computed.
                (Source::Oracle, _) => return Ok(()),
                (Source::Random { .. }, _) => None,
            };
            select_heads(s, step, layer, unit);
        }
        Site::Mlp => {
            let CpuScratch { select, nan_scores, .. } = s;
            let Some((_, ffn)) = select.mlp_layer.filter(|l| l.0 == layer) else { return Err(unrouted()) };
            let rule = step.plan.mlp_rule(layer);
            let logits = |i: usize| &select.mlp_logits[i * ffn..(i + 1) * ffn];
            if let Rule::TopK(k) = rule.reference
                && select.n_reference > 0
            {
                let rows = (0..select.n_reference).map(logits);
                *nan_scores += select.selector.top_k_of_batch(rows, ffn, k as usize, &mut select.reference);
            }
            if let Rule::TopK(k) = rule.invariant {
                for i in select.n_reference..select.routed.len() {
                    // The reference rule for a batch of one.
                    let row = std::iter::once(&select.mlp_logits[i * ffn..(i + 1) * ffn]);
                    let list = &mut select.invariant[i - select.n_reference];
                    *nan_scores += select.selector.top_k_of_batch(row, ffn, k as usize, list);
                }
            }
        }
    }
    Ok(())
}

fn select_heads(s: &mut CpuScratch, step: &Step, layer: usize, unit: Option<AttnUnit>) {
    let CpuScratch { select, nan_scores, .. } = s;
    let (heads, group) = (select.kv_heads, select.group);
    for row in 0..step.n_decode() {
        let k = step.plan.attn_k(layer, row) as usize;
        let live = &mut select.live[row * heads..(row + 1) * heads];
        live.fill(k >= heads);
        if k >= heads {
            continue;
        }
        let logits = &select.attn_logits[row * select.attn_width..];
        let scores = &mut select.unit_scores[..heads];
        match (unit, step.plan.source) {
            (Some(AttnUnit::KvHead), _) => scores.copy_from_slice(&logits[..heads]),
            (Some(AttnUnit::Head), _) => {
                for (h, score) in scores.iter_mut().enumerate() {
                    *score = group_score(&logits[h * group..(h + 1) * group]);
                }
            }
            (None, source) => {
                let seed = if let Source::Random { seed } = source { seed } else { 0 };
                for (h, score) in scores.iter_mut().enumerate() {
                    *score = random_score(seed, layer, step.positions[row], step.tokens[row], h);
                }
            }
        }
        *nan_scores += select.selector.top_k(scores, k, &mut select.chosen);
        for &h in &select.chosen {
            live[h as usize] = true;
        }
    }
}

/// MLP norm, MLP, residual.
pub(super) fn mlp(cx: Cx<'_>, w: &CpuWeights, s: &mut CpuScratch, step: &Step, layer: usize, live: Live) {
    let n = step.tokens.len();
    let lw = &w.layers[layer];
    let next = w.layers.get(layer + 1).map_or(w.head.as_ref().unwrap_or(&w.embed), |l| &l.qkv.mat);
    let cx = cx.before(&[next]);
    norm_rows(cx, &w.spec, &lw.mlp_norm, (&s.x, s.hidden_stride), n, (&mut s.h, &mut s.h_acts));
    if w.spec.activation.gated() {
        gated(cx, w.spec.activation, lw, s, n);
        count(w, s, step, |_| None);
        return;
    }
    group_rows(s, step, live);
    relu(cx, lw, s, n);
    let selected = live == Live::Selected;
    let (routed, n_reference) = (std::mem::take(&mut s.select.routed), s.select.n_reference);
    let (reference, invariant) = (s.select.reference.len(), s.select.invariant.first().map_or(0, Vec::len));
    count(w, s, step, |row| {
        let i = routed.iter().position(|&r| r == row).filter(|_| selected)?;
        Some(if i < n_reference { reference } else { invariant })
    });
    s.select.routed = routed;
}

/// Adds what ran in decode rows; `of` tells how many neurons a sparse row ran.
fn count(w: &CpuWeights, s: &mut CpuScratch, step: &Step, of: impl Fn(u32) -> Option<usize>) {
    let ffn = w.spec.ffn_size as usize;
    for (i, seq) in step.seqs.iter().enumerate().take_while(|(_, s)| s.decode) {
        s.counts[i].mlp_run += of(seq.first_row).unwrap_or(ffn) as u64;
        s.counts[i].mlp_total += ffn as u64;
    }
}

/// `down(act(gate(h)) * up(h))`, every neuron.
fn gated(cx: Cx<'_>, activation: Activation, lw: &Layer, s: &mut CpuScratch, n: usize) {
    let CpuScratch { locals, h, h_acts, hidden_stride, z, x, .. } = s;
    let Some(gate) = lw.gate.as_ref() else { return };
    let from = CpuScratch::normed(h, h_acts, *hidden_stride);
    let job = Gated { cx, activation, gate, up: &lw.up, from, n };
    let size = block(cx, gate.mat.rows, 2 * gate.mat.row_bytes());
    let (stride, width) = (z.stride, gate.mat.rows);
    if z.is_bf16() {
        let out = Grid::columns(&mut z.bf16[..n * stride], stride, width, size);
        cx.pool.split(out, locals, cx.before(&[&lw.down.mat]).ahead, |l, b, _| job.block(l, b));
    } else {
        let out = Grid::columns(&mut z.f32[..n * stride], stride, width, size);
        cx.pool.split(out, locals, cx.before(&[&lw.down.mat]).ahead, |l, b, _| job.block(l, b));
    }
    let rows = Pick::Range(0, n);
    product(cx, locals, z.acts(), rows, lw.down.parts(), Into::Add, (x, *hidden_stride));
}

/// Gate and up projection of a gated MLP, and its activation.
struct Gated<'a> {
    cx: Cx<'a>,
    activation: Activation,
    gate: &'a Linear,
    up: &'a Linear,
    from: (Acts<'a>, usize),
    n: usize,
}

impl Gated<'_> {
    fn block<T: Act>(&self, local: &mut Local, mut out: Block<'_, T>) {
        let part = out.columns();
        for first in (0..self.n).step_by(ROW_BLOCK) {
            let rows = Pick::Range(first, ROW_BLOCK.min(self.n - first));
            let size = rows.len() * part.len();
            let (g, u) = (&mut local.tile[..size], &mut local.tile2[..size]);
            self.half(self.gate, rows, &part, g, &mut local.spill);
            self.half(self.up, rows, &part, u, &mut local.spill);
            match self.activation {
                Activation::ReluGated => simd::relu_mul(g, u),
                _ => simd::silu_mul(self.cx.isa, g, u),
            }
            for (r, values) in g.chunks_exact(part.len()).enumerate() {
                T::put(self.cx.isa, values, out.row(first + r));
            }
        }
    }

    fn half(
        &self,
        linear: &Linear,
        rows: Pick<'_>,
        part: &Range<usize>,
        tile: &mut [f32],
        spill: &mut [f32],
    ) {
        let (mat, bias) = linear.parts();
        let outs = Pick::Range(part.start, part.len());
        dots(
            self.cx.isa,
            self.from,
            rows,
            (mat.view(), mat.stride),
            outs,
            mat.stride,
            (tile, part.len()),
            spill,
        );
        if let Some(bias) = bias {
            tile.chunks_exact_mut(part.len()).for_each(|t| add(t, &bias[part.clone()]));
        }
    }
}

/// Lists the rows that run every neuron; without a selection, all of them.
fn group_rows(s: &mut CpuScratch, step: &Step, live: Live) {
    let select = &mut s.select;
    if live == Live::All {
        select.routed.clear();
        select.n_reference = 0;
    }
    select.dense.clear();
    let routed = &select.routed;
    select.dense.extend((0..step.tokens.len() as u32).filter(|r| !routed.contains(r)));
}

/// Rows that run the same neurons.
#[derive(Clone, Copy)]
struct Group<'a> {
    rows: Pick<'a>,
    /// `None`: all.
    list: Option<&'a [u32]>,
}

impl<'a> Group<'a> {
    /// Its neurons in `first..end`.
    fn within(&self, first: usize, end: usize) -> Pick<'a> {
        match self.list {
            None => Pick::Range(first, end - first),
            Some(list) => {
                let from = list.partition_point(|&n| (n as usize) < first);
                let to = list.partition_point(|&n| (n as usize) < end);
                Pick::List(&list[from..to])
            }
        }
    }
}

impl Selection {
    /// Every row of the step, grouped by its neurons.
    fn groups(&self, n: usize) -> impl Iterator<Item = Group<'_>> {
        let (reference, invariant) = self.routed.split_at(self.n_reference);
        let all = self.dense.len() == n;
        let dense = Group { rows: if all { Pick::Range(0, n) } else { Pick::List(&self.dense) }, list: None };
        let shared = Group { rows: Pick::List(reference), list: Some(&self.reference) };
        let own = invariant.chunks(1).zip(&self.invariant);
        let own = own.map(|(row, list)| Group { rows: Pick::List(row), list: Some(list) });
        [dense, shared].into_iter().chain(own).filter(|g| g.rows.len() > 0)
    }
}

/// `down(relu(up(h)))`, each row with its own neurons; a block of weights serves all rows at once.
fn relu(cx: Cx<'_>, lw: &Layer, s: &mut CpuScratch, n: usize) {
    let CpuScratch { locals, h, h_acts, hidden_stride, z, x, y, select, .. } = s;
    let from = CpuScratch::normed(h, h_acts, *hidden_stride);
    let up = Up { cx, lw, from, n, select };
    let size = block(cx, lw.up.mat.rows, lw.up.mat.row_bytes());
    let (stride, ffn) = (z.stride, lw.up.mat.rows);
    if z.is_bf16() {
        let out = Grid::columns(&mut z.bf16[..n * stride], stride, ffn, size);
        cx.pool.split(out, locals, Ahead::NOTHING, |l, b, _| up.block(l, b));
    } else {
        let out = Grid::columns(&mut z.f32[..n * stride], stride, ffn, size);
        cx.pool.split(out, locals, Ahead::NOTHING, |l, b, _| up.block(l, b));
    }
    let (down, bias) = lw.down.parts();
    let stride = *hidden_stride;
    let (columns, neurons) = down_blocks(n, down.stride);
    let y = Grid::columns(&mut y[..n * stride], stride, stride, columns);
    let x = Grid::columns(&mut x[..n * stride], stride, stride, columns);
    let (z, select) = (z.acts(), &*select);
    cx.pool.each((y, x), |(mut y, mut x), _| {
        y.clear();
        // Groups of rows take turns at blocks of neurons, so that weights come from memory once.
        let weights = down.panel(y.columns().start);
        let neurons = if n <= 8 && select.groups(n).nth(1).is_none() { ffn } else { neurons };
        for first in (0..ffn).step_by(neurons) {
            for g in select.groups(n) {
                let some = g.within(first, (first + neurons).min(ffn));
                outer(cx.isa, z, g.rows, (weights, down.stride), some, &mut y);
            }
        }
        let range = x.columns();
        for r in 0..n {
            let (to, sums) = (x.row(r), y.row(r));
            if let Some(bias) = bias {
                let end = range.end.min(bias.len());
                add(sums, &bias[range.start.min(end)..end]);
            }
            add(to, sums);
        }
    });
}

/// Columns per task and neurons per block of the down projection. Few rows read a panel in one go;
/// with many, sums and weights of a block stay in the second-level cache. A task's columns lie in
/// one panel, and blocks of neurons are even, so that no pair is cut.
fn down_blocks(rows: usize, panel: usize) -> (usize, usize) {
    let columns = if rows > 8 && panel.is_multiple_of(64) { panel / 2 } else { panel };
    (columns, if rows <= 8 { 64 } else { 256 })
}

/// The up projection and its activation.
struct Up<'a> {
    cx: Cx<'a>,
    lw: &'a Layer,
    from: (Acts<'a>, usize),
    n: usize,
    select: &'a Selection,
}

impl Up<'_> {
    fn block<T: Act>(&self, local: &mut Local, mut out: Block<'_, T>)
    where
        [T]: Tile,
    {
        let part = out.columns();
        let (mat, bias) = self.lw.up.parts();
        for g in self.select.groups(self.n) {
            let neurons = g.within(part.start, part.end);
            let width = neurons.len();
            if width == 0 {
                continue;
            }
            debug_assert!(width <= MAX_BLOCK);
            for first in (0..g.rows.len()).step_by(ROW_BLOCK) {
                let rows = g.rows.part(first, ROW_BLOCK.min(g.rows.len() - first));
                let tile = &mut local.tile[..rows.len() * width];
                dots(
                    self.cx.isa,
                    self.from,
                    rows,
                    (mat.view(), mat.stride),
                    neurons,
                    mat.stride,
                    (tile, width),
                    &mut local.spill,
                );
                for (r, values) in tile.chunks_exact_mut(width).enumerate() {
                    for (i, v) in values.iter_mut().enumerate() {
                        let b = bias.map_or(0.0, |b| b[neurons.at(i)]);
                        *v = simd::relu(*v + b);
                    }
                    let to = out.row(rows.at(r));
                    match neurons {
                        Pick::Range(..) => T::put(self.cx.isa, values, to),
                        Pick::List(list) => {
                            let converted = <[T]>::of(&mut local.tile16, &mut local.tile2, width);
                            T::put(self.cx.isa, values, converted);
                            for (v, &neuron) in converted.iter().zip(list) {
                                to[neuron as usize - part.start] = *v;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Picks a worker's buffer of the right element.
trait Tile {
    fn of<'a>(b: &'a mut [u16], f: &'a mut [f32], n: usize) -> &'a mut Self;
}

impl Tile for [u16] {
    fn of<'a>(b: &'a mut [u16], _: &'a mut [f32], n: usize) -> &'a mut [u16] {
        &mut b[..n]
    }
}

impl Tile for [f32] {
    fn of<'a>(_: &'a mut [u16], f: &'a mut [f32], n: usize) -> &'a mut [f32] {
        &mut f[..n]
    }
}
