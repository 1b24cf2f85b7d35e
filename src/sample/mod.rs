//! Tokens from logits. Pure: no clock, no lock, no device.

/// Most alternatives whose log probabilities a request may ask for.
pub const MAX_LOGPROBS: usize = 20;

/// Checked sampling parameters of one request.
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
