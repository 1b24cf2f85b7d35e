//! Any bytes as `config.json` and, after a zero byte, `generation_config.json`. A spec that comes out
//! must have sizes that multiply without overflow and finite frequencies.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polar_sparsity::dtype::DType;
use polar_sparsity::format::{Limits, json};
use polar_sparsity::model::{Position, config};

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    let mut parts = data.splitn(2, |b| *b == 0);
    let parse = |bytes| json::parse("config.json", bytes, limits.max_json_depth).ok();
    let Some(object) = parts.next().and_then(parse) else { return };
    let generation = parts.next().and_then(parse);
    let Ok(spec) = config::read(&object, generation.as_ref(), DType::BF16, &limits) else { return };
    assert!(spec.num_heads % spec.num_kv_heads == 0 && spec.group() >= 1);
    assert!(spec.eos_tokens.iter().all(|t| *t < spec.vocab_size));
    for role in spec.roles().take(64) {
        spec.shape(role).and_then(|s| s.checked_bytes(DType::F32)).expect("a size that fits");
    }
    if let Position::Rope { inv_freq } = &spec.position {
        assert_eq!(inv_freq.len() as u32 * 2, spec.head_dim);
        assert!(inv_freq.iter().all(|f| f.is_finite()));
    }
});
