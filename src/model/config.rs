//! `config.json` to [`ModelSpec`]. Both spellings of Hugging Face configs (before and since
//! transformers 5) are read. Sizes must be written; other absent fields get the family's defaults of
//! transformers. A field that would change the result without being handled is refused by name: a
//! model is either computed as its authors meant or not at all.

use super::rope::Rope;
use super::{Activation, Family, ModelSpec, Norm, Position};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::format::json::{Object, Value};
use crate::format::{Fields, Limits};

/// What transformers assumes when a config leaves a field out.
struct Defaults {
    kv_heads: Option<u32>,
    head_dim: Option<u32>,
    window: Option<u32>,
    tied_head: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Defaults {
    fn of(family: Family) -> Defaults {
        let plain =
            Defaults { kv_heads: None, head_dim: None, window: None, tied_head: false, bos: None, eos: None };
        match family {
            Family::Opt => Defaults { tied_head: true, bos: Some(2), eos: Some(2), ..plain },
            Family::Llama => Defaults { bos: Some(1), eos: Some(2), ..plain },
            Family::Mistral => {
                Defaults { kv_heads: Some(8), window: Some(4096), bos: Some(1), eos: Some(2), ..plain }
            }
            Family::Qwen2 => Defaults { kv_heads: Some(32), ..plain },
            Family::Qwen3 => Defaults { kv_heads: Some(32), head_dim: Some(128), ..plain },
        }
    }
}

/// Fields that must be absent, null, or one of these values; anything else changes the result in a
/// way no code here handles.
const MUST_BE_NEUTRAL: &[(&str, &[Neutral])] = &[
    ("quantization_config", &[]),
    ("compression_config", &[]),
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("query_pre_attn_scalar", &[]),
    ("attention_chunk_size", &[]),
    ("clip_qkv", &[]),
    ("hidden_act_param", &[Neutral::Number(0.0)]),
    ("attention_multiplier", &[]),
    ("embedding_multiplier", &[Neutral::Number(1.0)]),
    ("residual_multiplier", &[Neutral::Number(1.0)]),
    ("logits_scaling", &[Neutral::Number(1.0)]),
    ("logit_scale", &[Neutral::Number(1.0)]),
    ("rotary_pct", &[Neutral::Number(1.0)]),
    ("alibi", &[Neutral::False]),
    ("use_mrope", &[Neutral::False]),
    ("use_qk_norm", &[Neutral::False]),
    ("parallel_attn", &[Neutral::False]),
    ("use_parallel_residual", &[Neutral::False]),
    ("add_cross_attention", &[Neutral::False]),
    ("is_encoder_decoder", &[Neutral::False]),
    ("no_rope_layers", &[Neutral::Empty]),
    ("num_experts", &[Neutral::Number(0.0)]),
    ("num_local_experts", &[Neutral::Number(0.0)]),
    ("n_routed_experts", &[Neutral::Number(0.0)]),
    ("num_experts_per_tok", &[Neutral::Number(0.0)]),
    ("mlp_only_layers", &[Neutral::Empty]),
    ("_remove_final_layer_norm", &[Neutral::False]),
];

/// A value that leaves the computation as it is.
enum Neutral {
    Number(f64),
    False,
    Empty,
}

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Neutral::Number(n) => value.as_f64() == Some(*n),
            Neutral::False => *value == Value::Bool(false),
            Neutral::Empty => matches!(value, Value::Array(a) if a.is_empty()),
        }
    }
}

/// Reads a config. `dtype` is what the weights are stored in; the config's own word for it is only
/// about what they were computed in.
pub fn read(
    config: &Object,
    generation: Option<&Object>,
    dtype: DType,
    limits: &Limits,
) -> Result<ModelSpec> {
    let fields = Fields::new("config.json", config);
    let family = read_family(&fields)?;
    for (name, neutral) in MUST_BE_NEUTRAL {
        if let Some(value) = fields.get(name)
            && !neutral.iter().any(|n| n.is(value))
        {
            return Err(unsupported(name, value, "models without it"));
        }
    }
    let defaults = Defaults::of(family);
    let mut spec = read_sizes(&fields, family, &defaults, dtype, limits)?;
    match family {
        Family::Opt => read_opt(&fields, &mut spec)?,
        _ => read_llama_like(&fields, &defaults, &mut spec, limits)?,
    }
    spec.tied_head = fields.flag("tie_word_embeddings", defaults.tied_head)?;
    read_tokens(&fields, generation, &defaults, &mut spec, limits)?;
    Ok(spec)
}

