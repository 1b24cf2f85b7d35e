//! Activations, sums, selections and tables of an engine on the device, sized once.

use super::buckets::buckets;
use super::device::Device;
use super::launch::{Kernels, MAX_DOWN_SPLITS, SKINNY_ROWS, TileSize};
use super::memory::{Memory, Places};
use super::neurons::Routing;
use super::params::{Partial, Ptr};
use super::projection::z_column;
use super::routers::{CudaRouters, LayerRouters, PIECE_COLUMNS};
use super::sampling::{self, Sampling};
use super::shape::Shape;
use super::tables::{self, Tables};
use super::weights::CudaWeights;
use crate::backend::{Limits, PAGE_TOKENS, Step};
use crate::error::{Error, Result, try_vec, try_with_capacity};
use crate::model::Position;
use crate::sparsity::{Counts, Site};
use std::sync::Arc;

/// Addresses of the buffers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Buffers {
    /// f32 `[rows][hidden]`.
    pub(super) residual: Ptr,
    /// Norm output `[rows][hidden]`.
    pub(super) h: Ptr,
    pub(super) q: Ptr,
    pub(super) attention: Ptr,
    /// MLP activations `[rows][neurons]`.
    pub(super) y: Ptr,
    /// The MLP router's narrow activations as bytes, and a scale a row: see `NarrowParams`.
    pub(super) z: Ptr,
    pub(super) z_scales: Ptr,
    /// Counters, see `RouterBytesParams` and `ChoosingParams`.
    pub(super) arrived: Ptr,
    /// Sums of a product, until the next kernel reads them.
    pub(super) sums: Ptr,
    /// Sums that the next norm adds to the residual stream.
    pub(super) delta: Ptr,
    /// Random scores of the heads, until their selection.
    pub(super) scores: Ptr,
    /// Sums of the MLP router's products, which run beside the others.
    pub(super) router_sums: Ptr,
    /// Sums of the routers' own product.
    pub(super) unit_sums: Ptr,
    /// Normed rows that want logits, and the logits.
    pub(super) last: Ptr,
    pub(super) logits: Ptr,
    /// Neuron scores `[groups][ffn]`.
    pub(super) neuron_scores: Ptr,
    /// u16 `[batch][kv_heads]`.
    pub(super) selected: Ptr,
    /// Neurons of the reference rule, and bit masks of every group.
    pub(super) index: Ptr,
    pub(super) masks: Ptr,
    pub(super) parts: Ptr,
    pub(super) counters: Ptr,
    pub(super) rotation: Ptr,
    pub(super) tables: Ptr,
}

/// A finished product whose sum still has to be added to the residual stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pending {
    pub(super) sum: Partial,
    pub(super) bias: Ptr,
}

/// How this step's launches are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Started as they come.
    Run,
    /// Recorded under this key, to be replayed at the end of the stages.
    Record(u64),
    /// Skipped: this program does them.
    Replay(u64),
}

/// See the module.
pub struct CudaScratch<D: Device> {
    pub(super) device: Arc<D>,
    _memory: Memory<D>,
    pub(super) limits: Limits,
    pub(super) buffers: Buffers,
    pub(super) tables: Tables<D>,
    pub(super) kernels: Kernels,
    pub(super) shape: Shape,
    pub(super) pending: Pending,
    pub(super) mode: Mode,
    /// Recorded steps by key, the one used last at the end; and keys seen once, oldest first.
    pub(super) programs: Vec<(u64, u64)>,
    pub(super) seen: Vec<u64>,
    pub(super) counts: Vec<Counts>,
    pub(super) kv_bytes: (u64, u64),
    /// Layer whose neurons were chosen beside its projection.
    pub(super) neurons_selected: Option<usize>,
    /// Layer whose heads were selected together with its projection.
    pub(super) heads_selected: Option<usize>,
    /// They were in the QKV product: attention may read the lists early.
    pub(super) heads_chosen: bool,
    /// The layer's output projection leaves out heads that no sequence keeps.
    pub(super) heads_left_out: bool,
    /// How the layer's neurons are chosen, until its attention takes the scores along.
    pub(super) scored: Option<Routing>,
    /// Attention chose the layer's neurons, so the list is complete only when what comes after it has waited.
    pub(super) list_is_late: bool,
    /// The side stream chooses them, so it is complete only when the kernel behind the join has waited.
    pub(super) list_is_beside: bool,
    pub(super) sampling: Sampling<D>,
}

