//! Router files open for the model they were made for, and are refused for any other with a sentence
//! that says why.

#![allow(clippy::unwrap_used, reason = "tests")]

mod files;

use files::*;
use polar_sparsity::Result;
use polar_sparsity::dtype::{DType, widen};
use polar_sparsity::error::Status;
use polar_sparsity::format::{Limits, Shards};
use polar_sparsity::model::{Checkpoint, Weights, fnv1a};
use polar_sparsity::sparsity::router::{AttnUnit, RouterTensor};
use polar_sparsity::sparsity::{RouterFile, RouterInfo};

const LAYERS: usize = 3;
const RANK: usize = 5;

fn opt() -> Checkpoint {
    let file = safetensors(&opt_tensors("model.decoder.", LAYERS, "F32", true), &[]);
    checkpoint(&opt_config(LAYERS, "{}"), file).unwrap()
}

fn llama() -> Checkpoint {
    let parts = Parts { head: true, ..Parts::default() };
    let file = safetensors(&llama_tensors("model.", LAYERS, "F32", parts), &[]);
    checkpoint(&llama_config("llama", LAYERS, "{}"), file).unwrap()
}

/// The fingerprint, from the tensors' bytes rather than from the library.
fn base_model(model: &Checkpoint) -> String {
    let is_opt = model.spec().family.model_type() == "opt";
    let tensors = if is_opt {
        opt_tensors("", LAYERS, "F32", true)
    } else {
        llama_tensors("", LAYERS, "F32", Parts::default())
    };
    let hash = |name: &str| {
        // The values of a test tensor depend on its whole name.
        let full = format!("{}{name}", if is_opt { "model.decoder." } else { "model." });
        let t = tensors.iter().find(|t| t.name == name).unwrap();
        let data = tensor(full, "F32", &t.shape).data;
        fnv1a(&data[..data.len().min(4096)])
    };
    let (family, kv) = if is_opt { ("opt", HEADS) } else { ("llama", KV_HEADS) };
    format!(
        r#"{{"model_type":"{family}","num_layers":3,"hidden_size":16,"num_heads":4,"num_kv_heads":{kv},"head_dim":4,
        "ffn_size":24,"vocab_size":32,"tensors":{{"embed_tokens":"{:016x}","layers.0.q_proj":"{:016x}",
        "layers.1.q_proj":"{:016x}","layers.2.q_proj":"{:016x}"}}}}"#,
        hash("embed_tokens.weight"),
        hash("layers.0.self_attn.q_proj.weight"),
        hash("layers.1.self_attn.q_proj.weight"),
        hash("layers.2.self_attn.q_proj.weight")
    )
}

fn attention_tensors(rows: usize, dtype: &'static str) -> Vec<Tensor> {
    (1..LAYERS)
        .flat_map(|l| {
            [
                tensor(format!("layers.{l}.attention_router.weight"), dtype, &[rows, HIDDEN]),
                tensor(format!("layers.{l}.attention_router.bias"), "F32", &[rows]),
            ]
        })
        .collect()
}

fn mlp_tensors() -> Vec<Tensor> {
    (0..LAYERS)
        .flat_map(|l| {
            [
                tensor(format!("layers.{l}.mlp_router.down.weight"), "F16", &[RANK, HIDDEN]),
                tensor(format!("layers.{l}.mlp_router.up.weight"), "BF16", &[FFN, RANK]),
            ]
        })
        .collect()
}

/// A router file in pieces, so that a test can break one.
#[derive(Clone)]
struct Parted {
    tensors: Vec<Tensor>,
    metadata: Vec<(String, String)>,
}

impl Parted {
    fn new(model: &Checkpoint) -> Parted {
        let mut tensors = attention_tensors(HEADS, "F32");
        tensors.extend(mlp_tensors());
        let text = [
            ("format", "polar-routers".to_owned()),
            ("version", "1".to_owned()),
            ("base_model", base_model(model)),
            ("attention", r#"{"unit":"head","density":[0.9,0.5,1.0]}"#.to_owned()),
            ("mlp", r#"{"k":{"16":[20,21,22],"8":[10,11,12],"1":[1,2,24]}}"#.to_owned()),
            ("training", r#"{"anything":[1,{"goes":null}]}"#.to_owned()),
        ];
        Parted { tensors, metadata: text.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }
    }

    fn set(&mut self, key: &str, value: &str) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_owned(), value.to_owned()));
    }

