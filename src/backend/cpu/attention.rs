//! Stages `project` and `attend`.
//!
//! A unit of attention is (rows of one sequence inside one page, KV head): rows of a unit see the
//! same last page, so each row adds exactly the pages it would add alone, in ascending order.

use super::kv::{CpuKv, KvLayer, write_bf16, write_f16, write_f32};
use super::load::{CpuWeights, Layer, NormWeights};
use super::parts::{Cut, PART_PAGES, State, cuts_of, state_size};
use super::product::{Act, Cx, Into, product};
use super::scratch::{ActBuf, CpuScratch, Local, Unit};
use super::simd::{self, Acts, KvPiece, Pick, Queries, attend_page};
use crate::backend::{Live, PAGE_TOKENS, Step};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{ModelSpec, Norm};
use crate::sparsity::{Site, Source};
use crate::sys::ahead::Ahead;
use crate::sys::alloc::{Buf, Pod};
use crate::sys::pool::Pool;
use crate::sys::split::{Band, Block, Chunks, Grid};
use std::ops::Range;

/// Work below which waking workers costs more than it saves.
const SERIAL_ROWS: usize = 2;

/// Normalises `n` rows of `x` into `h`, and into `acts` where the weights want another form.
pub(super) fn norm_rows(
    cx: Cx<'_>,
    spec: &ModelSpec,
    w: &NormWeights,
    (x, stride): (&[f32], usize),
    n: usize,
    (h, acts): (&mut Buf<f32>, &mut ActBuf),
) {
    let one = |x: &[f32], h: &mut [f32], bf16: &mut [u16]| {
        match spec.norm {
            Norm::Rms => simd::rms_norm(cx.isa, x, &w.weight, spec.norm_eps, h),
            Norm::Layer => simd::layer_norm(cx.isa, x, &w.weight, w.bias.as_deref(), spec.norm_eps, h),
        }
        if !bf16.is_empty() {
            simd::to_bf16(cx.isa, h, bf16);
        }
    };
    let h = &mut h[..n * stride];
    let bf16 = if acts.is_bf16() { &mut acts.bf16[..n * stride] } else { &mut [] };
    let row = |i: usize| &x[i * stride..(i + 1) * stride];
    if n <= SERIAL_ROWS {
        for (i, h) in h.chunks_exact_mut(stride).enumerate() {
            let bf16 = bf16.get_mut(i * stride..(i + 1) * stride).unwrap_or_default();
            one(row(i), h, bf16);
        }
    } else if bf16.is_empty() {
        cx.pool.each(Chunks::new(h, stride), |h, i| one(row(i), h, &mut []));
    } else {
        cx.pool.each((Chunks::new(h, stride), Chunks::new(bf16, stride)), |(h, b), i| one(row(i), h, b));
    }
}

/// Cuts the step's rows into bands: a decode row, or prefill rows within one page.
pub(super) fn plan_units(s: &mut CpuScratch, step: &Step) {
    s.bands.clear();
    s.units.clear();
    for (i, seq) in step.seqs.iter().enumerate() {
        let mut row = seq.first_row;
        let end = seq.first_row + seq.n_rows;
        while row < end {
            let in_page = step.positions[row as usize] as usize % PAGE_TOKENS;
            let rows = ((PAGE_TOKENS - in_page) as u32).min(end - row);
            s.bands.push(Band { first: row, rows });
            s.units.push(Unit { seq: i as u32, decode: seq.decode });
            row += rows;
        }
    }
}