fn unsupported(name: &str, value: &Value, supported: &str) -> Error {
    Error::unsupported(format!("config.json: {name} is {value}, supported is {supported}"))
}

fn read_family(fields: &Fields<'_>) -> Result<Family> {
    let name = fields.need_text("model_type")?;
    Family::ALL.iter().copied().find(|f| f.model_type() == name).ok_or_else(|| {
        let known: Vec<&str> = Family::ALL.iter().map(|f| f.model_type()).collect();
        unsupported("model_type", &Value::String(name.to_owned()), &known.join(", "))
    })
}

/// The numbers every family has; the rest at its most common value.
fn read_sizes(
    fields: &Fields<'_>,
    family: Family,
    defaults: &Defaults,
    dtype: DType,
    limits: &Limits,
) -> Result<ModelSpec> {
    let opt = family == Family::Opt;
    let hidden_size = fields.need_count("hidden_size", limits.max_hidden)?;
    let num_heads = fields.need_count("num_attention_heads", limits.max_heads)?;
    let kv_default = if fields.is_written("num_key_value_heads") { None } else { defaults.kv_heads };
    let num_kv_heads = match fields.count("num_key_value_heads", limits.max_heads)? {
        _ if opt => num_heads,
        Some(n) => n,
        None => kv_default.unwrap_or(num_heads),
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(Error::format(format!(
            "config.json: num_attention_heads is {num_heads}, not a multiple of num_key_value_heads, {num_kv_heads}"
        )));
    }
    let head_dim = match fields.count("head_dim", limits.max_head_dim)? {
        Some(n) if !opt => n,
        _ => match defaults.head_dim {
            Some(n) => n,
            None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
            None => {
                return Err(Error::format(format!(
                    "config.json: hidden_size is {hidden_size}, not a multiple of num_attention_heads, {num_heads}"
                )));
            }
        },
    };
    if head_dim > limits.max_head_dim {
        return Err(Error::limit(format!(
            "config.json: heads of {head_dim} dimensions, at most {} allowed",
            limits.max_head_dim
        )));
    }
    let q_size = u64::from(num_heads) * u64::from(head_dim);
    if q_size > u64::from(limits.max_hidden) {
        return Err(Error::limit(format!(
            "config.json: num_attention_heads * head_dim is {q_size}, at most {} allowed",
            limits.max_hidden
        )));
    }
    Ok(ModelSpec {
        family,
        vocab_size: fields.need_count("vocab_size", limits.max_vocab)?,
        num_layers: fields.need_count("num_hidden_layers", limits.max_layers)?,
        hidden_size,
        num_heads,
        num_kv_heads,
        head_dim,
        ffn_size: fields.need_count(if opt { "ffn_dim" } else { "intermediate_size" }, limits.max_ffn)?,
        max_positions: fields.need_count("max_position_embeddings", limits.max_positions)?,
        norm: Norm::Rms,
        norm_eps: 1e-6,
        position: Position::Learned { offset: 0 },
        activation: Activation::SiluGated,
        window: None,
        qk_norm: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        tied_head: false,
        dtype,
        bos_token: None,
        eos_tokens: Vec::new(),
    })
}

fn read_opt(fields: &Fields<'_>, spec: &mut ModelSpec) -> Result<()> {
    for name in ["do_layer_norm_before", "layer_norm_elementwise_affine"] {
        if !fields.flag(name, true)? {
            return Err(unsupported(name, &Value::Bool(false), "true"));
        }
    }
    if let Some(value) = fields.get("word_embed_proj_dim")
        && value.as_u64() != Some(u64::from(spec.hidden_size))
    {
        let needed = format!("hidden_size, {}", spec.hidden_size);
        return Err(unsupported("word_embed_proj_dim", value, &needed));
    }
    spec.activation = match fields.text("activation_function")?.unwrap_or("relu") {
        "relu" => Activation::Relu,
        other => return Err(unsupported("activation_function", &Value::String(other.to_owned()), "relu")),
    };
    let bias = fields.flag("enable_bias", true)?;
    spec.norm = Norm::Layer;
    // OPT configs name no epsilon; it is torch's default for LayerNorm.
    spec.norm_eps = 1e-5;
    spec.position = Position::Learned { offset: 2 };
    (spec.qkv_bias, spec.o_bias, spec.mlp_bias) = (bias, bias, bias);
    Ok(())
}

