//! Checkpoints of every family load with the right numbers; everything else is refused by name.

mod files;

use files::*;
use polar_sparsity::dtype::DType;
use polar_sparsity::error::Status;
use polar_sparsity::format::Limits;
use polar_sparsity::model::{
    Activation, Family, LayerRole, LoadOptions, Norm, Position, Role, Weights, load, load_with,
};

fn llama(more: &str, parts: Parts) -> polar_sparsity::Result<polar_sparsity::model::Checkpoint> {
    family("llama", more, parts)
}

fn family(name: &str, more: &str, parts: Parts) -> polar_sparsity::Result<polar_sparsity::model::Checkpoint> {
    checkpoint(&llama_config(name, 2, more), safetensors(&llama_tensors("model.", 2, "BF16", parts), &[]))
}

const HEAD: Parts = Parts { qkv_bias: false, o_bias: false, mlp_bias: false, qk_norm: false, head: true };

fn message(result: polar_sparsity::Result<polar_sparsity::model::Checkpoint>, status: Status) -> String {
    let e = result.expect_err("an error");
    assert_eq!(e.status, status, "{e}");
    assert!(!e.message.contains('\n'), "{e}");
    e.message.into_owned()
}

#[test]
fn opt_loads_under_every_prefix() {
    for prefix in ["model.decoder.", "decoder.", "model.", ""] {
        let tensors = opt_tensors(prefix, 2, "F16", true);
        let c = checkpoint(&opt_config(2, "{}"), safetensors(&tensors, &[])).unwrap();
        let s = c.spec();
        assert_eq!((s.family, s.norm, s.activation), (Family::Opt, Norm::Layer, Activation::Relu));
        assert_eq!((s.norm_eps, s.dtype, s.tied_head), (1e-5, DType::F16, true));
        assert_eq!(s.position, Position::Learned { offset: 2 });
        assert!(s.qkv_bias && s.o_bias && s.mlp_bias && !s.qk_norm);
        assert_eq!((s.bos_token, s.eos_tokens.as_slice()), (Some(2), &[2][..]));
        let total: usize = tensors.iter().map(|t| t.data.len()).sum();
        assert_eq!(c.total_bytes(), total as u64);
        let fc1 = tensors.iter().find(|t| t.name.ends_with("layers.1.fc1.weight")).unwrap();
        let mut rows = vec![0; 3 * HIDDEN * 2];
        c.read_rows(Role::Layer(1, LayerRole::Up), 5, 3, &mut rows).unwrap();
        assert_eq!(rows, fc1.data[5 * HIDDEN * 2..8 * HIDDEN * 2]);
    }
}

