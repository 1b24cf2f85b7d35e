//! Kernels by name, and the grid, threads and shared memory of each launch.

use super::cut::{DownCut, MOST_SKINNY, SkinnyCut, fits_beside, splits};
use super::line::{blocks_and_stages, large_fits};
use super::params::SAMPLE_BINS;
use super::tuning::Tuning;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// A kernel: its place in [`NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Id(pub u16);

/// How a kernel is started.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Which kernel.
    pub kernel: Id,
    /// Blocks, x and y.
    pub grid: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared: u32,
    /// Blocks side by side that run at the same time; more than 1 on compute capability 9.0 only.
    pub cluster: u32,
}

impl Launch {
    /// Blocks, x and y, that may run at any time.
    pub fn new(kernel: Id, grid: (u32, u32), threads: u32, shared: u32) -> Launch {
        Launch { kernel, grid, threads, shared, cluster: 1 }
    }
}

macro_rules! names {
    ($($name:literal)*; by rows: $($sized:literal)*) => {
        /// Every kernel of `cuda/kernels.cu`.
        pub const NAMES: &[&str] = &[$(concat!($name, "_bf16"), concat!($name, "_f16")),*,
            "neuron_scores", "narrow_rows", "router_scores_bytes", "select_neurons", "select_neurons_large", "attention_plan", "zero_heads", "mark_rows", "argmax", "count_tokens", "sample_penalised", "sample_bins", "sample_finish", "transpose16", "convert", "read_stream", "fill_bf16", "fill_f16",
            "attention_decode_bf16_64", "attention_decode_bf16_80", "attention_decode_bf16_96",
            "attention_decode_bf16_128", "attention_decode_bf16_256",
            "attention_decode_f16_64", "attention_decode_f16_80", "attention_decode_f16_96",
            "attention_decode_f16_128", "attention_decode_f16_256",
            "attention_decode_large_bf16_64", "attention_decode_large_bf16_80",
            "attention_decode_large_bf16_96", "attention_decode_large_bf16_128",
            "attention_decode_large_f16_64", "attention_decode_large_f16_80",
            "attention_decode_large_f16_96", "attention_decode_large_f16_128",
            "attention_decode_tall_bf16_64", "attention_decode_tall_bf16_80",
            "attention_decode_tall_bf16_96", "attention_decode_tall_bf16_128",
            "attention_decode_tall_f16_64", "attention_decode_tall_f16_80",
            "attention_decode_tall_f16_96", "attention_decode_tall_f16_128",
            "attention_decode_cluster_bf16_64", "attention_decode_cluster_bf16_80",
            "attention_decode_cluster_bf16_96", "attention_decode_cluster_bf16_128",
            "attention_decode_cluster_f16_64", "attention_decode_cluster_f16_80",
            "attention_decode_cluster_f16_96", "attention_decode_cluster_f16_128",
            "attention_decode_scored_bf16_64", "attention_decode_scored_bf16_128",
            "attention_decode_scored_f16_64", "attention_decode_scored_f16_128",
            "attention_decode_scored_large_bf16_64", "attention_decode_scored_large_bf16_128",
            "attention_decode_scored_large_f16_64", "attention_decode_scored_large_f16_128",
            "attention_prefill_bf16_64", "attention_prefill_bf16_80", "attention_prefill_bf16_96",
            "attention_prefill_bf16_128", "attention_prefill_bf16_256",
            "attention_prefill_f16_64", "attention_prefill_f16_80", "attention_prefill_f16_96",
            "attention_prefill_f16_128", "attention_prefill_f16_256",
            "attention_prefill_small_bf16_64", "attention_prefill_small_bf16_80",
            "attention_prefill_small_bf16_96", "attention_prefill_small_bf16_128",
            "attention_prefill_small_f16_64", "attention_prefill_small_f16_80",
            "attention_prefill_small_f16_96", "attention_prefill_small_f16_128",
            "norm_bf16_1", "norm_bf16_2", "norm_bf16_4", "norm_f16_1", "norm_f16_2", "norm_f16_4",
            "linear_down_bf16_1", "linear_down_bf16_2", "linear_down_bf16_4",
            "linear_down_f16_1", "linear_down_f16_2", "linear_down_f16_4",
            $(concat!($sized, "_bf16_1"), concat!($sized, "_bf16_2"),
              concat!($sized, "_bf16_4"), concat!($sized, "_bf16_8"),
              concat!($sized, "_f16_1"), concat!($sized, "_f16_2"),
              concat!($sized, "_f16_4"), concat!($sized, "_f16_8")),*
        ];
    };
}

