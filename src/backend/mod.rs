//! What a device does for one step, at the height of a layer stage: the largest unit that needs
//! no knowledge of requests, files or policy, and the smallest a backend may fuse.
//!
//! [`decode::enqueue`] is the whole decode loop, written once for every backend.

pub mod cpu;
pub mod cuda;
pub mod decode;
pub mod null;
pub mod step;

pub use step::{NO_LOGITS, Report, Sampled, SeqStep, Step};

use crate::dtype::DType;
use crate::error::Result;
use crate::model::{ModelSpec, Weights};
use crate::sample::Params;
pub use crate::sparsity::Site;
use crate::sparsity::router::RouterFile;

pub use crate::kv::PAGE_TOKENS;

/// What a stage computes for the rows that the plan lets be sparse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Live {
    /// Every unit.
    All,
    /// What the layer's last `select` kept.
    Selected,
}

/// What a backend is and can do.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Short name with the instruction set or device, e.g. `cpu avx512-bf16, 2 threads`.
    pub name: String,
    /// Stages return before the work is done; [`Backend::poll`] waits for it.
    pub asynchronous: bool,
    /// Can select by the true norm of each head's output (tests and quality tables).
    pub oracle: bool,
    /// Share of neurons above which a layer's selective MLP is slower than the dense one, by batch.
    pub mlp_break_even: fn(u32) -> f32,
}

/// Sizes fixed when an engine is created.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most sequences in a step.
    pub max_batch: usize,
    /// Most rows (tokens) in a step, decode and prefill together.
    pub max_rows: usize,
    /// KV pages in the cache.
    pub pages: usize,
    /// Longest context of one sequence, tokens.
    pub max_context: usize,
}

/// How weights are kept on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightOptions {
    /// `None`: as stored. `Some(I8)`: int8 with one scale per row for the layers' matrices.
    pub dtype: Option<DType>,
}

/// Bytes on a device, known before anything is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The model's weights.
    pub weights: u64,
    /// Its routers.
    pub routers: u64,
    /// One KV page over all layers.
    pub page: u64,
    /// What an engine's steps need beside these.
    pub scratch: u64,
}

/// Called while loading with bytes done; a non-zero answer cancels.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> i32;

/// Tokens of a sequence so far, for sampling penalties.
pub trait History: Sync {
    /// A number of the sequence in `slot` that no other sequence has, not 0.
    fn id(&self, slot: u32) -> u64;
    /// Prompt and generated tokens of the sequence in `slot`, and how many are prompt.
    fn tokens(&self, slot: u32) -> (&[u32], usize);
    /// Sampling parameters of the sequence in `slot`.
    fn params(&self, slot: u32) -> &Params;
}

/// A device. Stages are called in the order of [`decode::enqueue`]; between [`Backend::begin`]
/// and [`Backend::end`] the host sees neither activations nor selections.
pub trait Backend: Send + Sync + 'static {
    /// The model, laid out for this device.
    type Weights: Send + Sync;
    /// Its routers, likewise.
    type Routers: Send + Sync;
    /// Page storage; page numbers come from the host.
    type Kv: Send;
    /// Activations, scores, selections: sized once.
    type Scratch: Send;

    /// What it is and can do.
    fn caps(&self) -> Caps;

    /// Free memory for KV pages, in bytes, when the host gives no size.
    fn free_memory(&self) -> Result<u64>;

    /// What a model, its routers and an engine of those limits (without: no scratch) will take.
    fn footprint(
        &self,
        spec: &ModelSpec,
        options: WeightOptions,
        routers: Option<&RouterFile>,
        limits: Option<&Limits>,
    ) -> Result<Footprint>;

    /// Reads the weights, piece by piece, into the device's layout.
    fn upload(
        &self,
        src: &dyn Weights,
        options: WeightOptions,
        progress: Progress<'_>,
    ) -> Result<Self::Weights>;

    /// The model's plain numbers.
    fn spec<'a>(&self, w: &'a Self::Weights) -> &'a ModelSpec;

    /// Bytes the weights take on the device.
    fn weight_bytes(&self, w: &Self::Weights) -> u64;

    /// Reads routers whose file was already checked against `spec`.
    fn upload_routers(&self, spec: &ModelSpec, file: &RouterFile) -> Result<Self::Routers>;

    /// Bytes of one KV page over all layers.
    fn page_bytes(&self, w: &Self::Weights) -> u64;

    /// Before an engine takes anything: an error that names both numbers unless all of it fits.
    fn check_room(&self, _: &Self::Weights, _: Option<&Self::Routers>, _: &Limits) -> Result<()> {
        Ok(())
    }

    /// Page storage for `limits.pages` pages.
    fn kv(&self, w: &Self::Weights, limits: &Limits) -> Result<Self::Kv>;

    /// Everything a step needs beside weights and KV.
    fn scratch(&self, w: &Self::Weights, r: Option<&Self::Routers>, limits: &Limits)
    -> Result<Self::Scratch>;

    /// Starts a step.
    fn begin(&self, w: &Self::Weights, s: &mut Self::Scratch, step: &Step) -> Result<()>;

    /// Token (and learned position) embeddings into the residual stream.
    fn embed(&self, w: &Self::Weights, s: &mut Self::Scratch, step: &Step) -> Result<()>;

    /// Attention norm, QKV products, q/k norms, rotation; K and V of every head into the pages. A backend
    /// may run the layer's attention router and selection here as well, from the routers that `route`
    /// will be given.
    fn project(
        &self,
        w: &Self::Weights,
        r: Option<&Self::Routers>,
        kv: &mut Self::Kv,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
    ) -> Result<()>;

    /// Router logits of the site from the hidden state that entered `project`.
    fn route(
        &self,
        r: &Self::Routers,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
        site: Site,
    ) -> Result<()>;

    /// Units to keep, from the router logits and the step's plan.
    fn select(&self, s: &mut Self::Scratch, step: &Step, layer: usize, site: Site) -> Result<()>;

    /// Attention over the pages, output projection, residual.
    fn attend(
        &self,
        w: &Self::Weights,
        kv: &mut Self::Kv,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()>;

    /// MLP norm, MLP, residual.
    fn mlp(
        &self,
        w: &Self::Weights,
        s: &mut Self::Scratch,
        step: &Step,
        layer: usize,
        live: Live,
    ) -> Result<()>;

    /// Final norm and output head of the rows that want logits.
    fn logits(&self, w: &Self::Weights, s: &mut Self::Scratch, step: &Step) -> Result<()>;

    /// Next tokens of the rows that want them, by each sequence's parameters.
    fn sample(&self, s: &mut Self::Scratch, step: &Step, history: &dyn History) -> Result<()>;

    /// Ends the step: sampled tokens and counts on their way to `report`.
    fn end(&self, s: &mut Self::Scratch, step: &Step, report: &mut Report) -> Result<()>;

    /// Waits up to `timeout_ns` for the step; true when `report` is complete.
    fn poll(&self, s: &mut Self::Scratch, step: &Step, report: &mut Report, timeout_ns: u64) -> Result<bool>;

    /// Copies the logits of entry `index` of [`Step::logit_rows`] (vocabulary many).
    fn read_logits(&self, s: &mut Self::Scratch, index: usize, out: &mut [f32]) -> Result<()>;
}