fn read_llama_like(
    fields: &Fields<'_>,
    defaults: &Defaults,
    spec: &mut ModelSpec,
    limits: &Limits,
) -> Result<()> {
    spec.activation = match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Activation::SiluGated,
        "relu" => Activation::ReluGated,
        other => return Err(unsupported("hidden_act", &Value::String(other.to_owned()), "silu or relu")),
    };
    if let Some(eps) = fields.positive("rms_norm_eps")? {
        spec.norm_eps = eps as f32;
    }
    if !spec.head_dim.is_multiple_of(2) {
        return Err(Error::format(format!(
            "config.json: head_dim is {}, needed is an even number to rotate pairs",
            spec.head_dim
        )));
    }
    let rope = Rope::read(fields, spec.max_positions, limits)?;
    spec.position = Position::Rope { inv_freq: rope.inv_freq(spec.head_dim)? };
    spec.window = read_window(fields, defaults, spec, limits)?;
    match spec.family {
        Family::Llama | Family::Qwen3 => {
            let bias = fields.flag("attention_bias", false)?;
            (spec.qkv_bias, spec.o_bias) = (bias, bias);
        }
        Family::Qwen2 => spec.qkv_bias = true,
        Family::Mistral | Family::Opt => {}
    }
    spec.mlp_bias = spec.family == Family::Llama && fields.flag("mlp_bias", false)?;
    spec.qk_norm = spec.family == Family::Qwen3;
    Ok(())
}

/// The window all layers share. Qwen configs may give it to some layers only, which is refused.
fn read_window(
    fields: &Fields<'_>,
    defaults: &Defaults,
    spec: &ModelSpec,
    limits: &Limits,
) -> Result<Option<u32>> {
    let written = fields.is_written("sliding_window");
    let named = fields.count("sliding_window", limits.max_positions)?;
    let qwen = matches!(spec.family, Family::Qwen2 | Family::Qwen3);
    let window = match spec.family {
        Family::Mistral if !written => defaults.window,
        Family::Mistral => named,
        _ if qwen && fields.flag("use_sliding_window", false)? => named,
        _ => None,
    };
    let layers = spec.num_layers;
    // Transformers gives the window to layers from `max_window_layers` on, unless the config names
    // every layer's type.
    let mut with_window = if window.is_none() { 0 } else { layers };
    if qwen && window.is_some() {
        let first = match fields.get("max_window_layers") {
            None => 28,
            Some(v) => v.as_u64().ok_or_else(|| fields.wrong("max_window_layers", v, "a whole number"))?,
        };
        with_window = layers.saturating_sub(u32::try_from(first).unwrap_or(u32::MAX));
    }
    if let Some(types) = fields.array("layer_types")? {
        if types.len() != layers as usize {
            return Err(Error::format(format!(
                "config.json: layer_types has {} entries, num_hidden_layers is {layers}",
                types.len()
            )));
        }
        with_window = 0;
        for value in types {
            match value.as_str() {
                Some("full_attention") => {}
                Some("sliding_attention") => with_window += 1,
                _ => return Err(unsupported("layer_types", value, "full_attention or sliding_attention")),
            }
        }
    }
    // Transformers' Mistral looks at the window alone; a list that says otherwise is a contradiction.
    let contradicts = spec.family == Family::Mistral && with_window == 0 && window.is_some();
    if contradicts || (with_window != 0 && (with_window != layers || window.is_none())) {
        return Err(Error::unsupported(format!(
            "config.json: sliding_window is {} in {with_window} of {layers} layers, supported is one for all",
            window.map_or("null".to_owned(), |w| w.to_string())
        )));
    }
    // A window no context can outgrow is none.
    Ok(window.filter(|w| with_window != 0 && *w < spec.max_positions))
}