names! { "embed" "qkv" "qkv_whole" "qkv_long" "qkv_chosen" "activate" "linear_activated" "select_heads" "linear_tile_nt" "linear_tile_nn"
"mlp_down" "linear_wide_choosing" "linear_wide_chosen";
by rows: "linear_skinny" "linear_up" "linear_wide" "linear_wide_bytes" "linear_wide_down" "linear_wide_activated" "router_scores" }

/// The kernel of that name.
pub fn find(name: &str) -> Option<Id> {
    NAMES.iter().position(|n| *n == name).map(|i| Id(i as u16))
}

/// Rows above which the skinny products give way to the tiled one.
pub const SKINNY_ROWS: u32 = 64;
/// Rows up to which our own products are used even where the vendor's library is found.
pub const LIBRARY_ROWS: u32 = 32;
/// Columns (of the output) from which the library is faster at any number of rows.
pub const LIBRARY_COLUMNS: u32 = 16_384;
/// Most parts of a down product's sum.
pub const MAX_DOWN_SPLITS: u32 = 16;
/// Rows up to which the down product makes its own input from the up product's sums.
pub const MADE_ROWS: u32 = 4;
/// Rows up to which the up product of listed rows is not done by warpgroups: their blocks, half a multiprocessor each,
/// come later than small ones beside the kernels ahead (on an H200 steps of 1 and 8 rows 1 to 2 % slower).
const NARROW_UP_ROWS: u32 = 16;
/// Neurons up to which their selection keeps its keys in registers.
const REGISTER_NEURONS: u32 = 16_384;
/// Columns of the rows that norms take.
pub const MOST_HIDDEN: u32 = 16 * 1024;
/// Neurons whose list one block of a selection writes.
const SELECT_PIECE: u32 = 2048;
/// Most blocks that share one row of logits.
pub const ARGMAX_PIECES: u32 = 32;
/// Most units (KV heads) a selection takes.
pub const MAX_UNITS: u32 = 256;

/// What one block of the prefill attention works on, see `cuda/attention_prefill.cu`. No bit of the
/// output depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileSize {
    /// Reads the cache least often.
    Large,
    /// Half the rows, for steps with few large tiles; the same as `Large` at head size 256.
    Small,
}

/// The kernels of one 16-bit type and head size, with what their launches need to know.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    embed: Id,
    /// By columns of a thread: 4, 8, 16.
    norm: [Id; 3],
    /// For sums in several parts, in one.
    qkv: [Id; 2],
    /// Behind the product that chooses heads.
    pub(super) qkv_chosen: Id,
    activate: Id,
    pub(super) activated: Id,
    select_heads: Id,
    tile: [Id; 2],
    scores: Id,
    neurons: [Id; 2],
    plan: Id,
    zero: Id,
    mark: Id,
    argmax: Id,
    count_tokens: Id,
    sample: [Id; 3],
    transpose: Id,
    convert: Id,
    pub(super) decode: Id,
    /// In blocks of eight warps, where they fit.
    pub(super) decode_large: Option<Id>,
    /// For clusters of blocks.
    pub(super) decode_cluster: Option<Id>,
    /// The same two that take the MLP router's scores along, where they are.
    pub(super) decode_scored: [Option<Id>; 2],
    /// Large tiles, small ones.
    prefill: [Id; 2],
    skinny: [Id; 4],
    up: [Id; 4],
    router: [Id; 4],
    router_bytes: Id,
    narrow: Id,
    down: [Id; 3],
    /// Matrices stored `[n, k]`, and `[k, n]`.
    pub(super) wide: [[Id; 4]; 2],
    /// The first of those, with columns from bytes.
    pub(super) wide_bytes: [Id; 4],
    /// With their activation.
    pub(super) wide_activated: [Id; 4],
    /// QKV that chooses the heads, and the output projection of these.
    pub(super) heads: [Id; 2],
    /// Whether the GPU has those, and clusters of blocks.
    pub(super) warpgroups: bool,
    mlp_down: Id,
    /// Choices that a measurement decides.
    pub tuning: Tuning,
    pub(super) head_dim: u32,
    pub(super) group: u32,
    /// Pages each warp of the decode attention has room for: the one it works on, and those under way.
    pub stages: u32,
    pub(super) decode_blocks: u32,
    pub(super) multiprocessors: u32,
    pub(super) shared_per_block: u32,
}

