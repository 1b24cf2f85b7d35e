//! What is dense and which `k` each site keeps, as data: from (router metadata, engine options,
//! batch) to a printable, hashable [`Plan`]. Pure arithmetic; sources: arXiv 2505.14884 §3.2, §4.

use super::Site;
use super::router::RouterInfo;
use crate::error::{Error, Result, try_with_capacity};
use crate::model::ModelSpec;

/// One site's rule for one group of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Every unit.
    Dense,
    /// The `k` units with the highest scores; ties to the lower index, NaN last.
    TopK(u32),
}

/// How a sequence's MLP runs when decoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MlpMode {
    /// Every neuron.
    #[default]
    Dense,
    /// The paper's rule: the top `K_l(B)` of the batch's summed positive logits, one list for all
    /// `B` sequences in this mode. Couples them.
    Reference,
    /// The sequence's own top `K_l(1)`, whatever else is in the batch; on the CPU also the same bits.
    Invariant,
}

/// Where selections come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Source {
    /// The routers.
    #[default]
    Router,
    /// The true norm of each unit's attention output (an upper bound, for quality tables; saves
    /// nothing).
    Oracle,
    /// Uniformly random units (a lower bound, for quality tables).
    Random {
        /// Seed; with position and layer it fixes the choice.
        seed: u64,
    },
}

/// A sequence's own choice, resolved when it was submitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SeqSetting {
    /// `None`: the engine's default. `Some(1.0)`: dense.
    pub attn_density: Option<f32>,
    /// MLP mode, defaults already applied.
    pub mlp: MlpMode,
}

/// MLP rules of one layer in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MlpRule {
    /// For the sequences in [`MlpMode::Reference`], together.
    pub reference: Rule,
    /// For each sequence in [`MlpMode::Invariant`].
    pub invariant: Rule,
}

impl MlpRule {
    const DENSE: MlpRule = MlpRule { reference: Rule::Dense, invariant: Rule::Dense };

    /// The rule of a mode.
    pub fn of(&self, mode: MlpMode) -> Rule {
        match mode {
            MlpMode::Dense => Rule::Dense,
            MlpMode::Reference => self.reference,
            MlpMode::Invariant => self.invariant,
        }
    }
}

/// What is sparse in one step. Sequences are those of the step that decode, in order; prefill is
/// dense and not in here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Where selections come from.
    pub source: Source,
    /// KV heads of the model.
    units: u32,
    n_seqs: usize,
    /// `[layer][seq]`: KV heads kept; `units` means dense.
    attn_k: Vec<u16>,
    /// Per layer.
    mlp: Vec<MlpRule>,
    any_reference: bool,
    any_invariant: bool,
}

impl Plan {
    /// An empty plan with room for every batch.
    pub fn with_limits(num_layers: usize, max_batch: usize) -> Result<Plan> {
        Ok(Plan {
            attn_k: try_with_capacity(num_layers.saturating_mul(max_batch), "plan")?,
            mlp: try_with_capacity(num_layers, "plan")?,
            ..Plan::default()
        })
    }

    /// Empties it, keeping the room.
    pub fn clear(&mut self) {
        self.n_seqs = 0;
        self.attn_k.clear();
        self.mlp.clear();
        self.any_reference = false;
        self.any_invariant = false;
    }

    /// KV heads that decode sequence `seq` keeps in `layer`.
    pub fn attn_k(&self, layer: usize, seq: usize) -> u32 {
        u32::from(self.attn_k[layer * self.n_seqs + seq])
    }

    /// Whether any sequence skips a head in `layer`.
    pub fn attn_sparse(&self, layer: usize) -> bool {
        let row = &self.attn_k[layer * self.n_seqs..(layer + 1) * self.n_seqs];
        row.iter().any(|&k| u32::from(k) < self.units)
    }

