//! Any bytes as a router file of a small OPT model. What opens must keep its promises: one entry per
//! layer, densities and table entries in range, every tensor readable.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polar_sparsity::dtype::DType;
use polar_sparsity::format::{Limits, Shards, json};
use polar_sparsity::model::{Fingerprint, ModelSpec, config};
use polar_sparsity::sparsity::RouterFile;
use polar_sparsity::sparsity::router::RouterTensor;
use std::sync::OnceLock;

const CONFIG: &[u8] = br#"{"model_type":"opt","hidden_size":4,"num_attention_heads":2,"ffn_dim":6,
    "num_hidden_layers":2,"vocab_size":8,"max_position_embeddings":8}"#;

static SPEC: OnceLock<ModelSpec> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    let spec = SPEC.get_or_init(|| {
        let object = json::parse("config.json", CONFIG, 8).expect("a config");
        config::read(&object, None, DType::F32, &limits).expect("a spec")
    });
    let end = data.iter().rposition(|b| *b == b'}').map_or(0, |i| i + 1);
    let mut file = (end as u64).to_le_bytes().to_vec();
    file.extend(data);
    for ignore in [false, true] {
        let Ok(source) = Shards::from_bytes(file.clone(), &limits) else { return };
        let print = Fingerprint::of_spec(spec);
        let Ok(routers) = RouterFile::new(Box::new(source), &limits, spec, &print, ignore) else { continue };
        check(&routers, spec);
    }
});

fn check(routers: &RouterFile, spec: &ModelSpec) {
    let layers = spec.num_layers as usize;
    if let Some(a) = &routers.info().attention {
        assert!(a.layers.len() == layers && a.density.len() == layers && a.density[0] == 1.0);
        assert!(a.density.iter().all(|d| *d > 0.0 && *d <= 1.0));
    }
    if let Some(m) = &routers.info().mlp {
        assert!(m.ranks.len() == layers && m.table.len() == m.batch_sizes.len());
        assert!(m.batch_sizes.is_sorted_by(|a, b| a < b));
        assert!(m.table.iter().all(|r| r.len() == layers && r.iter().all(|k| (1..=spec.ffn_size).contains(k))));
    }
    for layer in 0..layers {
        for tensor in RouterTensor::ALL {
            let Some(info) = routers.tensor(layer, tensor) else { continue };
            let mut values = vec![0.0; info.shape.checked_len().expect("a checked size")];
            routers.read_f32(layer, tensor, &mut values).expect("a checked range");
            assert!(values.iter().all(|v| v.is_finite()));
        }
    }
}