/// The largest sum a product of this shape leaves, in floats, over every row count that can occur:
/// `rows` and `batch` are the most of a step, and each buckets of their own.
fn sums(rows: usize, batch: usize, of: impl Fn(u32) -> u32, n: usize) -> usize {
    let counts = buckets(rows).chain(buckets(batch));
    counts.map(|r| of(r as u32) as usize * r * n).max().unwrap_or(0)
}

impl<D: Device> CudaScratch<D> {
    pub(super) fn new(
        device: &Arc<D>,
        w: &CudaWeights<D>,
        r: Option<&CudaRouters<D>>,
        limits: &Limits,
    ) -> Result<CudaScratch<D>> {
        let (s, k) = (&w.shape, &w.kernels);
        let r = r.map_or(&[][..], |r| &r.layers);
        if r.iter().any(|l| l.rank > 0) && !k.neurons_fit(s.ffn as u32) {
            return Err(Error::unsupported(format!("MLP routers of {} neurons on this device", s.ffn)));
        }
        if let Some(l) = r.iter().find(|l| !k.rank_fits(l.rank)) {
            return Err(Error::unsupported(format!("MLP routers of rank {} on this device", l.rank)));
        }
        let mut tables = Tables::new(device, limits, s.layers, k.tile_tokens(TileSize::Small))?;
        let lay = |at: Ptr| {
            let mut p = Places::from(at);
            let buffers = places(s, k, r, limits, &w.spec.position, &mut p);
            (buffers, p.used() - at.0)
        };
        let memory = Memory::zeroed(device, lay(Ptr::NULL).1)?;
        let buffers = lay(memory.at).0;
        tables.place(buffers.tables);
        if let Position::Rope { inv_freq } = &w.spec.position {
            rotation(&**device, inv_freq, s, limits.max_context, buffers.rotation)?;
        }
        Ok(CudaScratch {
            device: Arc::clone(device),
            _memory: memory,
            limits: *limits,
            buffers,
            tables,
            kernels: *k,
            shape: s.clone(),
            pending: Pending::default(),
            mode: Mode::Run,
            programs: try_with_capacity(MAX_PROGRAMS, "recorded steps")?,
            seen: try_with_capacity(MAX_PROGRAMS, "recorded steps")?,
            counts: try_vec(limits.max_batch, Counts::default(), "counts")?,
            kv_bytes: (0, 0),
            neurons_selected: None,
            heads_selected: None,
            heads_chosen: false,
            heads_left_out: false,
            scored: None,
            list_is_late: false,
            list_is_beside: false,
            sampling: Sampling::new(device, k, limits.max_batch, s.vocab)?,
        })
    }

    /// The layer whose heads or neurons were chosen last.
    pub(super) fn selected(&self, site: Site) -> Option<usize> {
        match site {
            Site::Attn => self.heads_selected,
            Site::Mlp => self.neurons_selected,
        }
    }
}

/// Bytes of device memory that [`CudaScratch::new`] takes.
pub(super) fn bytes(s: &Shape, k: &Kernels, r: &[LayerRouters], limits: &Limits, position: &Position) -> u64 {
    let mut p = Places::from(Ptr::NULL);
    places(s, k, r, limits, position, &mut p);
    p.used() + sampling::bytes(limits.max_batch, s.vocab)
}

/// Most recorded steps kept; the one used longest ago goes first. A server whose batch moves between 1
/// and 256 has 15 buckets, times the few density settings it uses.
pub(super) const MAX_PROGRAMS: usize = 64;

impl<D: Device> Drop for CudaScratch<D> {
    fn drop(&mut self) {
        if let Mode::Record(_) = self.mode {
            self.device.unrecord();
        }
        for (_, program) in &self.programs {
            self.device.forget(*program);
        }
    }
}

