//! Prefill attention against softmax(q k) v in f64.

use crate::attention::{Cache, LOG2_E};
use crate::bench::{Bench, Rng, close};
use crate::orders;
use polar_sparsity::backend::cuda::launch::{Kernels, TileSize};
use polar_sparsity::backend::cuda::params::*;
use polar_sparsity::dtype::DType;

/// Prompts of a step.
struct Prompts {
    dtype: DType,
    hd: usize,
    kv_heads: usize,
    group: usize,
    window: usize,
    /// Of each sequence: tokens in the cache after the step, tokens of the step.
    chunks: Vec<(usize, usize)>,
    /// The second sequence begins with the first one's pages, this many.
    shared: usize,
}

fn prompts() -> Prompts {
    Prompts {
        dtype: DType::BF16,
        hd: 64,
        kv_heads: 2,
        group: 1,
        window: usize::MAX,
        chunks: vec![(70, 70), (100, 9), (16, 1), (33, 17), (1, 1), (300, 20)],
        shared: 0,
    }
}

#[test]
pub fn prefill_every_head_size_and_type() {
    for dtype in [DType::BF16, DType::F16] {
        for hd in [64, 80, 96, 128, 256] {
            let chunks = vec![(1, 1), (67, 67), (100, 9)];
            prefill(&Bench::new(0), &Prompts { dtype, hd, group: 2, chunks, ..prompts() });
        }
    }
}

#[test]
fn prefill_every_group() {
    for group in [1, 2, 4, 5, 7, 8, 12, 16] {
        let chunks = vec![(33, 33), (90, 20), (1, 1)];
        prefill(&Bench::new(0), &Prompts { group, chunks, ..prompts() });
        let chunks = vec![(41, 9), (50, 50)];
        prefill(&Bench::new(3), &Prompts { group, window: 21, hd: 128, chunks, ..prompts() });
    }
}

#[test]
fn prefill_in_any_order_of_threads() {
    for (hd, group, window) in [
        (64, 1, usize::MAX),
        (64, 4, 20),
        (80, 7, usize::MAX),
        (96, 16, 33),
        (128, 2, usize::MAX),
        (256, 4, 70),
    ] {
        orders(|b| prefill(b, &Prompts { hd, group, window, ..prompts() }));
    }
}

/// Prompts that end just before, at and after the ends of pages, steps and tiles.
#[test]
fn prefill_lengths_around_every_boundary() {
    for (group, edges) in [(1, [16, 64, 128, 256]), (4, [16, 32, 64, 96]), (7, [16, 18, 36, 64])] {
        let chunks: Vec<_> = edges.iter().flat_map(|&e| [e - 1, e, e + 1]).map(|n| (n, n)).collect();
        prefill(&Bench::new(0), &Prompts { group, kv_heads: 1, chunks, ..prompts() });
        let chunks = edges
            .iter()
            .flat_map(|&e| [(e, 1), (e + 1, 2), (e + 2, 4), (e + 65, 64), (e + 64, 65)])
            .collect();
        prefill(&Bench::new(0), &Prompts { group, kv_heads: 1, chunks, ..prompts() });
    }
}

#[test]
fn prefill_windows() {
    for window in [1, 2, 15, 16, 17, 63, 64, 65, 129] {
        let chunks = vec![(1, 1), (130, 130), (200, 3), (265, 64), (193, 65)];
        prefill(&Bench::new(0), &Prompts { group: 1, kv_heads: 1, window, chunks, ..prompts() });
        let chunks = vec![(80, 80), (140, 30)];
        prefill(&Bench::new(0), &Prompts { group: 5, kv_heads: 1, window, chunks, ..prompts() });
    }
}

#[test]
fn prefill_shared_pages() {
    let chunks = vec![(96, 20), (130, 66), (64, 64)];
    prefill(&Bench::new(0), &Prompts { group: 4, shared: 4, chunks, ..prompts() });
}

/// How a prompt is cut into chunks, and these into tiles, changes no bit of its output.
#[test]
fn prefill_chunks_do_not_change_the_result() {
    for (hd, group, window) in [(64, 1, usize::MAX), (128, 4, usize::MAX), (80, 5, 50), (256, 2, 40)] {
        let of = |chunk: usize, tile| {
            let (length, kv_heads) = (150, 1);
            let p = Prompts { hd, group, window, kv_heads, chunks: vec![(length, length)], ..prompts() };
            let mut all = vec![];
            for at in (0..length).step_by(chunk) {
                let n = chunk.min(length - at);
                all.extend(prefill_part(&Bench::new(0), &p, &[(at + n, n)], tile));
            }
            all
        };
        let whole = of(150, TileSize::Large);
        for (chunk, tile) in [7, 16, 33, 64, 149].into_iter().flat_map(|n| TILES.map(|t| (n, t))) {
            assert!(of(chunk, tile) == whole, "chunks of {chunk}, {tile:?}, head size {hd}, group {group}");
        }
    }
}

