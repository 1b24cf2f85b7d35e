//! Tokens from logits. Pure: no clock, no lock, no device.

mod sampler;

pub(crate) use sampler::uniform;
pub use sampler::{Choice, Scratch, sample};

use crate::error::{Error, Result};

/// Most alternatives whose log probabilities a request may ask for.
pub const MAX_LOGPROBS: usize = 20;

/// Sampling parameters of one request. The order of application: penalties, temperature, min-p,
/// top-k, top-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    /// 0 = greedy.
    pub temperature: f32,
    /// Keep the most likely tokens; 0 = all.
    pub top_k: u32,
    /// Keep the smallest set of likeliest tokens with this mass; 1 = all.
    pub top_p: f32,
    /// Keep tokens at least this share of the likeliest one's probability; 0 = all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 = off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output; 0 = off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; 0 = off.
    pub frequency_penalty: f32,
    /// Seed of the request's own random numbers.
    pub seed: u64,
    /// Alternatives to report with each token, at most [`MAX_LOGPROBS`].
    pub n_logprobs: u32,
    /// Whether the sampled token's own log probability is wanted.
    pub logprob: bool,
}

impl Params {
    /// The likeliest token, nothing else.
    pub const GREEDY: Params = Params {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        n_logprobs: 0,
        logprob: false,
    };

    /// Refuses values out of range, by name.
    pub fn check(&self) -> Result<()> {
        let within = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::invalid(format!("{name} is {value}, allowed is {low} to {high}")))
            }
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?;
        within("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        if self.n_logprobs as usize > MAX_LOGPROBS {
            return Err(Error::invalid(format!("n_logprobs is {}, at most {MAX_LOGPROBS}", self.n_logprobs)));
        }
        Ok(())
    }

    /// Whether earlier tokens change the logits.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