fn by_name(name: &str) -> Result<Id> {
    find(name).ok_or_else(|| Error::unsupported(format!("kernel {name}: not in this build")))
}

impl Kernels {
    /// The kernels for a type, head size and group (query heads per KV head).
    pub fn new(
        dtype: DType,
        head_dim: u32,
        group: u32,
        multiprocessors: u32,
        shared_per_block: u32,
    ) -> Result<Kernels> {
        let t = match dtype {
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            other => {
                return Err(Error::unsupported(format!(
                    "kernels for {}: bfloat16 and float16 are built",
                    other.name()
                )));
            }
        };
        if !(1..=16).contains(&group) {
            return Err(Error::unsupported(format!("{group} query heads per KV head: kernels take 1 to 16")));
        }
        let tall = if group > 8 { "_tall" } else { "" };
        let each = |base: &str| by_name(&format!("{base}_{t}"));
        let (decode_blocks, stages) = blocks_and_stages(head_dim, group, shared_per_block)?;
        let by_rows = |base: &str| -> Result<[Id; 4]> {
            let one = |rows| by_name(&format!("{base}_{t}_{rows}"));
            Ok([one(1)?, one(2)?, one(4)?, one(8)?])
        };
        let by_size = |base: &str| -> Result<[Id; 3]> {
            let one = |size| by_name(&format!("{base}_{t}_{size}"));
            Ok([one(1)?, one(2)?, one(4)?])
        };
        let sized = |base: &str| by_name(&format!("{base}_{t}_{head_dim}"));
        let large = large_fits(head_dim, group, (decode_blocks, stages), shared_per_block)
            .then(|| sized("attention_decode_large"));
        let unsupported = |e: Error| {
            Error::unsupported(format!(
                "head size {head_dim} with {group} query heads per KV head: {}",
                e.message
            ))
        };
        Ok(Kernels {
            embed: each("embed")?,
            norm: by_size("norm")?,
            qkv: if head_dim > 128 { [each("qkv_long")?; 2] } else { [each("qkv")?, each("qkv_whole")?] },
            qkv_chosen: each("qkv_chosen")?,
            activate: each("activate")?,
            activated: each("linear_activated")?,
            select_heads: each("select_heads")?,
            tile: [each("linear_tile_nt")?, each("linear_tile_nn")?],
            scores: by_name("neuron_scores")?,
            neurons: [by_name("select_neurons")?, by_name("select_neurons_large")?],
            plan: by_name("attention_plan")?,
            zero: by_name("zero_heads")?,
            mark: by_name("mark_rows")?,
            argmax: by_name("argmax")?,
            count_tokens: by_name("count_tokens")?,
            sample: [by_name("sample_penalised")?, by_name("sample_bins")?, by_name("sample_finish")?],
            transpose: by_name("transpose16")?,
            convert: by_name("convert")?,
            decode: sized(&format!("attention_decode{tall}")).map_err(unsupported)?,
            decode_large: large.transpose().map_err(unsupported)?,
            decode_cluster: find(&format!("attention_decode_cluster_{t}_{head_dim}"))
                .filter(|_| tall.is_empty()),
            decode_scored: ["", "_large"].map(|size| {
                find(&format!("attention_decode_scored{size}_{t}_{head_dim}")).filter(|_| tall.is_empty())
            }),
            prefill: [
                sized("attention_prefill").map_err(unsupported)?,
                sized(if head_dim > 128 { "attention_prefill" } else { "attention_prefill_small" })
                    .map_err(unsupported)?,
            ],
            skinny: by_rows("linear_skinny")?,
            up: by_rows("linear_up")?,
            router: by_rows("router_scores")?,
            router_bytes: by_name("router_scores_bytes")?,
            narrow: by_name("narrow_rows")?,
            down: by_size("linear_down")?,
            wide: [by_rows("linear_wide")?, by_rows("linear_wide_down")?],
            wide_bytes: by_rows("linear_wide_bytes")?,
            wide_activated: by_rows("linear_wide_activated")?,
            heads: [each("linear_wide_choosing")?, each("linear_wide_chosen")?],
            mlp_down: each("mlp_down")?,
            warpgroups: false,
            tuning: Tuning::default(),
            head_dim,
            group,
            stages,
            decode_blocks,
            multiprocessors,
            shared_per_block,
        })
    }