    fn remove(&mut self, key: &str) {
        self.metadata.retain(|(k, _)| k != key);
    }

    fn replace(&mut self, t: Tensor) {
        self.tensors.retain(|old| old.name != t.name);
        self.tensors.push(t);
    }

    fn open(&self, model: &Checkpoint, ignore: bool) -> Result<RouterFile> {
        let metadata: Vec<(&str, &str)> =
            self.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        let limits = Limits::default();
        let source = Shards::from_bytes(safetensors(&self.tensors, &metadata), &limits)?;
        RouterFile::new(Box::new(source), &limits, model.spec(), model.fingerprint(), ignore)
    }
}

#[test]
fn a_file_says_what_it_holds() {
    let model = opt();
    let file = Parted::new(&model).open(&model, false).unwrap();
    let RouterInfo { attention, mlp } = file.info();
    let attention = attention.as_ref().unwrap();
    assert_eq!(attention.layers, [None, Some(AttnUnit::Head), Some(AttnUnit::Head)]);
    assert_eq!(attention.density, [1.0, 0.5, 1.0]);
    let mlp = mlp.as_ref().unwrap();
    assert_eq!(mlp.ranks, [Some(5); 3]);
    assert_eq!(mlp.batch_sizes, [1, 8, 16]);
    assert_eq!(mlp.table, [[1, 2, 24], [10, 11, 12], [20, 21, 22]]);
    assert_eq!((mlp.k(1, 2), mlp.k(0, 16), mlp.k(0, 17)), (Some(11), Some(20), None));

    assert_eq!(file.tensor(0, RouterTensor::AttnWeight), None);
    let up = file.tensor(2, RouterTensor::MlpUp).unwrap();
    assert_eq!((up.dtype, up.shape.dims()), (DType::BF16, &[FFN, RANK][..]));
    let stored = tensor("layers.2.mlp_router.up.weight", "BF16", &[FFN, RANK]).data;
    let mut values = vec![0.0; FFN * RANK];
    file.read_f32(2, RouterTensor::MlpUp, &mut values).unwrap();
    let mut expected = values.clone();
    widen(DType::BF16, &stored, &mut expected);
    assert_eq!(values, expected);
    let mut part = [0; 6];
    file.read(2, RouterTensor::MlpUp, 4, &mut part).unwrap();
    assert_eq!(part, stored[4..10]);
    assert_eq!(file.read_f32(2, RouterTensor::MlpUp, &mut [0.0; 3]).unwrap_err().status, Status::E_INVALID);
}

#[test]
fn either_kind_may_be_absent() {
    let model = opt();
    let mut attention_only = Parted::new(&model);
    attention_only.tensors.retain(|t| t.name.contains("attention"));
    attention_only.remove("mlp");
    assert!(attention_only.open(&model, false).unwrap().info().mlp.is_none());
    let mut mlp_only = Parted::new(&model);
    mlp_only.tensors.retain(|t| t.name.contains("mlp"));
    mlp_only.remove("attention");
    assert!(mlp_only.open(&model, false).unwrap().info().attention.is_none());
}