/// Figures of an H100, where the choice was measured (TFLOP/s, large and small tiles).
#[test]
fn prefill_tile_size_by_work_of_a_multiprocessor() {
    for (group, kv_heads, context, tokens, expected) in [
        (4, 8, 512, 512, TileSize::Small),    // 86, 98
        (4, 8, 1024, 1024, TileSize::Small),  // 165, 193
        (1, 32, 1024, 1024, TileSize::Small), // 165, 191
        (4, 8, 2048, 2048, TileSize::Large),  // 307, 222
        (1, 32, 2048, 2048, TileSize::Large), // 302, 220
        (4, 8, 8704, 512, TileSize::Small),   // 203, 237
    ] {
        let k = Kernels::new(DType::BF16, 128, group, 132, 227 * 1024).unwrap();
        let each = k.tile_tokens(TileSize::Large);
        let seen = (0..tokens).step_by(each as usize).map(|at| context - tokens + at + each);
        assert!(k.tile_size(seen, kv_heads) == expected, "{tokens} of {context}, {kv_heads} KV heads");
    }
}

const TILES: [TileSize; 2] = [TileSize::Large, TileSize::Small];

/// Runs the prompts with both tiles, whose output must be the same bits.
fn prefill(bench: &Bench, p: &Prompts) -> Vec<u8> {
    let [large, small] = TILES.map(|tile| prefill_part(bench, p, &p.chunks, tile));
    assert!(large == small, "head size {}, group {}", p.hd, p.group);
    large
}

/// Runs `chunks` of the prompts (the same tokens as in any other call with these prompts).
fn prefill_part(bench: &Bench, p: &Prompts, chunks: &[(usize, usize)], tile: TileSize) -> Vec<u8> {
    let (hd, group, heads) = (p.hd, p.group, p.kv_heads * p.group);
    let mut rng = Rng(hd as u64 + group as u64);
    let lengths: Vec<usize> = p.chunks.iter().map(|c| c.0).collect();
    let mut cache = Cache::new(&mut rng, p.dtype, hd, p.kv_heads, &lengths);
    if p.shared > 0 {
        let pages = cache.tables[0][..p.shared].to_vec();
        cache.tables[1][..p.shared].copy_from_slice(&pages);
    }
    // A query for every token of the cache, the step's picked from them.
    let queries: Vec<Vec<f64>> = lengths.iter().map(|l| rng.vector(l * heads * hd, 1.0, p.dtype)).collect();
    let k = Kernels::new(p.dtype, hd as u32, group as u32, 3, 227 * 1024).unwrap();
    let each = k.tile_tokens(tile) as usize;
    let (mut q, mut tiles, mut tables, mut expected) = (vec![], vec![], vec![], vec![]);
    let mut row = 0;
    for (b, &(context, n)) in chunks.iter().enumerate() {
        for at in (0..n).step_by(each) {
            let tokens = (n - at).min(each);
            tiles.extend([row + at, tokens, context - n + at, context, tables.len()].map(|v| v as u32));
        }
        for position in context - n..context {
            let from = (position + 1).saturating_sub(p.window);
            for head in 0..heads {
                let at = (position * heads + head) * hd;
                expected.extend(
                    &cache.attend(b, head / group, &queries[b][at..at + hd], from, position + 1)[..hd],
                );
            }
        }
        q.extend(&queries[b][(context - n) * heads * hd..context * heads * hd]);
        tables.extend(&cache.tables[b]);
        row += n;
    }
    // What no query of a sequence may see is another's or nobody's by now: tokens before the window and
    // after the chunk.
    for (b, &(context, n)) in chunks.iter().enumerate().filter(|_| p.shared == 0) {
        let oldest = (context - n + 1).saturating_sub(p.window);
        for token in (0..oldest).chain(context..lengths[b]) {
            for head in 0..p.kv_heads {
                for kv in 0..2 {
                    let at = cache.at(cache.tables[b][token / 16], head, kv, token % 16);
                    cache.pool[at..at + hd].fill(f64::NAN);
                }
            }
        }
    }
    let out = bench.room(2 * expected.len());
    let params = PrefillParams {
        q: bench.half(&q, p.dtype),
        kv: bench.half(&cache.pool, p.dtype),
        pages: bench.words(&tables),
        tiles: bench.words(&tiles),
        out,
        heads: heads as u32,
        kv_heads: p.kv_heads as u32,
        window: if p.window == usize::MAX { NONE } else { p.window as u32 },
        scale: LOG2_E / (hd as f32).sqrt(),
    };
    bench.start(&k.prefill(tile, tiles.len() as u32 / 5, p.kv_heads as u32), &params);
    let limit = if p.dtype == DType::BF16 { 4e-3 } else { 1e-3 };
    close(
        &bench.read_half(out, expected.len(), p.dtype),
        &expected,
        limit,
        &format!("prefill hd {hd} group {group} window {} {chunks:?} {tile:?}", p.window),
    );
    bench.bytes(out, 2 * expected.len())
}