/// Attention norm, products, head norms, rotation, pages.
pub(super) fn project(
    cx: Cx<'_>,
    w: &CpuWeights,
    kv: &mut CpuKv,
    s: &mut CpuScratch,
    step: &Step,
    layer: usize,
) {
    let n = step.tokens.len();
    let lw = &w.layers[layer];
    norm_rows(cx, &w.spec, &lw.attn_norm, (&s.x, s.hidden_stride), n, (&mut s.h, &mut s.h_acts));
    let x = CpuScratch::normed(&s.h, &s.h_acts, s.hidden_stride);
    let rows = Pick::Range(0, n);
    let to_o = cx.before(&[&lw.o.mat]);
    product(to_o, &mut s.locals, x, rows, lw.qkv.parts(), Into::Store, (&mut s.qkv, s.qkv_width));
    let dims = kv.shape.dims;
    let heads = Heads {
        step,
        spec: &w.spec,
        qkv: &s.qkv,
        qkv_width: s.qkv_width,
        cos: &s.cos,
        sin: &s.sin,
        q_norm: lw.q_norm.as_deref(),
        k_norm: lw.k_norm.as_deref(),
        dims,
        q_block: w.spec.group() as usize * dims,
        q_stride: w.spec.num_heads as usize * dims,
    };
    let (pages, piece) = (kv.pages, kv.shape.piece());
    let stride = kv.shape.heads * piece;
    macro_rules! go {
        ($q:expr, $e:ty, $write:expr, $put:expr) => {{
            let layer = &mut kv.layer_mut::<$e>(layer)[..pages * stride];
            let q =
                Grid::columns(&mut $q[..n * heads.q_stride], heads.q_stride, heads.q_stride, heads.q_block);
            let into = Grid::columns(layer, stride, stride, piece);
            heads.run(cx, (q, into), $write, $put);
        }};
    }
    match (kv.shape.dtype, kv_is_bf16(cx, kv)) {
        (DType::F32, _) => go!(s.q32, f32, write_f32, f32::put),
        (DType::F16, _) => go!(s.q32, u16, write_f16, f32::put),
        (_, false) => go!(s.q32, u16, write_bf16, f32::put),
        (_, true) => go!(s.q16, u16, write_bf16, u16::put),
    }
}

/// Whether attention multiplies pairs of bf16.
pub(super) fn kv_is_bf16(cx: Cx<'_>, kv: &CpuKv) -> bool {
    cx.isa.bf16_products() && kv.shape.dtype == DType::BF16
}

/// What each KV head's task in `project` reads.
struct Heads<'a> {
    step: &'a Step,
    spec: &'a ModelSpec,
    qkv: &'a [f32],
    qkv_width: usize,
    cos: &'a [f32],
    sin: &'a [f32],
    q_norm: Option<&'a [f32]>,
    k_norm: Option<&'a [f32]>,
    /// Padded head dimensions.
    dims: usize,
    q_block: usize,
    q_stride: usize,
}

