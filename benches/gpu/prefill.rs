//! Prefill attention: causal prompts, and a chunk behind a long context.

use super::kernels::Rng;
use super::timing::Gpu;
use polar_sparsity::backend::cuda::device::Device;
use polar_sparsity::backend::cuda::launch::TileSize;
use polar_sparsity::backend::cuda::params::*;

/// One prompt: (heads, KV heads, tokens in the cache, tokens of the step).
const CASES: &[(u32, u32, u32, u32)] = &[
    (32, 8, 512, 512),
    (32, 8, 1024, 1024),
    (32, 8, 2048, 2048),
    (32, 8, 4096, 4096),
    (32, 8, 8192, 8192),
    (32, 8, 16_384, 16_384),
    (32, 8, 8704, 512),
    (32, 8, 9216, 1024),
    (32, 8, 10_240, 2048),
    (32, 32, 1024, 1024),
    (32, 32, 2048, 2048),
    (32, 32, 4096, 4096),
    (32, 32, 8192, 8192),
    (32, 32, 16_384, 16_384),
    (32, 32, 8704, 512),
];

/// TFLOP/s count 4 head_dim FLOP for each pair of a query and a token it may see. Both tiles; a star marks
/// the one that a step would use.
pub(crate) fn prefill(gpu: &Gpu) {
    for &(heads, kv_heads, context, tokens) in CASES {
        both(gpu, (heads, kv_heads, 128), context, tokens);
    }
    for hd in [64, 80, 96, 256] {
        for (context, tokens) in [(1024, 1024), (2048, 2048), (4096, 4096), (8704, 512)] {
            both(gpu, (32, 8, hd), context, tokens);
        }
    }
}

fn both(gpu: &Gpu, heads: (u32, u32, u32), context: u32, tokens: u32) {
    case(gpu, heads, context, tokens, TileSize::Large);
    if heads.2 <= 128 {
        case(gpu, heads, context, tokens, TileSize::Small);
    }
}

fn case(gpu: &Gpu, (heads, kv_heads, hd): (u32, u32, u32), context: u32, tokens: u32, tile: TileSize) {
    let k = gpu.kernels(hd, heads / kv_heads);
    let tiles_of = |tile| {
        let each = k.tile_tokens(tile);
        // Longest first.
        (0..tokens.div_ceil(each)).rev().map(move |i| (i * each, each.min(tokens - i * each)))
    };
    let seen = tiles_of(TileSize::Large).map(|(at, n)| context - tokens + at + n);
    let used = if hd > 128 || k.tile_size(seen, kv_heads) == tile { "*" } else { "" };
    let pages = context / 16;
    let pool = gpu.random(u64::from(pages * kv_heads * 32 * hd), 1.0);
    let table = gpu.words(&Rng(5).shuffled(pages));
    let q = gpu.random(u64::from(tokens * heads * hd), 1.0);
    let out = gpu.room(u64::from(tokens * heads * hd) * 2);
    let tiles: Vec<u32> =
        tiles_of(tile).flat_map(|(at, n)| [at, n, context - tokens + at, context, 0]).collect();
    let tiles_d = gpu.words(&tiles);
    let params = PrefillParams {
        q: q.at,
        kv: pool.at,
        pages: table.at,
        tiles: tiles_d.at,
        out: out.at,
        heads,
        kv_heads,
        window: NONE,
        scale: std::f32::consts::LOG2_E / (hd as f32).sqrt(),
    };
    let launch = k.prefill(tile, tiles.len() as u32 / 5, kv_heads);
    let us = gpu.time(1, |_| gpu.start(&launch, &params));
    let (n, c) = (f64::from(tokens), f64::from(context));
    let seen = n * (c - n) + n * (n + 1.0) / 2.0;
    let tflops = 4.0 * f64::from(heads * hd) * seen / us / 1e6;
    println!(
        "attention_prefill  {heads}/{kv_heads} hd {hd} {tokens:>5} new of {context:<5} {us:>9.1} us {tflops:>5.0} TFLOP/s {tile:?}{used}"
    );
    gpu.record(&format!(
        r#"{{"kind":"kernel","kernel":"attention_prefill","tile":"{tile:?}","used":{},"heads":{heads},"kv_heads":{kv_heads},"head_dim":{hd},"tokens":{tokens},"context":{context},"us":{us:.2},"tflops":{tflops:.1}}}"#,
        used == "*"
    ));
    gpu.device.synchronize().unwrap();
}