    /// Embedding rows.
    pub fn embed(&self, rows: u32) -> Launch {
        Launch::new(self.embed, (rows, 1), 256, 0)
    }

    /// Norms of `rows` rows of up to [`MOST_HIDDEN`] columns.
    pub fn norm(&self, rows: u32, hidden: u32) -> Launch {
        // Of few rows blocks for each multiprocessor, of at least four warps.
        let cluster = match rows {
            _ if !self.warpgroups || hidden > MOST_HIDDEN / 2 => 1,
            0..=16 => 8,
            17..=32 => 4,
            33..=64 => 2,
            _ => 1,
        };
        let cluster = cluster.min(hidden.div_ceil(4 * 128).next_power_of_two());
        // A block of 1024 threads fills a multiprocessor's registers.
        let half = cluster == 1 && rows > self.multiprocessors && hidden <= MOST_HIDDEN / 2;
        let most = if half { 512 } else { 1024 };
        let threads = hidden.div_ceil(4 * cluster).next_multiple_of(32).min(most / cluster);
        let chunks = hidden.div_ceil(4 * threads * cluster);
        let kernel = self.norm[match chunks {
            1 => 0,
            2 => 1,
            _ => 2,
        }];
        Launch { cluster, ..Launch::new(kernel, (rows * cluster, 1), threads, 32 * 8) }
    }

    /// Bias, rotation and KV write of `rows` rows of `heads` heads (q, k and v) from sums in `parts`; `router`: rows of the
    /// router by which it selects heads as well, 0: none; `narrows`: it makes bytes of up to [`MOST_RANK`] columns as well.
    pub fn qkv(&self, (rows, heads, parts): (u32, u32, u32), router: u32, narrows: bool) -> Launch {
        let kernel = self.qkv[usize::from(parts == 1)];
        let y = heads.div_ceil(8);
        let (selects, shared) = if router > 0 { (1, select_bytes(router)) } else { (0, 0) };
        let shared = if narrows { narrow_bytes(MOST_RANK).max(shared) } else { shared };
        Launch::new(kernel, (rows, y + selects + u32::from(narrows)), 256, shared)
    }

    /// Bytes of rows of sums, so many pieces of 64 each.
    pub fn narrow_rows(&self, rows: u32, pieces: u32) -> Launch {
        Launch::new(self.narrow, (rows, 1), 256, narrow_bytes(64 * pieces))
    }

    /// Activation of `n` neurons.
    pub fn activate(&self, rows: u32, n: u32) -> Launch {
        // All of them run at once, five a multiprocessor: the next product starts when the last one has begun.
        let pieces = n.div_ceil(1024);
        let rounds = pieces.div_ceil((5 * self.multiprocessors / rows.max(1)).max(1));
        Launch::new(self.activate, (rows, pieces.div_ceil(rounds)), 256, 0)
    }

    /// Head selection by `router` logits a sequence.
    pub fn select_heads(&self, sequences: u32, router: u32) -> Launch {
        Launch::new(self.select_heads, (sequences, 1), 256, select_bytes(router))
    }

    /// Tables of the decode attention from a host's own.
    pub fn plan(&self, sequences: u32, kv_heads: u32) -> Launch {
        let blocks = (sequences * kv_heads).div_ceil(1024).clamp(1, self.multiprocessors);
        Launch::new(self.plan, (blocks, 1), 256, 8 * 4)
    }

    /// Zeros where the decode attention writes nothing.
    pub fn zero_heads(&self, sequences: u32) -> Launch {
        Launch::new(self.zero, (sequences, 1), 256, MAX_UNITS * 4)
    }