#[test]
fn kv_head_routers_have_a_row_per_group() {
    let model = llama();
    let mut file = Parted::new(&model);
    file.remove("mlp");
    for (unit, rows, other) in [("head", HEADS, KV_HEADS), ("kv_head", KV_HEADS, HEADS)] {
        file.set("attention", &format!(r#"{{"unit":"{unit}","density":[1.0,0.5,0.5]}}"#));
        file.tensors = attention_tensors(rows, "F16");
        file.open(&model, false).unwrap();
        file.tensors = attention_tensors(other, "F16");
        let e = file.open(&model, false).err().unwrap();
        assert_eq!(e.status, Status::E_MODEL);
        assert_eq!(
            e.message,
            format!(
                "tensor layers.1.attention_router.weight: shape [{other}, 16] stored, [{rows}, 16] needed by the model"
            )
        );
    }
}

#[test]
fn another_models_routers_are_refused() {
    let model = opt();
    let good = Parted::new(&model);
    let base = base_model(&model);
    let hash = base.split("\"layers.1.q_proj\":\"").nth(1).unwrap()[..16].to_owned();
    for (from, to, words) in [
        ("\"opt\"", "\"llama\"", "its model_type is llama, the model's is opt".to_owned()),
        ("\"num_layers\":3", "\"num_layers\":32", "its num_layers is 32, the model's is 3".to_owned()),
        ("\"vocab_size\":32", "\"vocab_size\":33", "its vocab_size is 33, the model's is 32".to_owned()),
        (
            hash.as_str(),
            "0123456789abcdef",
            format!("its hash of layers.1.q_proj is 0123456789abcdef, the model's is {hash}"),
        ),
    ] {
        let mut file = good.clone();
        file.set("base_model", &base.replace(from, to));
        let e = file.open(&model, false).err().unwrap();
        assert_eq!(e.status, Status::E_MODEL, "{e}");
        assert!(e.message.contains(&words), "{e}");
        file.open(&model, true).unwrap();
    }
    for (key, value) in [("base_model", "{}"), ("base_model", "[]"), ("base_model", "{\"model_type\":")] {
        let mut file = good.clone();
        file.set(key, value);
        assert_eq!(file.open(&model, false).err().unwrap().status, Status::E_FORMAT, "{value}");
    }
    let mut file = good.clone();
    file.remove("base_model");
    assert_eq!(file.open(&model, false).err().unwrap().status, Status::E_FORMAT);
    file.open(&model, true).unwrap();
}

#[test]
fn wrong_metadata_is_named() {
    let model = opt();
    for (key, value, status, words) in [
        ("format", "pt", Status::E_FORMAT, "\"format\" is \"pt\""),
        ("version", "2", Status::E_UNSUPPORTED, "version is \"2\", supported is \"1\""),
        ("attention", r#"{"unit":"row","density":[1,1,1]}"#, Status::E_FORMAT, "unit is \"row\""),
        ("attention", r#"{"unit":"head"}"#, Status::E_FORMAT, "density is missing"),
        ("attention", r#"{"unit":"head","density":[1,1]}"#, Status::E_MODEL, "has 2 layers, the model has 3"),
        ("attention", r#"{"unit":"head","density":[1,0,1]}"#, Status::E_MODEL, "density of layer 1 is 0"),
        ("attention", r#"{"unit":"head","density":[1,1.5,1]}"#, Status::E_MODEL, "density of layer 1 is 1.5"),
        (
            "attention",
            r#"{"unit":"head","density":[1,null,1]}"#,
            Status::E_MODEL,
            "density of layer 1 is null",
        ),
        ("attention", r#"{"unit":"head","density":[1,1e-60,1]}"#, Status::E_MODEL, "density of layer 1"),
        ("mlp", r#"{"k":{}}"#, Status::E_FORMAT, "no batch size"),
        ("mlp", r#"{"k":{"0":[1,1,1]}}"#, Status::E_FORMAT, "batch size \"0\""),
        ("mlp", r#"{"k":{"01":[1,1,1]}}"#, Status::E_FORMAT, "batch size \"01\""),
        ("mlp", r#"{"k":{"-1":[1,1,1]}}"#, Status::E_FORMAT, "batch size \"-1\""),
        ("mlp", r#"{"k":{"1":[1,1,1],"1":[1,1,1]}}"#, Status::E_FORMAT, "duplicate key"),
        ("mlp", r#"{"k":{"1":[1,1]}}"#, Status::E_MODEL, "mlp.k[1] has 2 layers, the model has 3"),
        ("mlp", r#"{"k":{"1":[1,25,1]}}"#, Status::E_MODEL, "mlp.k[1] of layer 1 is 25, needed is 1 to 24"),
        ("mlp", r#"{"k":{"1":[1,0,1]}}"#, Status::E_MODEL, "layer 1 is 0"),
        ("mlp", r#"{"k":{"1":[1,1.5,1]}}"#, Status::E_MODEL, "layer 1 is 1.5"),
        ("mlp", r#"{"k":{"1":7}}"#, Status::E_FORMAT, "mlp.k[1] is 7"),
    ] {
        let mut file = Parted::new(&model);
        file.set(key, value);
        let e = file.open(&model, false).err().unwrap_or_else(|| panic!("{key} {value} was accepted"));
        assert_eq!(e.status, status, "{e}");
        assert!(e.message.contains(words) && !e.message.contains('\n'), "{e}");
    }
    for key in ["format", "attention", "mlp"] {
        let mut file = Parted::new(&model);
        file.remove(key);
        let e = file.open(&model, false).err().unwrap();
        assert_eq!(e.status, Status::E_FORMAT, "{e}");
        assert!(e.message.contains(&format!("metadata \"{key}\" is missing")), "{e}");
    }
}

#[test]
fn wrong_tensors_are_named() {
    let model = opt();
    let check = |change: &dyn Fn(&mut Parted), words: &str| {
        let mut file = Parted::new(&model);
        change(&mut file);
        let e = file.open(&model, true).err().unwrap_or_else(|| panic!("accepted, wanted: {words}"));
        assert_eq!(e.status, Status::E_MODEL, "{e}");
        assert!(e.message.contains(words), "{e}");
    };
    check(
        &|f| f.replace(tensor("layers.1.mlp_router.down.weight", "F32", &[RANK, 8])),
        "layers.1.mlp_router.down.weight: shape [5, 8] stored, [rank, 16] needed",
    );
    check(
        &|f| f.replace(tensor("layers.1.mlp_router.up.weight", "F32", &[FFN, 4])),
        "layers.1.mlp_router.up.weight: shape [24, 4] stored, [24, 5] needed",
    );
    check(
        &|f| f.replace(tensor("layers.2.attention_router.weight", "I64", &[HEADS, HIDDEN])),
        "layers.2.attention_router.weight: dtype I64 stored",
    );
    check(
        &|f| f.tensors.retain(|t| t.name != "layers.2.attention_router.bias"),
        "layers.2.attention_router.bias is missing",
    );
    check(
        &|f| f.tensors.retain(|t| t.name != "layers.2.attention_router.weight"),
        "layers.2.attention_router.weight is missing",
    );
    check(
        &|f| f.tensors.retain(|t| t.name != "layers.0.mlp_router.down.weight"),
        "layers.0.mlp_router.down.weight is missing",
    );
    check(
        &|f| f.tensors.push(tensor("layers.3.mlp_router.up.weight", "F32", &[FFN, RANK])),
        "layers.3.mlp_router.up.weight is no router of a model with 3 layers",
    );
    check(&|f| f.tensors.retain(|t| t.name.contains("mlp")), "no attention router is");
    check(&|f| f.tensors.retain(|t| t.name.contains("attention")), "no MLP router is");
    check(
        &|f| {
            let mut t = tensor("layers.1.attention_router.bias", "F32", &[HEADS]);
            t.data[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
            f.replace(t);
        },
        "layers.1.attention_router.bias: 1 values are NaN or infinite",
    );
    let llama = llama();
    let e = Parted::new(&llama).open(&llama, false).err().unwrap();
    assert!(e.message.contains("for a ReLU model"), "{e}");
}

#[test]
fn flipped_bits_never_panic() {
    let model = opt();
    let parted = Parted::new(&model);
    let metadata: Vec<(&str, &str)> = parted.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    let file = safetensors(&parted.tensors, &metadata);
    let limits = Limits::default();
    for at in 0..file.len() {
        let mut bad = file.clone();
        bad[at] ^= 1 << (at % 8);
        for bytes in [bad, file[..at].to_vec()] {
            let opened = Shards::from_bytes(bytes, &limits).and_then(|s| {
                RouterFile::new(Box::new(s), &limits, model.spec(), model.fingerprint(), false)
            });
            if let Err(e) = opened {
                assert!(e.status.is_error() && !e.message.contains('\n'), "{e}");
            }
        }
    }
}