    /// The MLP rules of `layer`.
    pub fn mlp_rule(&self, layer: usize) -> MlpRule {
        self.mlp.get(layer).copied().unwrap_or(MlpRule::DENSE)
    }

    /// Whether any sequence skips a neuron in `layer`.
    pub fn mlp_sparse(&self, layer: usize) -> bool {
        let rule = self.mlp_rule(layer);
        (self.any_reference && rule.reference != Rule::Dense)
            || (self.any_invariant && rule.invariant != Rule::Dense)
    }

    /// Whether a selection at `site` reads router logits.
    pub fn needs_router(&self, site: Site) -> bool {
        site == Site::Mlp || self.source == Source::Router
    }
}

/// Sparsity options of an engine; every zero means "as the router file says".
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// Attention density of layers ≥ 1: 0 = the file's per layer, where it pays; 1 = dense.
    pub attn_density: f32,
    /// MLP density: 0 = the file's `K_l(B)` tables; 1 = dense; else `floor(density * ffn_size)`.
    pub mlp_density: f32,
    /// A layer whose `K_l(B) / ffn_size` is above this runs dense and skips its router; 0 = where the
    /// device says that selecting stops paying.
    pub mlp_dense_above: f32,
    /// Default mode of requests that name none; `None` = reference if there are MLP routers.
    pub mlp_mode: Option<MlpMode>,
    /// Where attention selections come from.
    pub source: Source,
}

/// The part of a step the plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct SeqDemand {
    /// Its settings.
    pub setting: SeqSetting,
    /// Tokens in its cache.
    pub context: u32,
}

/// Turns batches into plans. Immutable.
#[derive(Clone, Debug)]
pub struct Policy {
    options: Options,
    info: Option<RouterInfo>,
    num_layers: usize,
    kv_heads: u32,
    ffn_size: u32,
    weight_bytes: u64,
    kv_bytes_per_token: u64,
    break_even: fn(u32) -> f32,
}

/// Below this bound on the speed-up, sparsity nobody asked for stays off.
const MIN_GAIN: f64 = 1.05;
/// Where a selective MLP stops paying, by the sequences of a batch, unless a device knows better.
pub fn mlp_break_even(_batch: u32) -> f32 {
    0.8
}

impl Policy {
    /// Checks options against the model and the router file.
    pub fn new(
        spec: &ModelSpec,
        info: Option<RouterInfo>,
        options: Options,
        weight_bytes: u64,
        kv_bytes_per_token: u64,
    ) -> Result<Policy> {
        for (name, value) in [
            ("attn_density", options.attn_density),
            ("mlp_density", options.mlp_density),
            ("mlp_dense_above", options.mlp_dense_above),
        ] {
            check_density(name, value)?;
        }
        let has_attn = info.as_ref().is_some_and(|i| i.attention.is_some());
        let has_mlp = info.as_ref().is_some_and(|i| i.mlp.is_some());
        let wants_attn = options.attn_density > 0.0 && options.attn_density < 1.0;
        if wants_attn && !has_attn && options.source == Source::Router {
            return Err(Error::invalid(format!(
                "attn_density {} needs attention routers, none are loaded",
                options.attn_density
            )));
        }
        let wants_mlp = options.mlp_mode.is_some_and(|m| m != MlpMode::Dense)
            || (options.mlp_density > 0.0 && options.mlp_density < 1.0);
        if wants_mlp && !has_mlp {
            return Err(Error::invalid(
                "mlp_mode or mlp_density asks for a sparse MLP, no MLP routers are loaded",
            ));
        }
        Ok(Policy {
            options,
            info,
            num_layers: spec.num_layers as usize,
            kv_heads: spec.num_kv_heads,
            ffn_size: spec.ffn_size,
            weight_bytes,
            kv_bytes_per_token,
            break_even: mlp_break_even,
        })
    }

    /// The same policy for a device on which a selective MLP stops paying elsewhere.
    pub fn with_break_even(self, break_even: fn(u32) -> f32) -> Policy {
        Policy { break_even, ..self }
    }