#[test]
fn opt_without_biases_loads() {
    let file = safetensors(&opt_tensors("model.decoder.", 2, "F32", false), &[]);
    let c = checkpoint(&opt_config(2, r#"{"enable_bias":false}"#), file).unwrap();
    assert!(!c.spec().qkv_bias && !c.spec().o_bias && !c.spec().mlp_bias);
    assert_eq!(c.info(Role::Layer(0, LayerRole::QBias)), None);
}

#[test]
fn families_differ_as_their_tables_say() {
    let c = llama(
        r#"{"attention_bias":true,"mlp_bias":true}"#,
        Parts { qkv_bias: true, o_bias: true, mlp_bias: true, ..HEAD },
    )
    .unwrap();
    assert!(c.spec().qkv_bias && c.spec().o_bias && c.spec().mlp_bias);
    let c = family("mistral", r#"{"sliding_window":8}"#, HEAD).unwrap();
    assert_eq!((c.spec().window, c.spec().qkv_bias), (Some(8), false));
    let c = family("qwen2", "{}", Parts { qkv_bias: true, ..HEAD }).unwrap();
    assert!(c.spec().qkv_bias && !c.spec().o_bias);
    let c = family("qwen3", "{}", Parts { qk_norm: true, ..HEAD }).unwrap();
    assert!(c.spec().qk_norm && !c.spec().qkv_bias);
    let c = llama(r#"{"hidden_act":"relu"}"#, HEAD).unwrap();
    assert_eq!(c.spec().activation, Activation::ReluGated);
    let c = llama(r#"{"tie_word_embeddings":true}"#, Parts { head: false, ..HEAD }).unwrap();
    assert!(c.spec().tied_head && c.info(Role::Head).is_none());
}

#[test]
fn a_tied_head_and_rotation_tables_may_be_stored_too() {
    let mut tensors = llama_tensors("model.", 2, "F32", HEAD);
    tensors.push(tensor("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[2]));
    tensors.push(tensor("model.rotary_emb.inv_freq", "I64", &[2]));
    checkpoint(&llama_config("llama", 2, r#"{"tie_word_embeddings":true}"#), safetensors(&tensors, &[]))
        .unwrap();
}

#[test]
fn dtypes_may_be_mixed() {
    let mut tensors = llama_tensors("", 2, "BF16", HEAD);
    for t in &mut tensors {
        if t.name.contains("norm") || t.name.ends_with("down_proj.weight") {
            *t = tensor(t.name.clone(), "F32", &t.shape.clone());
        }
    }
    let c = checkpoint(&llama_config("llama", 2, "{}"), safetensors(&tensors, &[])).unwrap();
    assert_eq!(c.spec().dtype, DType::BF16);
    assert_eq!(c.info(Role::Layer(1, LayerRole::Down)).unwrap().dtype, DType::F32);
}

#[test]
fn wrong_tensors_are_named() {
    let tensors = llama_tensors("model.", 2, "F32", HEAD);
    let config = llama_config("llama", 2, "{}");
    let with = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut t = tensors.clone();
        change(&mut t);
        message(checkpoint(&config, safetensors(&t, &[])), Status::E_MODEL)
    };
    assert_eq!(
        with(&|t| t.retain(|t| t.name != "model.norm.weight")),
        "tensor model.norm.weight is missing, shape [16] needed by config.json"
    );
    assert_eq!(
        with(&|t| t.retain(|t| t.name != "model.embed_tokens.weight")),
        "tensor model.embed_tokens.weight is missing, shape [32, 16] needed by config.json"
    );
    assert_eq!(
        with(&|t| t[1] = tensor("model.norm.weight", "F32", &[8])),
        "tensor model.norm.weight: shape [8] stored, [16] needed by config.json"
    );
    assert_eq!(
        with(&|t| t[1] = tensor("model.norm.weight", "I64", &[16])),
        "tensor model.norm.weight: dtype I64 stored in (memory), F32, F16 or BF16 needed"
    );
    assert_eq!(
        with(&|t| t.push(tensor("model.layers.0.self_attn.q_proj.bias", "F32", &[16]))),
        "tensor model.layers.0.self_attn.q_proj.bias: [16] stored, none needed by config.json"
    );
    assert!(with(&|t| t.extend(llama_tensors("model.", 3, "F32", HEAD).split_off(21))).contains("layers.2."));
}

#[test]
fn weights_that_are_not_finite_are_counted_on_request() {
    for (dtype, bad) in [("F32", f32::NAN), ("F16", f32::INFINITY), ("BF16", f32::NEG_INFINITY)] {
        let mut tensors = llama_tensors("model.", 2, dtype, HEAD);
        let k = tensors.iter().position(|t| t.name == "model.layers.1.self_attn.k_proj.weight").unwrap();
        let element = bytes_of(dtype, bad);
        for at in [0, 17] {
            tensors[k].data[at * element.len()..(at + 1) * element.len()].copy_from_slice(&element);
        }
        let file = safetensors(&tensors, &[]);
        let config = llama_config("llama", 2, "{}");
        checkpoint(&config, file.clone()).unwrap();
        let text = message(
            checkpoint_with(&config, None, file, LoadOptions { check_finite: true }),
            Status::E_MODEL,
        );
        assert_eq!(
            text,
            "tensor model.layers.1.self_attn.k_proj.weight: 2 values are NaN or infinite, 0 allowed"
        );
    }
}

#[test]
fn end_tokens_are_merged() {
    let file = safetensors(&llama_tensors("model.", 2, "F32", HEAD), &[]);
    for (config, generation, eos) in [
        (r#"{"eos_token_id":3}"#, None, &[3][..]),
        (r#"{"eos_token_id":[3,4]}"#, Some(r#"{"eos_token_id":[4,5]}"#), &[3, 4, 5]),
        (r#"{"eos_token_id":null}"#, Some(r#"{"eos_token_id":6}"#), &[6]),
        (r#"{"eos_token_id":null}"#, Some("{}"), &[]),
        ("{}", Some(r#"{"eos_token_id":6}"#), &[6]),
        ("{}", None, &[2]),
        (r#"{"eos_token_id":[3,99999]}"#, None, &[3]),
    ] {
        let c = llama_config("llama", 2, config);
        let c = checkpoint_with(&c, generation, file.clone(), LoadOptions::default()).unwrap();
        assert_eq!(c.spec().eos_tokens, eos, "{config} {generation:?}");
    }
}

#[test]
fn windows_are_one_for_all_layers_or_refused() {
    let qwen = |more: &str| family("qwen2", more, Parts { qkv_bias: true, ..HEAD });
    for (more, window) in [
        (r#"{"use_sliding_window":false,"sliding_window":8,"max_window_layers":0}"#, None),
        (r#"{"use_sliding_window":true,"sliding_window":8,"max_window_layers":0}"#, Some(8)),
        (r#"{"use_sliding_window":true,"sliding_window":8,"max_window_layers":2}"#, None),
        (
            r#"{"use_sliding_window":true,"sliding_window":8,"layer_types":["full_attention","full_attention"]}"#,
            None,
        ),
        (
            r#"{"use_sliding_window":true,"sliding_window":8,
                "layer_types":["sliding_attention","sliding_attention"]}"#,
            Some(8),
        ),
    ] {
        assert_eq!(qwen(more).unwrap().spec().window, window, "{more}");
    }
    for (more, word) in [
        (r#"{"use_sliding_window":true,"sliding_window":8,"max_window_layers":1}"#, "sliding_window"),
        (r#"{"layer_types":["sliding_attention","full_attention"]}"#, "sliding_window"),
        (r#"{"layer_types":["full_attention","chunked_attention"]}"#, "layer_types"),
    ] {
        assert!(message(qwen(more), Status::E_UNSUPPORTED).contains(word), "{more}");
    }
    assert!(message(qwen(r#"{"layer_types":["full_attention"]}"#), Status::E_FORMAT).contains("layer_types"));
    let contradiction = r#"{"sliding_window":8,"layer_types":["full_attention","full_attention"]}"#;
    message(family("mistral", contradiction, HEAD), Status::E_UNSUPPORTED);
}

#[test]
fn fields_that_change_the_result_are_refused_by_name() {
    for (more, status, words) in [
        (
            r#"{"quantization_config":{"bits":4}}"#,
            Status::E_UNSUPPORTED,
            &["quantization_config", "bits"][..],
        ),
        (r#"{"attn_logit_softcapping":50.0}"#, Status::E_UNSUPPORTED, &["attn_logit_softcapping", "50.0"]),
        (r#"{"partial_rotary_factor":0.5}"#, Status::E_UNSUPPORTED, &["partial_rotary_factor", "0.5"]),
        (r#"{"num_experts":8}"#, Status::E_UNSUPPORTED, &["num_experts", "8"]),
        (r#"{"hidden_act":"gelu"}"#, Status::E_UNSUPPORTED, &["hidden_act", "gelu", "silu"]),
        (
            r#"{"model_type":"gpt2"}"#,
            Status::E_UNSUPPORTED,
            &["model_type", "gpt2", "opt, llama, mistral, qwen2, qwen3"],
        ),
        (
            r#"{"rope_scaling":{"type":"yarn","factor":2.0}}"#,
            Status::E_UNSUPPORTED,
            &["rope_scaling", "type", "yarn"],
        ),
        (
            r#"{"rope_parameters":{"rope_type":"dynamic"}}"#,
            Status::E_UNSUPPORTED,
            &["rope_parameters", "dynamic"],
        ),
        (
            r#"{"rope_parameters":{"full_attention":{"rope_type":"default"}}}"#,
            Status::E_UNSUPPORTED,
            &["rope_parameters", "full_attention"],
        ),
        (r#"{"rope_scaling":{"type":"linear"}}"#, Status::E_FORMAT, &["rope_scaling", "factor", "missing"]),
        (r#"{"rope_theta":0}"#, Status::E_FORMAT, &["rope_theta", "0"]),
        (r#"{"rms_norm_eps":"small"}"#, Status::E_FORMAT, &["rms_norm_eps", "small"]),
        (r#"{"head_dim":5}"#, Status::E_FORMAT, &["head_dim", "5", "even"]),
        (r#"{"num_key_value_heads":3}"#, Status::E_FORMAT, &["num_key_value_heads", "3", "4"]),
        (r#"{"hidden_size":4294967295}"#, Status::E_LIMIT, &["hidden_size"]),
        (r#"{"head_dim":1024,"num_attention_heads":4096}"#, Status::E_LIMIT, &["head_dim"]),
        (r#"{"tie_word_embeddings":"yes"}"#, Status::E_FORMAT, &["tie_word_embeddings", "yes"]),
        (r#"{"eos_token_id":-1}"#, Status::E_FORMAT, &["eos_token_id", "-1"]),
        (r#"{"model_type":"a\nb"}"#, Status::E_UNSUPPORTED, &["model_type"]),
    ] {
        let text = message(llama(more, HEAD), status);
        for word in words {
            assert!(text.contains(word), "{more}: {text}");
        }
    }
    for (more, word) in [
        (r#"{"do_layer_norm_before":false}"#, "do_layer_norm_before"),
        (r#"{"word_embed_proj_dim":8}"#, "word_embed_proj_dim"),
        (r#"{"_remove_final_layer_norm":true}"#, "_remove_final_layer_norm"),
        (r#"{"layer_norm_elementwise_affine":false}"#, "layer_norm_elementwise_affine"),
        (r#"{"activation_function":"gelu"}"#, "activation_function"),
    ] {
        let file = safetensors(&opt_tensors("model.decoder.", 1, "F32", true), &[]);
        assert!(message(checkpoint(&opt_config(1, more), file), Status::E_UNSUPPORTED).contains(word));
    }
    // Fields of training, of the cache, of another library's making: nothing changes.
    llama(r#"{"pretraining_tp":2,"use_cache":false,"attention_dropout":0.1,"made_up":{"a":[1]}}"#, HEAD)
        .unwrap();
}

#[test]
fn golden_models_load() {
    let Ok(cases) = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden")) else {
        return;
    };
    for case in cases.map(|c| c.unwrap().path()).filter(|p| p.join("config.json").exists()) {
        let limits = Limits::default();
        let c = load_with(&case, &limits, LoadOptions { check_finite: true })
            .unwrap_or_else(|e| panic!("{}: {e}", case.display()));
        let mut bytes = 0;
        for role in c.spec().roles() {
            let info = c.info(role).unwrap();
            let mut all = vec![0; info.shape.checked_bytes(info.dtype).unwrap()];
            c.read_rows(role, 0, info.shape.dims()[0], &mut all).unwrap();
            bytes += all.len() as u64;
        }
        assert_eq!(bytes, c.total_bytes(), "{}", case.display());
        for routers in ["routers.safetensors", "routers_h.safetensors"] {
            let path = case.join(routers);
            if path.exists() {
                let open = polar_sparsity::sparsity::RouterFile::open;
                open(&path, &limits, c.spec(), c.fingerprint(), false)
                    .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            }
        }
    }
}

#[test]
fn golden_configs_that_must_be_refused_are() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/unsupported");
    let Ok(expected) = std::fs::read(format!("{folder}/expected.json")) else { return };
    let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
    for (name, case) in expected.as_object().unwrap() {
        let dir = Folder::new();
        dir.write("config.json", std::fs::read(format!("{folder}/{name}.json")).unwrap());
        dir.write("model.safetensors", safetensors(&[tensor("x", "F32", &[1])], &[]));
        let e = load(dir.path(), &Limits::default()).err().unwrap_or_else(|| panic!("{name} was accepted"));
        for word in case["contains"].as_array().unwrap() {
            assert!(e.message.contains(word.as_str().unwrap()), "{name}: {e}");
        }
        assert!(!e.message.contains("tensor x"), "{name}: {e}");
    }
}
