//! What a decoder-only transformer is, in plain numbers. Families are data: one forward pass
//! reads these fields, and adding a family means filling them, not writing another pass.

use crate::dtype::DType;

/// The checkpoint families this version reads (`model_type` of `config.json`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// OPT, pre-norm members.
    Opt,
    /// LLaMA 2, 3, 3.1, 3.2.
    Llama,
    /// Mistral 7B and its like.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3, dense.
    Qwen3,
}

impl Family {
    /// Every family, in the order messages list them.
    pub const ALL: [Family; 5] = [Family::Opt, Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// The `model_type` string of Hugging Face configs.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Opt => "opt",
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }
}

/// Normalisation before attention, before the MLP and before the output head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Mean and variance, weight and bias.
    Layer,
    /// Root mean square, weight only.
    Rms,
}

/// How a token learns its position.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// A learned table, row `position + offset` (OPT: offset 2).
    Learned {
        /// Rows of the table that come before position 0.
        offset: u32,
    },
    /// Rotation of halves of q and k (`rotate_half` of the Hugging Face files): dimension `i` pairs
    /// with `i + head_dim/2` and turns by `position * inv_freq[i]`.
    Rope {
        /// `head_dim / 2` frequencies, radians per token, any scaling applied.
        inv_freq: Vec<f32>,
    },
}

/// The MLP's non-linearity, and whether a gate multiplies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `down(relu(up(x)))`: exact zeros, so neurons can be skipped.
    Relu,
    /// `down(silu(gate(x)) * up(x))`.
    SiluGated,
    /// `down(relu(gate(x)) * up(x))`.
    ReluGated,
}

impl Activation {
    /// Whether the MLP has a gate projection beside the up projection.
    pub fn gated(self) -> bool {
        !matches!(self, Activation::Relu)
    }
}

/// One decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Family, for messages and fingerprints.
    pub family: Family,
    /// Rows of the embedding and of the output head.
    pub vocab_size: u32,
    /// Decoder layers.
    pub num_layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Query heads.
    pub num_heads: u32,
    /// Key/value heads; query heads `h*group()..(h+1)*group()` share KV head `h`.
    pub num_kv_heads: u32,
    /// Dimensions of one head.
    pub head_dim: u32,
    /// MLP neurons.
    pub ffn_size: u32,
    /// Longest context, prompt and generated tokens together.
    pub max_positions: u32,
    /// Norm kind, everywhere in the model.
    pub norm: Norm,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Position encoding.
    pub position: Position,
    /// MLP activation.
    pub activation: Activation,
    /// Sliding window: a token sees itself and the `window - 1` tokens before it.
    pub window: Option<u32>,
    /// RMS norm of each head's q and k before the rotation (Qwen 3).
    pub qk_norm: bool,
    /// Biases of the q, k and v projections.
    pub qkv_bias: bool,
    /// Bias of the attention output projection.
    pub o_bias: bool,
    /// Biases of the MLP projections.
    pub mlp_bias: bool,
    /// Output head shares the embedding table.
    pub tied_head: bool,
    /// Dtype of the stored matrices.
    pub dtype: DType,
    /// Token prepended by the tokenizer, if the config names one.
    pub bos_token: Option<u32>,
    /// Tokens that end generation unless a request ignores them.
    pub eos_tokens: Vec<u32>,
}

impl ModelSpec {
    /// Query heads per KV head.
    pub fn group(&self) -> u32 {
        self.num_heads / self.num_kv_heads
    }

    /// Width of the concatenated query heads.
    pub fn q_size(&self) -> usize {
        self.num_heads as usize * self.head_dim as usize
    }

    /// Width of the concatenated KV heads.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }

    /// What scales `q · k`: `1 / sqrt(head_dim)`.
    pub fn attention_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}