fn places(
    s: &Shape,
    k: &Kernels,
    r: &[LayerRouters],
    limits: &Limits,
    position: &Position,
    p: &mut Places,
) -> Buffers {
    let (rows, batch, d) = (limits.max_rows, limits.max_batch, s.hidden);
    let forward = |n: usize, k_size: usize| sums(rows, batch, |r| k.linear(r, n as u32, k_size as u32).1, n);
    let (mut first, mut down) = (forward(s.first(), d), 0);
    if s.gated {
        down = forward(d, s.neurons);
    } else {
        // A selection may keep any number of neurons; the cut depends on their number in steps of 64.
        for kept in (64..=s.neurons + 63).step_by(64) {
            for r in [8, 16, 32, SKINNY_ROWS].map(|r| r.min(rows as u32)) {
                let (n, d) = (kept as u32, d as u32);
                let splits = k.linear_up(r, n, d).1.max(k.linear(r, n, d).1);
                first = first.max(splits as usize * r as usize * kept);
            }
        }
        down = down.max(MAX_DOWN_SPLITS as usize * rows.min(SKINNY_ROWS as usize) * d);
        down = down.max(sums(rows, batch, |r| k.linear_transposed(r, d as u32, s.neurons as u32).1, d));
    }
    let (mut z, mut router_sums, mut unit_sums, mut qkv) = (0, 0, 0, forward(s.qkv(), d));
    // Steps in which products of routers are joined with others.
    let few = |n: usize| {
        let few = |most: usize| most.min(SKINNY_ROWS as usize);
        sums(few(rows), few(batch), |r| k.linear(r, n as u32, d as u32).1, n)
    };
    for l in r {
        if l.attn_rows > 0 {
            qkv = qkv.max(MAX_DOWN_SPLITS as usize * (s.qkv() + l.attn_room())); // one sequence's, that chooses heads
            unit_sums = unit_sums.max(forward(l.attn_rows, d));
            let turned = |n: u32| k.linear((l.attn_rows as u32).min(SKINNY_ROWS), n, d as u32).1;
            unit_sums = unit_sums.max(sums(rows, batch, turned, l.attn_rows));
        }
        if l.rank > 0 {
            z = z.max(l.up_pieces() * PIECE_COLUMNS);
            router_sums = router_sums.max(forward(l.rank, d));
        }
        // With either router, or both.
        let behind = |n: usize| z_column(n as u32, k.takes_bytes(1)) as usize + l.rank;
        qkv = qkv.max(few(s.qkv() + l.attn_room()));
        unit_sums = unit_sums.max(few(l.attn_room()));
        for units in [0, l.attn_room()] {
            qkv = qkv.max(few(behind(s.qkv() + units)));
            unit_sums = unit_sums.max(few(behind(units)));
        }
    }
    let has_mlp = z > 0;
    let words = s.neurons.div_ceil(32);
    let rotation = match position {
        Position::Rope { .. } => limits.max_context.div_ceil(PAGE_TOKENS) * PAGE_TOKENS * s.hd,
        Position::Learned { .. } => 0,
    };
    let group = s.heads / s.kv_heads;
    Buffers {
        residual: p.take(rows * d, 4),
        h: p.take(rows * d, 2),
        q: p.take(rows * s.q(), 2),
        attention: p.take(rows * s.q(), 2),
        y: p.take(rows * s.neurons, 2),
        z: p.take(batch.next_multiple_of(8) * z, 1),
        z_scales: p.take(if has_mlp { batch } else { 0 }, 4),
        arrived: p.take(3, 4),
        sums: p.take(qkv.max(first), 4),
        delta: p.take(forward(d, s.q()).max(down), 4),
        scores: p.take(batch * s.kv_heads, 4),
        router_sums: p.take(router_sums, 4),
        unit_sums: p.take(unit_sums, 4),
        last: p.take(batch * d, 2),
        // The head's product is never cut: see `stages::logits`.
        logits: p.take(batch * s.vocab, 4),
        neuron_scores: p.take(if has_mlp { (batch + 1) * s.ffn } else { 0 }, 4),
        selected: p.take(batch * s.kv_heads, 2),
        index: p.take(if has_mlp { s.neurons } else { 0 }, 4),
        masks: p.take(if has_mlp { (batch + 1) * words } else { 0 }, 4),
        parts: p.take(k.decode_workers() as usize * 2 * group * (s.hd + 4), 4),
        counters: p.take(batch * s.kv_heads, 4),
        rotation: p.take(rotation, 4),
        tables: p.take(tables::bytes(limits, s.layers, k.tile_tokens(TileSize::Small)) as usize, 1),
    }
}

