//! Which weights a model has, their shapes, and how each family names them. Families are tables.

use super::{Family, LayerRole, ModelSpec, Norm, Position, Role};
use crate::tensor::Shape;

/// Every weight a layer may have, in storage order.
pub const LAYER_ROLES: [LayerRole; 20] = [
    LayerRole::AttnNormWeight,
    LayerRole::AttnNormBias,
    LayerRole::Q,
    LayerRole::QBias,
    LayerRole::K,
    LayerRole::KBias,
    LayerRole::V,
    LayerRole::VBias,
    LayerRole::QNorm,
    LayerRole::KNorm,
    LayerRole::O,
    LayerRole::OBias,
    LayerRole::MlpNormWeight,
    LayerRole::MlpNormBias,
    LayerRole::Gate,
    LayerRole::GateBias,
    LayerRole::Up,
    LayerRole::UpBias,
    LayerRole::Down,
    LayerRole::DownBias,
];

const MODEL_ROLES: [Role; 5] =
    [Role::Embed, Role::PositionEmbed, Role::FinalNormWeight, Role::FinalNormBias, Role::Head];

impl ModelSpec {
    /// The weights of this model: embeddings, layers, final norm, head.
    pub fn roles(&self) -> impl Iterator<Item = Role> {
        let layers =
            (0..self.num_layers).flat_map(|l| LAYER_ROLES.into_iter().map(move |r| Role::Layer(l, r)));
        MODEL_ROLES.into_iter().chain(layers).filter(|r| self.shape(*r).is_some())
    }

    /// The shape of a weight; `None` when the model has none.
    pub fn shape(&self, role: Role) -> Option<Shape> {
        let (hidden, vocab) = (self.hidden_size as usize, self.vocab_size as usize);
        let layer_norm = self.norm == Norm::Layer;
        match role {
            Role::Embed => Some(Shape::d2(vocab, hidden)),
            Role::PositionEmbed => match self.position {
                Position::Learned { offset } => {
                    Some(Shape::d2(self.max_positions as usize + offset as usize, hidden))
                }
                Position::Rope { .. } => None,
            },
            Role::FinalNormWeight => Some(Shape::d1(hidden)),
            Role::FinalNormBias => layer_norm.then(|| Shape::d1(hidden)),
            Role::Head => (!self.tied_head).then(|| Shape::d2(vocab, hidden)),
            Role::Layer(layer, role) if layer < self.num_layers => self.layer_shape(role),
            Role::Layer(..) => None,
        }
    }

    fn layer_shape(&self, role: LayerRole) -> Option<Shape> {
        let (hidden, ffn) = (self.hidden_size as usize, self.ffn_size as usize);
        let (q, kv, head) = (self.q_size(), self.kv_size(), self.head_dim as usize);
        let gated = self.activation.gated();
        let (has, shape) = match role {
            LayerRole::AttnNormWeight | LayerRole::MlpNormWeight => (true, Shape::d1(hidden)),
            LayerRole::AttnNormBias | LayerRole::MlpNormBias => (self.norm == Norm::Layer, Shape::d1(hidden)),
            LayerRole::Q => (true, Shape::d2(q, hidden)),
            LayerRole::K | LayerRole::V => (true, Shape::d2(kv, hidden)),
            LayerRole::O => (true, Shape::d2(hidden, q)),
            LayerRole::QBias => (self.qkv_bias, Shape::d1(q)),
            LayerRole::KBias | LayerRole::VBias => (self.qkv_bias, Shape::d1(kv)),
            LayerRole::OBias => (self.o_bias, Shape::d1(hidden)),
            LayerRole::QNorm | LayerRole::KNorm => (self.qk_norm, Shape::d1(head)),
            LayerRole::Gate => (gated, Shape::d2(ffn, hidden)),
            LayerRole::GateBias => (gated && self.mlp_bias, Shape::d1(ffn)),
            LayerRole::Up => (true, Shape::d2(ffn, hidden)),
            LayerRole::UpBias => (self.mlp_bias, Shape::d1(ffn)),
            LayerRole::Down => (true, Shape::d2(hidden, ffn)),
            LayerRole::DownBias => (self.mlp_bias, Shape::d1(hidden)),
        };
        has.then_some(shape)
    }
}

