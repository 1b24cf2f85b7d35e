//! Polar Sparsity: which heads and neurons a decode step computes (arXiv 2505.14884).
//!
//! [`policy`] decides, as plain data ([`Plan`]), what is dense and which `k` each site keeps;
//! [`router`] reads router files; [`select`] is the semantics of a selection; [`Counts`] says what
//! really ran. Policy is host data: no backend, no clock, no global.

mod metadata;
pub mod policy;
pub mod router;
pub mod select;

pub use policy::{
    MlpMode, MlpRule, Options, Plan, Policy, Rule, SeqDemand, SeqSetting, Source, mlp_break_even,
};
pub use router::{RouterFile, RouterInfo};

/// Which of a layer's two sparse sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Attention: units are KV heads (query-head groups).
    Attn,
    /// MLP: units are neurons.
    Mlp,
}

/// Units computed and units a dense model would have computed, for one sequence or summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Attention units (KV heads) computed, over layers and decode tokens.
    pub attn_run: u64,
    /// Attention units a dense model computes.
    pub attn_total: u64,
    /// MLP neurons computed.
    pub mlp_run: u64,
    /// MLP neurons a dense model computes.
    pub mlp_total: u64,
}

impl Counts {
    /// Adds `other`.
    pub fn add(&mut self, other: &Counts) {
        self.attn_run += other.attn_run;
        self.attn_total += other.attn_total;
        self.mlp_run += other.mlp_run;
        self.mlp_total += other.mlp_total;
    }

    /// Share of attention units computed; 1 when nothing was decoded.
    pub fn attn_density(&self) -> f32 {
        ratio(self.attn_run, self.attn_total)
    }

    /// Share of MLP neurons computed; 1 when nothing was decoded.
    pub fn mlp_density(&self) -> f32 {
        ratio(self.mlp_run, self.mlp_total)
    }
}

fn ratio(run: u64, total: u64) -> f32 {
    if total == 0 { 1.0 } else { (run as f64 / total as f64) as f32 }
}