/// Cosine and sine of every position and stored pair of dimensions.
fn rotation<D: Device>(device: &D, inv_freq: &[f32], s: &Shape, positions: usize, at: Ptr) -> Result<()> {
    let row = s.hd;
    let mut bytes = try_vec(4 * row * 256, 0u8, "rotation table")?;
    for first in (0..positions).step_by(256) {
        let n = 256.min(positions - first);
        for i in 0..n {
            for pair in 0..s.hd / 2 {
                // As the reference does: the angle is rounded to f32 first.
                let angle = inv_freq.get(pair).map_or(0.0, |f| (first + i) as f32 * f);
                let (sin, cos) = angle.sin_cos();
                let to = &mut bytes[4 * (i * row + 2 * pair)..][..8];
                to[..4].copy_from_slice(&cos.to_le_bytes());
                to[4..].copy_from_slice(&sin.to_le_bytes());
            }
        }
        device.copy_in(at.offset((4 * first * row) as u64), &bytes[..4 * row * n])?;
    }
    Ok(())
}

impl<D: Device> CudaScratch<D> {
    /// Whether a step fits what was sized.
    pub(super) fn check(&self, step: &Step) -> Result<()> {
        let (rows, pages) = (step.tokens.len(), self.limits.pages);
        let bad = |what: &str| Err(Error::invalid(format!("step: {what}")));
        if rows > self.limits.max_rows || step.positions.len() != rows {
            return bad("more rows than the engine was made for");
        }
        if step.seqs.len() > self.limits.max_batch || step.logit_rows.len() > self.limits.max_batch {
            return bad("more sequences than the engine was made for");
        }
        if step.tokens.iter().any(|&t| t as usize >= self.shape.vocab) {
            return bad("a token is not in the vocabulary");
        }
        if let Some(places) = self.shape.learned_positions
            && let Some(p) =
                step.positions.iter().find(|&&p| (p + self.shape.position_offset) as usize >= places)
        {
            return Err(Error::invalid(format!(
                "position {p}, the model has {}",
                places - self.shape.position_offset as usize
            )));
        }
        if step.logit_rows.iter().any(|&r| r as usize >= rows) {
            return bad("logits of a row that is not there");
        }
        if step.pages.iter().any(|&p| p as usize >= pages) {
            return bad("a page is not in the cache");
        }
        let mut next = 0;
        for (i, s) in step.seqs.iter().enumerate() {
            let decode = s.n_rows == 1 && s.first_row == i as u32;
            if s.first_row != next || s.n_rows == 0 || s.decode && !decode {
                return bad("rows of a sequence are out of order");
            }
            next += s.n_rows;
            let table = s.first_page as usize + s.n_pages as usize;
            let needed = (s.context as usize).div_ceil(PAGE_TOKENS);
            if table > step.pages.len() || needed > s.n_pages as usize || s.context < s.n_rows {
                return bad("a block table is too short");
            }
            if s.context as usize > self.limits.max_context {
                return bad("a context is longer than the engine was made for");
            }
            for r in 0..s.n_rows {
                let row = (s.first_row + r) as usize;
                if row >= rows || step.positions[row] != s.context - s.n_rows + r {
                    return bad("positions and context disagree");
                }
            }
            if s.logits != crate::backend::NO_LOGITS && s.logits as usize >= step.logit_rows.len() {
                return bad("a sequence's logits are not there");
            }
        }
        if next as usize != rows { bad("rows without a sequence") } else { Ok(()) }
    }
}
