//! Rotation frequencies from a config, in the single-precision steps of Hugging Face transformers
//! (`modeling_rope_utils.py`: `_compute_linear_scaling_rope_parameters`,
//! `_compute_llama3_parameters`; the default is `compute_default_rope_parameters` of each
//! `modeling_*.py`). Only scalings that do not depend on the length at run time.

use crate::error::{Error, Result, try_with_capacity};
use crate::format::json::{Object, Value};
use crate::format::{Fields, Limits};
use std::f64::consts::PI;

/// Base of models that name none.
const DEFAULT_THETA: f64 = 10_000.0;

/// How the frequencies of a rotation are scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear { factor: f64 },
    /// LLaMA 3.1: long waves divided by `factor`, short ones kept, a ramp between.
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
}

/// A rotation as the config describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: Scaling,
}

impl Rope {
    /// Reads the old spelling (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`).
    pub(super) fn read(config: &Fields<'_>, max_positions: u32, limits: &Limits) -> Result<Rope> {
        // When both are there, transformers lets the old one win.
        let old = config.object("rope_scaling")?.filter(|o| !o.is_empty());
        let (name, object) = match old {
            Some(object) => ("rope_scaling", Some(object)),
            None => ("rope_parameters", config.object("rope_parameters")?),
        };
        let nothing = Object::new();
        let label = format!("{}: {name}", config.label());
        let rope = Fields::new(&label, object.unwrap_or(&nothing));
        if let Some((key, value)) = object.into_iter().flatten().find(|(_, v)| matches!(v, Value::Object(_)))
        {
            return Err(unsupported(&rope, key, value, "one rotation for all layers"));
        }
        for fields in [&rope, config] {
            if let Some(value) = fields.get("partial_rotary_factor")
                && value.as_f64() != Some(1.0)
            {
                return Err(unsupported(fields, "partial_rotary_factor", value, "1"));
            }
        }
        let theta = match rope.positive("rope_theta")? {
            Some(theta) => theta,
            None => config.positive("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        let kind = match rope.text("rope_type")? {
            Some(kind) => Some(kind),
            None => rope.text("type")?,
        };
        let scaling = match kind.unwrap_or("default") {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: rope.need_positive("factor")? },
            "llama3" => Scaling::llama3(config, &rope, max_positions, limits)?,
            _ => {
                let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
                let value = rope.get(key).unwrap_or(&Value::Null);
                return Err(unsupported(&rope, key, value, "default, linear or llama3"));
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// `head_dim / 2` frequencies, radians per token.
    pub(super) fn inv_freq(&self, head_dim: u32) -> Result<Vec<f32>> {
        let mut out = try_with_capacity(head_dim as usize / 2, "rotation frequencies")?;
        for i in (0..head_dim).step_by(2) {
            let exponent = i as f32 / head_dim as f32;
            // The power in double precision, rounded once: torch's vector `pow` differs from it by
            // at most one unit in the last place.
            let power = f64::from(self.theta as f32).powf(f64::from(exponent)) as f32;
            out.push(self.scaling.apply(1.0 / power));
        }
        Ok(out)
    }
}

impl Scaling {
    fn llama3(
        config: &Fields<'_>,
        rope: &Fields<'_>,
        max_positions: u32,
        limits: &Limits,
    ) -> Result<Scaling> {
        let name = "original_max_position_embeddings";
        let original = match config.count(name, limits.max_positions)? {
            Some(n) => n,
            None => rope.count(name, limits.max_positions)?.unwrap_or(max_positions),
        };
        let factor = rope.need_positive("factor")?;
        let low = rope.need_positive("low_freq_factor")?;
        let high = rope.need_positive("high_freq_factor")?;
        // The ramp divides by their difference.
        if (high - low) as f32 <= 0.0 {
            return Err(Error::format(format!(
                "{}: high_freq_factor is {high}, needed is more than low_freq_factor, {low}",
                rope.label()
            )));
        }
        Ok(Scaling::Llama3 { factor, low, high, original: f64::from(original) })
    }

    /// Scales one frequency. Python numbers stay f64 until they meet a tensor, which makes them
    /// f32; `number / tensor` is `reciprocal(tensor) * number` in torch.
    fn apply(self, freq: f32) -> f32 {
        match self {
            Scaling::Default => freq,
            Scaling::Linear { factor } => freq / factor as f32,
            Scaling::Llama3 { factor, low, high, original } => {
                let wavelength = (1.0 / freq) * (2.0 * PI) as f32;
                if wavelength > (original / low) as f32 {
                    return freq / factor as f32;
                }
                if wavelength < (original / high) as f32 {
                    return freq;
                }
                let smooth = ((1.0 / wavelength) * original as f32 - low as f32) / (high - low) as f32;
                (1.0 - smooth) * freq / factor as f32 + smooth * freq
            }
        }
    }
}

fn unsupported(fields: &Fields<'_>, name: &str, value: &Value, supported: &str) -> Error {
    Error::unsupported(format!("{}: {name} is {value}, supported is {supported}", fields.label()))
}