    /// Which rows of a host's batch are padding.
    pub fn mark_rows(&self) -> Launch {
        Launch::new(self.mark, (1, 1), 256, 0)
    }

    /// Scores of the neurons of `groups` groups of rows.
    pub fn neuron_scores(&self, groups: u32, n: u32) -> Launch {
        Launch::new(self.scores, (n.div_ceil(64), groups), 256, 1024)
    }

    /// The MLP router's second product of up to [`SKINNY_ROWS`] rows, as scores of `n` neurons.
    pub fn router_scores(&self, rows: u32, n: u32) -> Launch {
        let cut = SkinnyCut::new(rows, SkinnyCut::DEPTH);
        Launch { kernel: self.router[cut.variant], grid: (n.div_ceil(cut.neurons), 1), ..cut.launch() }
    }

    /// The same of bytes, see `cuda/router_bytes.cuh`.
    pub fn router_scores_bytes(&self, rows: u32, n: u32) -> Launch {
        // With room for four warps' sums.
        let room = router_bytes_room(rows);
        let shared = room + (room - ROW_BYTES) / 4;
        Launch::new(self.router_bytes, (n.div_ceil(64), 1), 128, shared)
    }

    /// Neuron selection of `groups` groups, from their scores.
    pub fn select_neurons(&self, groups: u32, n: u32) -> Launch {
        let kernel = self.neurons[usize::from(n > REGISTER_NEURONS)];
        Launch::new(kernel, (n.div_ceil(SELECT_PIECE).clamp(1, 32), groups), 1024, neuron_bytes(n))
    }

    /// Whether a layer of `n` neurons fits the neuron selection.
    pub fn neurons_fit(&self, n: u32) -> bool {
        neuron_bytes(n) <= self.shared_per_block && n < 1 << 16
    }

    /// Whether bytes can be made of rows of an MLP router of that rank.
    pub fn rank_fits(&self, rank: usize) -> bool {
        u32::try_from(rank)
            .is_ok_and(|r| narrow_bytes(r.saturating_add(63) / 64 * 64) <= self.shared_per_block)
    }

    /// Most likely tokens.
    pub fn argmax(&self, rows: u32) -> Launch {
        let pieces = (2 * self.multiprocessors / rows.max(1)).clamp(1, ARGMAX_PIECES);
        Launch::new(self.argmax, (pieces, rows), 512, 400)
    }

    /// Counting of `n` tokens of penalised sequences.
    pub fn count_tokens(&self, n: u32) -> Launch {
        Launch::new(self.count_tokens, (n.div_ceil(256), 1), 256, 0)
    }

    /// Sampling of `jobs` rows: the likeliest after penalties (0), histograms and plain draws (1), the
    /// rest (2).
    pub fn sample(&self, stage: usize, jobs: u32) -> Launch {
        let pieces = (4 * self.multiprocessors / jobs.max(1)).clamp(1, ARGMAX_PIECES);
        let shared = 2 * 4 * SAMPLE_BINS as u32 + SAMPLE_SUMS;
        Launch::new(self.sample[stage], (pieces, jobs), 512, shared)
    }

    /// Transposition of `rows` by `columns`.
    pub fn transpose(&self, rows: u32, columns: u32) -> Launch {
        Launch::new(self.transpose, (columns.div_ceil(32), rows.div_ceil(32)), 256, 32 * 33 * 2)
    }

    /// Conversion to a 16-bit type.
    pub fn convert(&self, count: u64) -> Launch {
        let blocks = count.div_ceil(1024).clamp(1, 4096) as u32;
        Launch::new(self.convert, (blocks, 1), 256, 0)
    }

    /// A read of all of some memory, to measure the device's ceiling.
    pub fn read_stream(&self) -> Result<Launch> {
        Ok(Launch::new(by_name("read_stream")?, (4 * self.multiprocessors, 1), 512, 0))
    }

    /// Random contents of a 16-bit type.
    pub fn fill(&self, dtype: DType) -> Result<Launch> {
        let kernel = by_name(if dtype == DType::BF16 { "fill_bf16" } else { "fill_f16" })?;
        Ok(Launch::new(kernel, (8 * self.multiprocessors, 1), 256, 0))
    }

