//! Tiny model and router files made in memory, valid or broken on purpose. The names are written out
//! here, not taken from the library, so that a wrong table there is found.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]
#![allow(clippy::unwrap_used, reason = "tests")]

use polar_sparsity::error::Result;
use polar_sparsity::format::{Limits, Shards, json};
use polar_sparsity::model::{Checkpoint, LoadOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A tensor to be stored.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A tensor with small, finite, distinct values.
pub fn tensor(name: impl Into<String>, dtype: &'static str, shape: &[usize]) -> Tensor {
    let name = name.into();
    let n: usize = shape.iter().product();
    let seed = name.bytes().fold(7u32, |h, b| h.wrapping_mul(31).wrapping_add(u32::from(b)));
    let value = |i: usize| {
        let hash = seed.wrapping_add(i as u32).wrapping_mul(2_654_435_761);
        (hash >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let data = (0..n).flat_map(|i| bytes_of(dtype, value(i))).collect();
    Tensor { name, dtype, shape: shape.to_vec(), data }
}

/// A value as a stored element.
pub fn bytes_of(dtype: &str, value: f32) -> Vec<u8> {
    match dtype {
        "F32" => value.to_le_bytes().to_vec(),
        "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
        "BF16" => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        "I64" => (value as i64).to_le_bytes().to_vec(),
        other => panic!("no such dtype {other}"),
    }
}

/// A safetensors file of header text and data, as they are.
pub fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

/// A valid safetensors file.
pub fn safetensors(tensors: &[Tensor], metadata: &[(&str, &str)]) -> Vec<u8> {
    let quote = |s: &str| serde_json::Value::from(s).to_string();
    let mut entries = Vec::new();
    if !metadata.is_empty() {
        let pairs: Vec<String> = metadata.iter().map(|(k, v)| format!("{}:{}", quote(k), quote(v))).collect();
        entries.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
    }
    let mut data = Vec::new();
    for t in tensors {
        let (start, end) = (data.len(), data.len() + t.data.len());
        let (name, dtype, shape) = (quote(&t.name), t.dtype, &t.shape);
        entries.push(format!(
            "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
        ));
        data.extend(&t.data);
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

/// Sizes of the tiny models.
pub const VOCAB: usize = 32;
pub const HIDDEN: usize = 16;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 4;
pub const FFN: usize = 24;
pub const POSITIONS: usize = 20;

/// What distinguishes the checkpoints of LLaMA-like families.
#[derive(Clone, Copy, Default)]
pub struct Parts {
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    pub head: bool,
}

/// Tensors of a LLaMA-like checkpoint.
pub fn llama_tensors(prefix: &str, layers: usize, dtype: &'static str, parts: Parts) -> Vec<Tensor> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let mut out = vec![
        tensor(format!("{prefix}embed_tokens.weight"), dtype, &[VOCAB, HIDDEN]),
        tensor(format!("{prefix}norm.weight"), dtype, &[HIDDEN]),
    ];
    if parts.head {
        out.push(tensor("lm_head.weight", dtype, &[VOCAB, HIDDEN]));
    }
    for l in 0..layers {
        let mut add = |name: &str, shape: &[usize], there: bool| {
            if there {
                out.push(tensor(format!("{prefix}layers.{l}.{name}"), dtype, shape));
            }
        };
        add("input_layernorm.weight", &[HIDDEN], true);
        add("self_attn.q_proj.weight", &[q, HIDDEN], true);
        add("self_attn.k_proj.weight", &[kv, HIDDEN], true);
        add("self_attn.v_proj.weight", &[kv, HIDDEN], true);
        add("self_attn.o_proj.weight", &[HIDDEN, q], true);
        add("self_attn.q_proj.bias", &[q], parts.qkv_bias);
        add("self_attn.k_proj.bias", &[kv], parts.qkv_bias);
        add("self_attn.v_proj.bias", &[kv], parts.qkv_bias);
        add("self_attn.o_proj.bias", &[HIDDEN], parts.o_bias);
        add("self_attn.q_norm.weight", &[HEAD_DIM], parts.qk_norm);
        add("self_attn.k_norm.weight", &[HEAD_DIM], parts.qk_norm);
        add("post_attention_layernorm.weight", &[HIDDEN], true);
        add("mlp.gate_proj.weight", &[FFN, HIDDEN], true);
        add("mlp.up_proj.weight", &[FFN, HIDDEN], true);
        add("mlp.down_proj.weight", &[HIDDEN, FFN], true);
        add("mlp.gate_proj.bias", &[FFN], parts.mlp_bias);
        add("mlp.up_proj.bias", &[FFN], parts.mlp_bias);
        add("mlp.down_proj.bias", &[HIDDEN], parts.mlp_bias);
    }
    out
}

/// Tensors of an OPT checkpoint.
pub fn opt_tensors(prefix: &str, layers: usize, dtype: &'static str, bias: bool) -> Vec<Tensor> {
    let mut out = vec![
        tensor(format!("{prefix}embed_tokens.weight"), dtype, &[VOCAB, HIDDEN]),
        tensor(format!("{prefix}embed_positions.weight"), dtype, &[POSITIONS + 2, HIDDEN]),
        tensor(format!("{prefix}final_layer_norm.weight"), dtype, &[HIDDEN]),
        tensor(format!("{prefix}final_layer_norm.bias"), dtype, &[HIDDEN]),
    ];
    for l in 0..layers {
        let mut add = |name: &str, shape: &[usize], there: bool| {
            if there {
                out.push(tensor(format!("{prefix}layers.{l}.{name}"), dtype, shape));
            }
        };
        for norm in ["self_attn_layer_norm", "final_layer_norm"] {
            add(&format!("{norm}.weight"), &[HIDDEN], true);
            add(&format!("{norm}.bias"), &[HIDDEN], true);
        }
        for proj in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            add(&format!("self_attn.{proj}.weight"), &[HIDDEN, HIDDEN], true);
            add(&format!("self_attn.{proj}.bias"), &[HIDDEN], bias);
        }
        add("fc1.weight", &[FFN, HIDDEN], true);
        add("fc1.bias", &[FFN], bias);
        add("fc2.weight", &[HIDDEN, FFN], true);
        add("fc2.bias", &[HIDDEN], bias);
    }
    out
}

/// A config of a LLaMA-like family; `more` is appended, and wins over what is here.
pub fn llama_config(family: &str, layers: usize, more: &str) -> String {
    config(
        &format!(
            r#"{{"model_type":"{family}","vocab_size":{VOCAB},"hidden_size":{HIDDEN},"num_hidden_layers":{layers},
            "num_attention_heads":{HEADS},"num_key_value_heads":{KV_HEADS},"head_dim":{HEAD_DIM},
            "intermediate_size":{FFN},"max_position_embeddings":{POSITIONS},"hidden_act":"silu",
            "rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":false,"sliding_window":null}}"#
        ),
        more,
    )
}

/// An OPT config.
pub fn opt_config(layers: usize, more: &str) -> String {
    config(
        &format!(
            r#"{{"model_type":"opt","vocab_size":{VOCAB},"hidden_size":{HIDDEN},"num_hidden_layers":{layers},
            "num_attention_heads":{HEADS},"ffn_dim":{FFN},"max_position_embeddings":{POSITIONS},
            "activation_function":"relu","do_layer_norm_before":true,"word_embed_proj_dim":{HIDDEN}}}"#
        ),
        more,
    )
}

fn config(base: &str, more: &str) -> String {
    let mut base: serde_json::Map<String, serde_json::Value> = serde_json::from_str(base).unwrap();
    let more: serde_json::Map<String, serde_json::Value> = serde_json::from_str(more).unwrap();
    base.extend(more);
    serde_json::Value::Object(base).to_string()
}

/// A checkpoint from bytes.
pub fn checkpoint(config: &str, file: Vec<u8>) -> Result<Checkpoint> {
    checkpoint_with(config, None, file, LoadOptions::default())
}

/// A checkpoint from bytes, with everything.
pub fn checkpoint_with(
    config: &str,
    generation: Option<&str>,
    file: Vec<u8>,
    options: LoadOptions,
) -> Result<Checkpoint> {
    let limits = Limits::default();
    let config = json::parse("config.json", config.as_bytes(), limits.max_json_depth)?;
    let generation = generation.map(|g| json::parse("g", g.as_bytes(), 9)).transpose()?;
    let source = Box::new(Shards::from_bytes(file, &limits)?);
    Checkpoint::new(&config, generation.as_ref(), source, &limits, options)
}

/// A folder that is removed when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("polar-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