    /// Resolves a request's own wishes (0 = engine default): attention density and MLP mode.
    pub fn resolve(&self, attn_density: f32, mlp: Option<MlpMode>) -> Result<SeqSetting> {
        check_density("attn_density", attn_density)?;
        let routed = self.options.source != Source::Router
            || self.info.as_ref().is_some_and(|i| i.attention.is_some());
        if attn_density > 0.0 && attn_density < 1.0 && !routed {
            return Err(Error::invalid(format!(
                "attn_density {attn_density} needs attention routers, the engine has none"
            )));
        }
        let has_mlp = self.info.as_ref().is_some_and(|i| i.mlp.is_some());
        if mlp.is_some_and(|m| m != MlpMode::Dense) && !has_mlp {
            return Err(Error::invalid("mlp_mode asks for a sparse MLP, the engine has no MLP routers"));
        }
        let default_mode =
            self.options.mlp_mode.unwrap_or(if has_mlp { MlpMode::Reference } else { MlpMode::Dense });
        Ok(SeqSetting {
            attn_density: (attn_density > 0.0).then_some(attn_density),
            mlp: mlp.unwrap_or(default_mode),
        })
    }

    /// KV heads that a density keeps in a layer: `max(1, floor(density * kv_heads))`; layer 0 is
    /// dense (§3.2 of the paper), and so is a layer without a router.
    pub fn attn_units(&self, layer: usize, density: f32) -> u32 {
        let routed = match self.options.source {
            Source::Router => self
                .info
                .as_ref()
                .and_then(|i| i.attention.as_ref())
                .is_some_and(|a| a.layers[layer].is_some()),
            Source::Oracle | Source::Random { .. } => true,
        };
        if layer == 0 || !routed || density >= 1.0 {
            return self.kv_heads;
        }
        units(density, self.kv_heads)
    }

    /// Neurons `K_l(B)` that a layer keeps for `batch` sequences.
    pub fn mlp_rule(&self, layer: usize, batch: u32) -> Rule {
        let Some(mlp) = self.info.as_ref().and_then(|i| i.mlp.as_ref()) else { return Rule::Dense };
        if mlp.ranks[layer].is_none() {
            return Rule::Dense;
        }
        let k = match self.options.mlp_density {
            0.0 => match mlp.k(layer, batch) {
                Some(k) => k,
                None => return Rule::Dense,
            },
            d if d >= 1.0 => return Rule::Dense,
            d => units(d, self.ffn_size),
        };
        let above = match (self.options.mlp_dense_above, self.options.mlp_density) {
            (0.0, 0.0) => (self.break_even)(batch),
            // A density that was asked for is left out only where nothing could gain.
            (0.0, _) => mlp_break_even(batch),
            (above, _) => above,
        };
        if k >= self.ffn_size || f64::from(k) > f64::from(above) * f64::from(self.ffn_size) {
            Rule::Dense
        } else {
            Rule::TopK(k)
        }
    }

    /// The density a sequence gets in a layer, before rounding to units.
    fn density(&self, setting: &SeqSetting, layer: usize, defaults_pay: bool) -> f32 {
        if let Some(d) = setting.attn_density {
            return d;
        }
        if self.options.attn_density > 0.0 {
            return self.options.attn_density;
        }
        match self.info.as_ref().and_then(|i| i.attention.as_ref()) {
            Some(a) if defaults_pay => a.density[layer],
            _ => 1.0,
        }
    }