    /// Packed query rows of a prefill tile, and tokens of the cache a step.
    fn prefill_sizes(&self, tile: TileSize) -> (u32, u32) {
        match (self.head_dim, tile) {
            (129.., _) => (64, 32),
            (_, TileSize::Large) => (128, 64),
            (_, TileSize::Small) => (64, 64),
        }
    }

    /// Query tokens of one prefill tile.
    pub fn tile_tokens(&self, tile: TileSize) -> u32 {
        self.prefill_sizes(tile).0 / self.group
    }

    /// The tile for a step, by how many tokens of the cache each of its large tiles sees.
    ///
    /// A large tile is about 1.4 times as fast where two share each multiprocessor, and slower where it is
    /// alone on one: the longest block, or one block a multiprocessor, then bounds the step. So large tiles
    /// are taken when they are worth at least 1.5 of the longest one a multiprocessor (on an H100 small ones
    /// win at 1.0, large ones at 1.9).
    pub fn tile_size(&self, seen: impl Iterator<Item = u32>, kv_heads: u32) -> TileSize {
        let (longest, sum) =
            seen.fold((0, 0), |(longest, sum), n| (longest.max(u64::from(n)), sum + u64::from(n)));
        let enough = 3 * longest * u64::from(self.multiprocessors);
        if 2 * sum * u64::from(kv_heads) >= enough { TileSize::Large } else { TileSize::Small }
    }

    /// Prefill attention over `tiles` tiles.
    pub fn prefill(&self, tile: TileSize, tiles: u32, kv_heads: u32) -> Launch {
        let (rows, keys) = self.prefill_sizes(tile);
        // The queries and three loads of the cache, rows 16 bytes apart.
        let shared = (rows + 3 * keys) * (2 * self.head_dim + 16);
        Launch::new(self.prefill[tile as usize], (tiles * kv_heads, 1), 128, shared)
    }

    /// `x [rows][k]` times `w [n][k]`: the launch, and into how many parts the sum is cut.
    pub fn linear(&self, rows: u32, n: u32, k: u32) -> (Launch, u32) {
        if rows > SKINNY_ROWS {
            return self.tiled(self.tile[0], rows, n, k);
        }
        if let Some(wide) = self.by_warpgroups(false, rows, n, k) {
            return wide;
        }
        self.skinny(self.skinny, SkinnyCut::new(rows, SkinnyCut::DEPTH), MOST_SKINNY, (n, k))
    }

    /// The same for listed rows of `w`, the list ready before the kernel ahead lets this one start; up to [`SKINNY_ROWS`].
    ///
    /// With few rows and neurons it leaves room for the down product beside it, so that both load their weights while the
    /// norm ahead runs.
    pub fn linear_up(&self, rows: u32, n: u32, k: u32) -> (Launch, u32) {
        if rows > NARROW_UP_ROWS
            && let Some(wide) = self.by_warpgroups(false, rows, n, k)
        {
            return wide;
        }
        let most = if rows <= MADE_ROWS && fits_beside(n, k) { 2 } else { MOST_SKINNY };
        self.skinny(self.up, SkinnyCut::new(rows, SkinnyCut::READY_DEPTH), most, (n, k))
    }

    fn skinny(&self, kernels: [Id; 4], cut: SkinnyCut, most: u32, (n, k): (u32, u32)) -> (Launch, u32) {
        let tiles = n.div_ceil(cut.neurons);
        let most = if cut.variant == 3 { 2 } else { most };
        let per_sm = ((self.shared_per_block + 1024) / (cut.shared + 1024)).clamp(1, most);
        let splits = splits(tiles, per_sm * self.multiprocessors, k.div_ceil(64), k.div_ceil(64) / 4);
        (Launch { kernel: kernels[cut.variant], grid: (tiles, splits), ..cut.launch() }, splits)
    }

    fn tiled(&self, kernel: Id, rows: u32, n: u32, k: u32) -> (Launch, u32) {
        let (x, y) = (rows.div_ceil(128), n.div_ceil(128));
        let splits = splits(x * y, self.multiprocessors, k.div_ceil(64), k.div_ceil(64) / 8).min(8);
        (Launch::new(kernel, (x, y * splits), 256, TILE_SHARED), splits)
    }