fn read_tokens(
    fields: &Fields<'_>,
    generation: Option<&Object>,
    defaults: &Defaults,
    spec: &mut ModelSpec,
    limits: &Limits,
) -> Result<()> {
    let bos = token_ids(fields, "bos_token_id")?;
    spec.bos_token = bos.first().copied().or(match fields.is_written("bos_token_id") {
        true => None,
        false => defaults.bos,
    });
    let mut eos = token_ids(fields, "eos_token_id")?;
    let mut is_named = fields.is_written("eos_token_id");
    if let Some(object) = generation {
        let generation = Fields::new("generation_config.json", object);
        is_named |= generation.is_written("eos_token_id");
        eos.extend(token_ids(&generation, "eos_token_id")?);
    }
    if !is_named {
        eos.extend(defaults.eos);
    }
    for token in eos {
        // An id outside the vocabulary is never generated (shrunken test models have some).
        if token < spec.vocab_size && !spec.eos_tokens.contains(&token) {
            spec.eos_tokens.push(token);
        }
        if spec.eos_tokens.len() > limits.max_eos_tokens {
            return Err(Error::limit(format!(
                "config.json: more than {} end-of-sequence tokens",
                limits.max_eos_tokens
            )));
        }
    }
    spec.bos_token = spec.bos_token.filter(|t| *t < spec.vocab_size);
    Ok(())
}

