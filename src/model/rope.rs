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
            // The power in double precision, rounded once. Torch's vectorised `pow` is within one
            // unit of that, and its CPU and CUDA results differ by as much from each other.
            let power = f64::from(self.theta as f32).powf(f64::from(exponent)) as f32;
            let freq = self.scaling.apply(1.0 / power);
            if !freq.is_finite() {
                return Err(Error::format(format!(
                    "config.json: rope_theta is {}, which gives the frequency {freq}",
                    self.theta
                )));
            }
            out.push(freq);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::json;

    fn inv_freq(config: &str, head_dim: u32) -> Result<Vec<f32>> {
        let config = json::parse("c", config.as_bytes(), 9)?;
        Rope::read(&Fields::new("c", &config), 131_072, &Limits::default())?.inv_freq(head_dim)
    }

    const LLAMA3: &str = r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
        "original_max_position_embeddings":8192,"rope_theta":500000.0"#;

    /// Bits of `LlamaRotaryEmbedding(config).inv_freq`, transformers 5.17.0, torch 2.11.0 on a CPU.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let linear = r#"{"rope_theta":1000000,"rope_scaling":{"type":"linear","factor":4.0}}"#.to_owned();
        let llama3 = format!(r#"{{"rope_parameters":{{"rope_type":"llama3",{LLAMA3}}}}}"#);
        let cases: [(&str, &[u32]); 3] = [
            (
                "{}",
                &[
                    0x3f800000, 0x3f0ff59a, 0x3ea1e89b, 0x3e361887, 0x3dcccccd, 0x3d6655c2, 0x3d0186e3,
                    0x3c91ad39, 0x3c23d70a, 0x3bb8449c, 0x3b4f3e38, 0x3ae91528, 0x3a83126f, 0x3a136a16,
                    0x39a5cb60, 0x393a7753,
                ],
            ),
            (
                &linear,
                &[
                    0x3e800000, 0x3da1e89b, 0x3ccccccc, 0x3c0186e3, 0x3b23d709, 0x3a4f3e39, 0x3983126f,
                    0x38a5cb62, 0x37d1b713, 0x3704a2b2, 0x3627c5b0, 0x35543781,
                ],
            ),
            (
                &llama3,
                &[
                    0x3f800000, 0x3f29e1c6, 0x3ee177bc, 0x3e959ee3, 0x3e4693b0, 0x3e03c6a0, 0x3daee4ad,
                    0x3d681e67, 0x3d1a08c8, 0x3ccc6f49, 0x3c87a9c3, 0x3c340d6d, 0x3beef74f, 0x3b9e9402,
                    0x3b527720, 0x3ab3d11d, 0x3a0995d2, 0x393b2dd2, 0x38a3418d, 0x3858ac81, 0x380fc8f8,
                    0x37bed4f4, 0x377d45c3, 0x3728126b, 0x36df10c4, 0x369406cb, 0x36447610, 0x36025f34,
                    0x35ad07a7, 0x3565a54d, 0x351864a7, 0x34ca41b0,
                ],
            ),
        ];
        for (config, bits) in cases {
            let ours = inv_freq(config, 2 * bits.len() as u32).unwrap();
            for (i, (f, bits)) in ours.iter().zip(bits).enumerate() {
                // Over 300 random configs 0.8 % of the values differ, by at most 2 units.
                assert!(f.to_bits().abs_diff(*bits) <= 2, "{config}: frequency {i} is {f}");
            }
        }
    }

    #[test]
    fn both_spellings_say_the_same() {
        let old = format!(r#"{{"rope_theta":500000.0,"rope_scaling":{{"type":"llama3",{LLAMA3}}}}}"#);
        let new = format!(r#"{{"rope_parameters":{{"rope_type":"llama3",{LLAMA3}}}}}"#);
        assert_eq!(inv_freq(&old, 128).unwrap(), inv_freq(&new, 128).unwrap());
        assert_eq!(inv_freq("{}", 64).unwrap(), inv_freq(r#"{"rope_theta":10000}"#, 64).unwrap());
        let null = r#"{"rope_scaling":null,"rope_parameters":null}"#;
        assert_eq!(inv_freq("{}", 64).unwrap(), inv_freq(null, 64).unwrap());
    }

    #[test]
    fn extreme_numbers_stay_finite_or_are_refused() {
        for theta in ["1e-30", "1e38", "1", "340282346638528859811704183484516925440"] {
            if let Ok(f) = inv_freq(&format!(r#"{{"rope_theta":{theta}}}"#), 256) {
                assert!(f.iter().all(|f| f.is_finite()), "{theta}");
            }
        }
        assert!(inv_freq(r#"{"rope_theta":1e-46}"#, 8).is_err());
        assert!(inv_freq(r#"{"rope_theta":1e39}"#, 8).is_err());
    }
}