    /// `x [rows][k]` times `w [k][n]`.
    pub fn linear_transposed(&self, rows: u32, n: u32, k: u32) -> (Launch, u32) {
        if rows > SKINNY_ROWS {
            return self.tiled(self.tile[1], rows, n, k);
        }
        if let Some(wide) = self.by_warpgroups(true, rows, n, k) {
            return wide;
        }
        let (kernel, cut) = match rows {
            0..=16 => (self.down[0], DownCut::FEW_ROWS),
            17..=32 => (self.down[1], DownCut { row_tiles: 2, column_warps: 4, per_sm: 2, depth: 5 }),
            _ => (self.down[2], DownCut { row_tiles: 4, column_warps: 4, per_sm: 1, depth: 8 }),
        };
        self.down(kernel, cut, n, k)
    }

    /// Down product of a selective MLP of up to [`MADE_ROWS`] rows, from the up product's sums.
    pub fn mlp_down(&self, n: u32, k: u32) -> (Launch, u32) {
        let per_sm = if fits_beside(n, k) { 1 } else { 2 };
        self.down(self.mlp_down, DownCut { per_sm, depth: 5, ..DownCut::FEW_ROWS }, n, k)
    }

    /// As many parts as fill the device once: a part costs little, an idle multiprocessor a lot.
    fn down(&self, kernel: Id, cut: DownCut, n: u32, k: u32) -> (Launch, u32) {
        let tiles = n.div_ceil(64 * cut.column_warps);
        let most = k.div_ceil(32).clamp(1, MAX_DOWN_SPLITS);
        let splits = (cut.per_sm * self.multiprocessors / tiles).clamp(1, most);
        // Weights under way, and up to two chunks of the input.
        let chunk = 1024 / cut.column_warps;
        let chunks = if k.div_ceil(16).div_ceil(splits) * 16 <= chunk { 1 } else { 2 };
        let shared = 8 * cut.depth * 4 * 512 + chunks * 16 * cut.row_tiles * 2 * chunk;
        (Launch::new(kernel, (tiles, splits), 256, shared), splits)
    }
}

/// Shared memory of the sampling kernels beside their histogram, bytes: sums, gathered tokens.
const SAMPLE_SUMS: u32 = 1024 + 1024 * 16;
const TILE_SHARED: u32 = 3 * (128 + 128) * 64 * 2;

/// Shared memory for so many rows of bytes that a router's matrix is multiplied with, of up to 1024 columns at a time
/// (`room` in `cuda/router_bytes.cuh`).
pub(super) fn router_bytes_room(rows: u32) -> u32 {
    let tiles = if rows <= 8 { 1 } else { rows.div_ceil(32) * 4 };
    tiles * 8192 + ROW_BYTES
}

/// What lies ahead of them (`HEAD` there).
const ROW_BYTES: u32 = 4 * (2 * 64 + 16 * 8);

/// Shared memory for choosing among `n` neurons by one block of so many warps, bytes (`Choice` in `cuda/neuron_select.cuh`):
/// what the choice takes, or a rehearsal by each warp.
pub(super) fn choice_bytes(n: u32, warps: u32) -> u32 {
    const HEAD: u32 = 128 + 2 * 2 * 32 + 2 * 32 + 32;
    let threads = 32 * warps;
    let each = n.div_ceil(32 * threads) * 32;
    let rehearsed = HEAD + 32 * (32 + 4) + 32;
    4 * (HEAD + threads * (each + 4 + each / 16)).max(warps * rehearsed)
}

/// Columns of a row of bytes that the router's second product takes at a time, and decode attention along.
pub(super) const MOST_RANK: u32 = 1024;

fn narrow_bytes(columns: u32) -> u32 {
    columns.saturating_add(32).saturating_mul(4)
}

fn select_bytes(router: u32) -> u32 {
    (256 + 256 + 8 + router) * 4
}

fn neuron_bytes(n: u32) -> u32 {
    let stored = if n > REGISTER_NEURONS { n.next_multiple_of(32) } else { 0 };
    (2 * 32 + 4096 + 2 * 1024 + stored) * 4
}