impl Heads<'_> {
    fn run<Q: Pod, E: Pod>(
        &self,
        cx: Cx<'_>,
        parts: (Grid<'_, Q>, Grid<'_, E>),
        write: impl Fn(&mut [E], usize, usize, &[f32], &[f32]) + Sync,
        put: impl Fn(simd::Isa, &[f32], &mut [Q]) + Sync,
    ) {
        let task = |(mut q, mut pages): (Block<'_, Q>, Block<'_, E>), head: usize| {
            for seq in &self.step.seqs {
                let table = self.step.block_table(seq);
                for row in seq.first_row as usize..(seq.first_row + seq.n_rows) as usize {
                    let position = self.step.positions[row] as usize;
                    let piece = pages.row(table[position / PAGE_TOKENS] as usize);
                    self.row(cx, row, head, q.row(row), &put, |k, v| {
                        write(piece, self.dims, position % PAGE_TOKENS, k, v);
                    });
                }
            }
        };
        if self.step.tokens.len() <= SERIAL_ROWS {
            Pool::serial(parts, task);
        } else {
            cx.pool.each(parts, task);
        }
    }

    /// One row's queries and K, V of one KV head.
    fn row<Q: Pod>(
        &self,
        cx: Cx<'_>,
        row: usize,
        head: usize,
        q_out: &mut [Q],
        put: &impl Fn(simd::Isa, &[f32], &mut [Q]),
        write: impl FnOnce(&[f32], &[f32]),
    ) {
        let (d, group) = (self.spec.head_dim as usize, self.spec.group() as usize);
        let qkv = &self.qkv[row * self.qkv_width..(row + 1) * self.qkv_width];
        let mut stack = [0.0f32; MAX_HEAD_DIM];
        let buffer = &mut stack[..d];
        for g in 0..group {
            buffer.copy_from_slice(&qkv[(head * group + g) * d..][..d]);
            self.turn(cx, row, self.q_norm, buffer);
            put(cx.isa, buffer, &mut q_out[g * self.dims..][..d]);
        }
        let k = self.spec.q_size() + head * d;
        let v = k + self.spec.kv_size();
        buffer.copy_from_slice(&qkv[k..k + d]);
        self.turn(cx, row, self.k_norm, buffer);
        write(buffer, &qkv[v..v + d]);
    }

    /// Head norm and rotation.
    fn turn(&self, cx: Cx<'_>, row: usize, norm: Option<&[f32]>, x: &mut [f32]) {
        if let Some(weight) = norm {
            let mut stack = [0.0f32; MAX_HEAD_DIM];
            let raw = &mut stack[..x.len()];
            raw.copy_from_slice(x);
            simd::rms_norm(cx.isa, raw, weight, self.spec.norm_eps, x);
        }
        if self.cos.is_empty() {
            return;
        }
        let half = x.len() / 2;
        let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
        let (low, high) = x.split_at_mut(half);
        for (((a, b), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

/// Largest head that fits the buffers on the stack; `upload` refuses larger ones.
pub(super) const MAX_HEAD_DIM: usize = 1024;

/// Attention over the pages, output projection, residual.
pub(super) fn attend(
    cx: Cx<'_>,
    w: &CpuWeights,
    kv: &CpuKv,
    s: &mut CpuScratch,
    step: &Step,
    layer: usize,
    live: Live,
) -> Result<()> {
    let n = step.tokens.len();
    let oracle = live == Live::Selected && step.plan.source == Source::Oracle;
    // The oracle computes every head, and cuts afterwards.
    let selected = live == Live::Selected && !oracle;
    let CpuScratch { locals, q32, q16, attn, bands, units, select, cuts, states, .. } = s;
    let mut pass = Pass {
        cx,
        spec: &w.spec,
        step,
        kv: kv.layer(layer),
        dims: kv.shape.dims,
        q: if kv_is_bf16(cx, kv) { Acts::Bf16(q16) } else { Acts::F32(q32) },
        bands,
        units,
        live: selected.then_some(&select.live),
        cuts: &[],
        states: &[],
    };
    let size = state_size(w.spec.group() as usize, pass.dims);
    pass.cut(cuts, states.len() / size);
    if !cuts.is_empty() {
        let parts = Chunks::new(&mut states[..cuts.len() * size], size);
        cx.pool.split(parts, locals, Ahead::NOTHING, |l, state, i| pass.part(l, state, cuts[i]));
        (pass.cuts, pass.states) = (cuts, states);
    }
    let ahead = cx.before(&[&w.layers[layer].o.mat]).ahead;
    let (width, block) = (w.spec.q_size(), (w.spec.group() * w.spec.head_dim) as usize);
    let stride = attn.stride;
    if attn.is_bf16() {
        let out = Grid::bands(&mut attn.bf16[..n * stride], stride, width, block, bands)?;
        cx.pool.split(out, locals, ahead, |l, b, i| pass.unit::<u16>(l, b, i));
    } else {
        let out = Grid::bands(&mut attn.f32[..n * stride], stride, width, block, bands)?;
        cx.pool.split(out, locals, ahead, |l, b, i| pass.unit::<f32>(l, b, i));
    }
    count(w, kv, s, step, selected);
    if oracle {
        cut_to_best(&w.spec, s, step, layer);
    }
    let Layer { o, gate, up, .. } = &w.layers[layer];
    let cx = match gate {
        Some(gate) => cx.before(&[&gate.mat, &up.mat]),
        None => cx.before(&[&up.mat]),
    };
    let rows = Pick::Range(0, n);
    product(cx, &mut s.locals, s.attn.acts(), rows, o.parts(), Into::Add, (&mut s.x, s.hidden_stride));
    Ok(())
}

/// What every unit of one layer's attention reads.
struct Pass<'a> {
    cx: Cx<'a>,
    spec: &'a ModelSpec,
    step: &'a Step,
    kv: KvLayer<'a>,
    dims: usize,
    q: Acts<'a>,
    bands: &'a [Band],
    units: &'a [Unit],
    /// `[decode row][kv head]`, when some are left out.
    live: Option<&'a Vec<bool>>,
    /// Parts that were computed before the units, and what they saw.
    cuts: &'a [Cut],
    states: &'a [f32],
}

impl Pass<'_> {
    fn runs(&self, index: usize, head: usize) -> bool {
        let row = self.bands[index].first as usize;
        !self.units[index].decode
            || self.live.is_none_or(|live| live[row * self.spec.num_kv_heads as usize + head])
    }

    /// First position that a row at position `p` sees.
    fn seen_from(&self, p: usize) -> usize {
        self.spec.window.map_or(0, |w| (p + 1).saturating_sub(w as usize))
    }

    /// Pages that a unit sees.
    fn pages(&self, index: usize) -> Range<usize> {
        let first = self.step.positions[self.bands[index].first as usize] as usize;
        self.seen_from(first) / PAGE_TOKENS..first / PAGE_TOKENS + 1
    }

    /// Lists the parts of decode units so long that threads would wait for them, at most `room`.
    fn cut(&self, cuts: &mut Vec<Cut>, room: usize) {
        cuts.clear();
        let heads = self.spec.num_kv_heads as usize;
        let running = |index: usize| (0..heads).filter(move |&head| self.runs(index, head));
        let work = |index: usize| self.pages(index).len() * self.bands[index].rows as usize;
        let all: usize = (0..self.units.len()).map(|i| work(i) * running(i).count()).sum();
        let most = all / (4 * self.cx.pool.threads());
        for index in (0..self.units.len()).filter(|&i| self.units[i].decode && work(i) > most) {
            let pages = self.pages(index);
            let parts = pages.start / PART_PAGES..(pages.end - 1) / PART_PAGES + 1;
            for head in running(index).filter(|_| parts.len() > 1) {
                if cuts.len() + parts.len() > room {
                    return;
                }
                let cut = |part| Cut { unit: index as u32, head: head as u32, part: part as u32 };
                cuts.extend(parts.clone().map(cut));
            }
        }
    }

    /// One part of a decode unit.
    fn part(&self, local: &mut Local, state: &mut [f32], cut: Cut) {
        let index = cut.unit as usize;
        let mut state = State::new(state, self.spec.group() as usize, self.dims);
        self.see(local, index, cut.head as usize, cut.part as usize, &mut state);
    }

    /// Adds a unit's pages within one part.
    fn see(&self, local: &mut Local, index: usize, head: usize, part: usize, state: &mut State<&mut [f32]>) {
        let band = self.bands[index];
        let (first_row, rows) = (band.first as usize, band.rows as usize);
        let group = self.spec.group() as usize;
        let first = self.step.positions[first_row] as usize;
        let Local { q32, q16, visible, .. } = local;
        let q = self.gather(first_row, rows, head, q32, q16);
        let table = self.step.block_table(&self.step.seqs[self.units[index].seq as usize]);
        let all = self.pages(index);
        let pages = all.start.max(part * PART_PAGES)..all.end.min((part + 1) * PART_PAGES);
        for page in pages {
            let at = page * PAGE_TOKENS;
            for r in 0..rows {
                let p = first + r;
                let low = self.seen_from(p).saturating_sub(at).min(PAGE_TOKENS) as u8;
                let high = (p + 1 - at).min(PAGE_TOKENS) as u8;
                visible[r * group..(r + 1) * group].fill((low, high));
            }
            if page + 1 < all.end {
                self.ahead(self.kv.piece(table[page + 1], head));
            }
            let mut queries = Queries {
                q,
                dims: self.dims,
                scale: self.spec.attention_scale(),
                visible: &visible[..rows * group],
                max: state.max,
                sum: state.sum,
                out: state.out,
            };
            attend_page(self.cx.isa, self.kv.piece(table[page], head), &mut queries);
        }
    }

    fn unit<T: Act>(&self, local: &mut Local, mut out: Block<'_, T>, task: usize) {
        let heads = self.spec.num_kv_heads as usize;
        let (index, head) = (task / heads, task % heads);
        if !self.runs(index, head) {
            out.clear();
            return;
        }
        let (rows, group, dims) = (self.bands[index].rows as usize, self.spec.group() as usize, self.dims);
        let n = rows * group;
        let (mut memory, mut more) = (std::mem::take(&mut local.state), std::mem::take(&mut local.later));
        let mut state = State::new(&mut memory, n, dims);
        let cuts = cuts_of(self.cuts, index, head);
        if cuts.is_empty() {
            let pages = self.pages(index);
            let first = pages.start / PART_PAGES;
            self.see(local, index, head, first, &mut state);
            for part in first + 1..(pages.end - 1) / PART_PAGES + 1 {
                let mut later = State::new(&mut more, n, dims);
                self.see(local, index, head, part, &mut later);
                state.join(self.cx.isa, &later.as_ref());
            }
        } else {
            let size = state_size(n, dims);
            for part in self.states.chunks_exact(size).take(cuts.end).skip(cuts.start) {
                state.join(self.cx.isa, &State::of(part, n, dims));
            }
        }
        let d = self.spec.head_dim as usize;
        for r in 0..rows {
            let to = out.row(r);
            for g in 0..group {
                let i = r * group + g;
                let total = simd::fold_sum(&state.sum.as_chunks::<16>().0[i]);
                let values = &mut state.out[i * dims..][..d];
                values.iter_mut().for_each(|v| *v /= total);
                T::put(self.cx.isa, values, &mut to[g * d..][..d]);
            }
        }
        (local.state, local.later) = (memory, more);
    }

    /// The unit's queries, contiguous.
    fn gather<'b>(
        &self,
        first_row: usize,
        rows: usize,
        head: usize,
        q32: &'b mut Buf<f32>,
        q16: &'b mut Buf<u16>,
    ) -> Acts<'b> {
        let width = self.spec.group() as usize * self.dims;
        let stride = self.spec.num_heads as usize * self.dims;
        let from = |r: usize| (first_row + r) * stride + head * width;
        match self.q {
            Acts::F32(q) => {
                for r in 0..rows {
                    q32[r * width..][..width].copy_from_slice(&q[from(r)..][..width]);
                }
                Acts::F32(&q32[..rows * width])
            }
            Acts::Bf16(q) => {
                for r in 0..rows {
                    q16[r * width..][..width].copy_from_slice(&q[from(r)..][..width]);
                }
                Acts::Bf16(&q16[..rows * width])
            }
        }
    }

    /// Pages lie anywhere, so the hardware cannot guess the next one.
    fn ahead(&self, piece: KvPiece<'_>) {
        match piece {
            KvPiece::F32(p) => simd::prefetch(self.cx.isa, p),
            KvPiece::F16(p) | KvPiece::Bf16(p) => simd::prefetch(self.cx.isa, p),
        }
    }
}