/// A token id or a list of them.
fn token_ids(fields: &Fields<'_>, name: &str) -> Result<Vec<u32>> {
    let Some(value) = fields.get(name) else { return Ok(Vec::new()) };
    let values =
        if let Value::Array(values) = value { values.as_slice() } else { std::slice::from_ref(value) };
    values
        .iter()
        .map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok()))
        .collect::<Option<Vec<u32>>>()
        .ok_or_else(|| fields.wrong(name, value, "a token id or a list of them"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::json;

    fn spec(text: &str) -> ModelSpec {
        let limits = Limits::default();
        let config = json::parse("config.json", text.as_bytes(), limits.max_json_depth).unwrap();
        read(&config, None, DType::BF16, &limits).unwrap_or_else(|e| panic!("{e}"))
    }

    fn sizes(s: &ModelSpec) -> [u32; 8] {
        [
            s.num_layers,
            s.hidden_size,
            s.num_heads,
            s.num_kv_heads,
            s.head_dim,
            s.ffn_size,
            s.vocab_size,
            s.max_positions,
        ]
    }

    /// The fields of published configs, as their files spell them.
    #[test]
    fn published_configs_are_read() {
        let s = spec(
            r#"{"_name_or_path":"opt-6.7b","activation_dropout":0.0,"activation_function":"relu",
            "architectures":["OPTForCausalLM"],"attention_dropout":0.0,"bos_token_id":2,
            "do_layer_norm_before":true,"dropout":0.1,"eos_token_id":2,"ffn_dim":16384,"hidden_size":4096,
            "init_std":0.02,"layerdrop":0.0,"max_position_embeddings":2048,"model_type":"opt",
            "num_attention_heads":32,"num_hidden_layers":32,"pad_token_id":1,"prefix":"</s>",
            "torch_dtype":"float16","use_cache":true,"vocab_size":50272,"word_embed_proj_dim":4096}"#,
        );
        assert_eq!(sizes(&s), [32, 4096, 32, 32, 128, 16384, 50272, 2048]);
        let s = spec(
            r#"{"architectures":["LlamaForCausalLM"],"bos_token_id":1,"eos_token_id":2,"hidden_act":"silu",
            "hidden_size":4096,"initializer_range":0.02,"intermediate_size":11008,
            "max_position_embeddings":4096,"model_type":"llama","num_attention_heads":32,
            "num_hidden_layers":32,"num_key_value_heads":32,"pretraining_tp":1,"rms_norm_eps":1e-05,
            "rope_scaling":null,"tie_word_embeddings":false,"torch_dtype":"float16","vocab_size":32000}"#,
        );
        assert_eq!(sizes(&s), [32, 4096, 32, 32, 128, 11008, 32000, 4096]);
        assert_eq!((s.norm, s.norm_eps, s.bos_token), (Norm::Rms, 1e-5, Some(1)));
        let s = spec(
            r#"{"attention_bias":false,"attention_dropout":0.0,"bos_token_id":128000,
            "eos_token_id":[128001,128008,128009],"hidden_act":"silu","hidden_size":4096,
            "intermediate_size":14336,"max_position_embeddings":131072,"mlp_bias":false,"model_type":"llama",
            "num_attention_heads":32,"num_hidden_layers":32,"num_key_value_heads":8,"pretraining_tp":1,
            "rms_norm_eps":1e-05,"rope_scaling":{"factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
            "original_max_position_embeddings":8192,"rope_type":"llama3"},"rope_theta":500000.0,
            "tie_word_embeddings":false,"torch_dtype":"bfloat16","vocab_size":128256}"#,
        );
        assert_eq!(sizes(&s), [32, 4096, 32, 8, 128, 14336, 128256, 131072]);
        assert_eq!(s.eos_tokens, [128001, 128008, 128009]);
        let s = spec(
            r#"{"bos_token_id":1,"eos_token_id":2,"hidden_act":"silu","hidden_size":4096,
            "intermediate_size":14336,"max_position_embeddings":32768,"model_type":"mistral",
            "num_attention_heads":32,"num_hidden_layers":32,"num_key_value_heads":8,"rms_norm_eps":1e-05,
            "rope_theta":10000.0,"sliding_window":4096,"tie_word_embeddings":false,"vocab_size":32000}"#,
        );
        assert_eq!(s.window, Some(4096));
        let s = spec(
            r#"{"attention_dropout":0.0,"bos_token_id":151643,"eos_token_id":151645,"hidden_act":"silu",
            "hidden_size":5120,"intermediate_size":13824,"max_position_embeddings":32768,
            "max_window_layers":70,"model_type":"qwen2","num_attention_heads":40,"num_hidden_layers":48,
            "num_key_value_heads":8,"rms_norm_eps":1e-06,"rope_theta":1000000.0,"sliding_window":131072,
            "tie_word_embeddings":false,"use_sliding_window":false,"vocab_size":152064}"#,
        );
        assert_eq!(sizes(&s), [48, 5120, 40, 8, 128, 13824, 152064, 32768]);
        assert!(s.qkv_bias && !s.o_bias && s.window.is_none());
        let s = spec(
            r#"{"attention_bias":false,"attention_dropout":0.0,"bos_token_id":151643,"eos_token_id":151645,
            "head_dim":128,"hidden_act":"silu","hidden_size":1024,"intermediate_size":3072,
            "max_position_embeddings":40960,"max_window_layers":28,"model_type":"qwen3",
            "num_attention_heads":16,"num_hidden_layers":28,"num_key_value_heads":8,"rms_norm_eps":1e-06,
            "rope_scaling":null,"rope_theta":1000000,"sliding_window":null,"tie_word_embeddings":true,
            "use_sliding_window":false,"vocab_size":151936}"#,
        );
        assert_eq!((s.q_size(), s.qk_norm, s.tied_head), (2048, true, true));
    }

    #[test]
    fn absent_fields_have_the_family_s_defaults() {
        let base = |family: &str| {
            spec(&format!(
                r#"{{"model_type":"{family}","hidden_size":4096,"intermediate_size":64,"num_hidden_layers":2,
                "num_attention_heads":64,"vocab_size":100,"max_position_embeddings":32768}}"#
            ))
        };
        let [llama, mistral, qwen2, qwen3] = ["llama", "mistral", "qwen2", "qwen3"].map(base);
        assert_eq!([&llama, &mistral, &qwen2, &qwen3].map(|s| s.num_kv_heads), [64, 8, 32, 32]);
        assert_eq!([&llama, &mistral, &qwen2, &qwen3].map(|s| s.head_dim), [64, 64, 64, 128]);
        assert_eq!([&llama, &mistral, &qwen2, &qwen3].map(|s| s.window), [None, Some(4096), None, None]);
        assert_eq!([&llama, &mistral, &qwen2, &qwen3].map(|s| s.eos_tokens.len()), [1, 1, 0, 0]);
    }
}
