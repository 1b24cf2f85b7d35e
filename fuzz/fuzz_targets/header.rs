//! Any bytes as a safetensors file, and as a shard index. What opens must be readable to its last
//! byte.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polar_sparsity::format::{Limits, Shards, TensorSource, index};

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    let _ = index::parse("index", data, &limits);
    check(data.to_vec(), &limits);
    // A right length in front lets the fuzzer get past it.
    let end = data.iter().rposition(|b| *b == b'}').map_or(0, |i| i + 1);
    let mut file = (end as u64).to_le_bytes().to_vec();
    file.extend(data);
    check(file, &limits);
});

fn check(file: Vec<u8>, limits: &Limits) {
    let Ok(source) = Shards::from_bytes(file, limits) else { return };
    for name in source.names() {
        let Ok(info) = source.require(name) else { continue };
        let mut data = vec![0; info.shape.checked_bytes(info.dtype).expect("a checked size")];
        source.read(name, 0, &mut data).expect("a checked range");
        assert!(source.read(name, 1, &mut data).is_err() || data.is_empty());
    }
}