    /// Whether the file's default densities can speed this batch up: dense bytes of a step over
    /// sparse bytes, weights included, at least 1.05. A density someone asked for is not asked twice.
    fn defaults_pay(&self, seqs: &[SeqDemand]) -> bool {
        let Some(a) = self.info.as_ref().and_then(|i| i.attention.as_ref()) else { return false };
        let mut kv = 0u64;
        for s in seqs.iter().filter(|s| s.setting.attn_density.is_none()) {
            kv += u64::from(s.context) * self.kv_bytes_per_token;
        }
        let mean = a.density.iter().map(|&d| f64::from(d)).sum::<f64>() / a.density.len().max(1) as f64;
        let dense = self.weight_bytes as f64 + kv as f64;
        let sparse = self.weight_bytes as f64 + kv as f64 * mean;
        dense >= sparse * MIN_GAIN
    }

    /// Fills `plan` for the decode sequences `seqs`, in step order.
    pub fn fill(&self, plan: &mut Plan, seqs: &[SeqDemand]) {
        plan.clear();
        plan.source = self.options.source;
        plan.units = self.kv_heads;
        plan.n_seqs = seqs.len();
        let pay = self.options.attn_density == 0.0 && self.defaults_pay(seqs);
        let reference = seqs.iter().filter(|s| s.setting.mlp == MlpMode::Reference).count() as u32;
        plan.any_reference = reference > 0;
        plan.any_invariant = seqs.iter().any(|s| s.setting.mlp == MlpMode::Invariant);
        for layer in 0..self.num_layers {
            for s in seqs {
                let k = self.attn_units(layer, self.density(&s.setting, layer, pay));
                plan.attn_k.push(k as u16);
            }
            plan.mlp.push(MlpRule {
                reference: if reference > 0 { self.mlp_rule(layer, reference) } else { Rule::Dense },
                invariant: if plan.any_invariant { self.mlp_rule(layer, 1) } else { Rule::Dense },
            });
        }
    }
}

/// `max(1, floor(density * units))`. The product is rounded to f32 first, as the reference does,
/// so that 0.7 of 10 is 7.
fn units(density: f32, units: u32) -> u32 {
    ((density * units as f32).floor() as u32).clamp(1, units)
}

fn check_density(name: &str, value: f32) -> Result<()> {
    if (0.0..=1.0).contains(&value) {
        Ok(())
    } else {
        Err(Error::invalid(format!("{name} is {value}, allowed is 0 to 1")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sparsity::router::MlpInfo;

    /// One layer of 1000 neurons whose table keeps 400, whatever the batch.
    fn keeping_400(options: Options) -> Policy {
        let mlp = MlpInfo { ranks: vec![Some(8)], batch_sizes: vec![64], table: vec![vec![400]] };
        Policy {
            options,
            info: Some(RouterInfo { attention: None, mlp: Some(mlp) }),
            num_layers: 1,
            kv_heads: 1,
            ffn_size: 1000,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            break_even: mlp_break_even,
        }
    }

    fn mlp_rule(policy: &Policy, batch: usize) -> Rule {
        let setting = SeqSetting { attn_density: None, mlp: MlpMode::Reference };
        let mut plan = Plan::default();
        policy.fill(&mut plan, &vec![SeqDemand { setting, context: 1 }; batch]);
        plan.mlp_rule(0).reference
    }

    #[test]
    fn a_devices_break_even_ends_what_nobody_asked_for() {
        let device = |batch| if batch <= 8 { 0.5 } else { 0.3 };
        let tables = keeping_400(Options::default());
        assert_eq!([8, 9].map(|b| mlp_rule(&tables, b)), [Rule::TopK(400); 2], "no device spoke");
        let tables = tables.with_break_even(device);
        assert_eq!([8, 9].map(|b| mlp_rule(&tables, b)), [Rule::TopK(400), Rule::Dense]);
        for asked in [
            Options { mlp_density: 0.4, ..Options::default() },
            Options { mlp_dense_above: 0.45, ..Options::default() },
        ] {
            let policy = keeping_400(asked).with_break_even(device);
            assert_eq!([8, 9].map(|b| mlp_rule(&policy, b)), [Rule::TopK(400); 2], "{asked:?}");
        }
    }
}