/// Adds what ran in decode rows.
fn count(w: &CpuWeights, kv: &CpuKv, s: &mut CpuScratch, step: &Step, selected: bool) {
    let heads = w.spec.num_kv_heads as usize;
    for (i, seq) in step.seqs.iter().enumerate().take_while(|(_, s)| s.decode) {
        let last = seq.context as usize - 1;
        let first = w.spec.window.map_or(0, |w| (last + 1).saturating_sub(w as usize));
        let pages = last / PAGE_TOKENS + 1 - first / PAGE_TOKENS;
        let run = match selected {
            true => s.select.live[i * heads..(i + 1) * heads].iter().filter(|l| **l).count(),
            false => heads,
        };
        let bytes = (pages * kv.shape.piece_bytes()) as u64;
        s.counts[i].attn_run += run as u64;
        s.counts[i].attn_total += heads as u64;
        s.kv_bytes_read += run as u64 * bytes;
        s.kv_bytes_dense += heads as u64 * bytes;
    }
}

/// Zeroes all but the top units of each decode row by the norm of their output.
fn cut_to_best(spec: &ModelSpec, s: &mut CpuScratch, step: &Step, layer: usize) {
    let heads = spec.num_kv_heads as usize;
    let width = (spec.group() * spec.head_dim) as usize;
    for row in 0..step.n_decode() {
        let CpuScratch { attn, select, .. } = s;
        let at = |h: usize| row * attn.stride + h * width;
        for h in 0..heads {
            let square = |v: f32| v * v;
            select.unit_scores[h] = if attn.is_bf16() {
                attn.bf16[at(h)..][..width].iter().map(|&b| square(f32::from_bits(u32::from(b) << 16))).sum()
            } else {
                attn.f32[at(h)..][..width].iter().map(|&v| square(v)).sum()
            };
        }
        let k = step.plan.attn_k(layer, row) as usize;
        s.nan_scores += select.selector.top_k(&select.unit_scores[..heads], k, &mut select.chosen);
        for h in (0..heads).filter(|h| select.chosen.binary_search(&(*h as u32)).is_err()) {
            let range = row * attn.stride + h * width..row * attn.stride + (h + 1) * width;
            if attn.is_bf16() {
                attn.bf16[range].fill(0);
            } else {
                attn.f32[range].fill(0.0);
            }
        }
    }
}

/// Which site a scratch's router logits belong to, for messages.
pub(super) fn site_name(site: Site) -> &'static str {
    match site {
        Site::Attn => "attention",
        Site::Mlp => "MLP",
    }
}