/// How a family's checkpoints name their tensors. The first prefix under which the embedding is
/// found holds for all names but the head's.
#[derive(Debug)]
pub(super) struct Names {
    /// Prefixes seen in published files, longest first.
    pub(super) prefixes: &'static [&'static str],
    embed: &'static str,
    position: &'static str,
    final_norm: &'static str,
    layer: fn(LayerRole) -> &'static str,
    /// Endings of tensors that files carry and nobody needs.
    unneeded: &'static [&'static str],
}

const HEAD: &str = "lm_head.weight";

impl Names {
    /// The table of a family.
    pub(super) fn of(family: Family) -> &'static Names {
        match family {
            Family::Opt => &OPT,
            Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => &LLAMA,
        }
    }

    /// The embedding's name without prefix: what a prefix is recognised by.
    pub(super) fn embed(&self) -> &'static str {
        self.embed
    }

    /// The tensor's name.
    pub(super) fn name(&self, prefix: &str, role: Role) -> String {
        match role {
            Role::Embed => format!("{prefix}{}", self.embed),
            Role::PositionEmbed => format!("{prefix}{}", self.position),
            Role::FinalNormWeight => format!("{prefix}{}.weight", self.final_norm),
            Role::FinalNormBias => format!("{prefix}{}.bias", self.final_norm),
            Role::Head => HEAD.to_owned(),
            Role::Layer(layer, role) => format!("{prefix}layers.{layer}.{}", (self.layer)(role)),
        }
    }

    /// Whether a tensor nobody asked for may be there: rotation tables that are computed from the
    /// config, format markers, and a second copy of a tied head.
    pub(super) fn is_unneeded(&self, name: &str, tied: bool) -> bool {
        (tied && name == HEAD) || self.unneeded.iter().any(|end| name.ends_with(end))
    }
}

static OPT: Names = Names {
    prefixes: &["model.decoder.", "decoder.", "model.", ""],
    embed: "embed_tokens.weight",
    position: "embed_positions.weight",
    final_norm: "final_layer_norm",
    layer: opt_layer,
    unneeded: &["decoder.version"],
};

static LLAMA: Names = Names {
    prefixes: &["model.", ""],
    embed: "embed_tokens.weight",
    position: "",
    final_norm: "norm",
    layer: llama_layer,
    unneeded: &["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"],
};

fn opt_layer(role: LayerRole) -> &'static str {
    match role {
        LayerRole::AttnNormWeight => "self_attn_layer_norm.weight",
        LayerRole::AttnNormBias => "self_attn_layer_norm.bias",
        LayerRole::O => "self_attn.out_proj.weight",
        LayerRole::OBias => "self_attn.out_proj.bias",
        LayerRole::MlpNormWeight => "final_layer_norm.weight",
        LayerRole::MlpNormBias => "final_layer_norm.bias",
        LayerRole::Up => "fc1.weight",
        LayerRole::UpBias => "fc1.bias",
        LayerRole::Down => "fc2.weight",
        LayerRole::DownBias => "fc2.bias",
        other => llama_layer(other),
    }
}

fn llama_layer(role: LayerRole) -> &'static str {
    match role {
        LayerRole::AttnNormWeight => "input_layernorm.weight",
        LayerRole::AttnNormBias => "input_layernorm.bias",
        LayerRole::Q => "self_attn.q_proj.weight",
        LayerRole::QBias => "self_attn.q_proj.bias",
        LayerRole::K => "self_attn.k_proj.weight",
        LayerRole::KBias => "self_attn.k_proj.bias",
        LayerRole::V => "self_attn.v_proj.weight",
        LayerRole::VBias => "self_attn.v_proj.bias",
        LayerRole::QNorm => "self_attn.q_norm.weight",
        LayerRole::KNorm => "self_attn.k_norm.weight",
        LayerRole::O => "self_attn.o_proj.weight",
        LayerRole::OBias => "self_attn.o_proj.bias",
        LayerRole::MlpNormWeight => "post_attention_layernorm.weight",
        LayerRole::MlpNormBias => "post_attention_layernorm.bias",
        LayerRole::Gate => "mlp.gate_proj.weight",
        LayerRole::GateBias => "mlp.gate_proj.bias",
        LayerRole::Up => "mlp.up_proj.weight",
        LayerRole::UpBias => "mlp.up_proj.bias",
        LayerRole::Down => "mlp.down_proj.weight",
        LayerRole::DownBias => "mlp.down_proj.bias",
    }
}
