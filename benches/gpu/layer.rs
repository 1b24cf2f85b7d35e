//! The attention side of a decode layer as a step runs it: norm, QKV product with the router's rows, qkv
//! with the selection, attention, output product; so that what overlaps between kernels is counted.

use crate::kernels::Rng;
use crate::timing::{Gpu, T};
use polar_sparsity::backend::cuda::line::Beside;
use polar_sparsity::backend::cuda::params::*;

/// LLaMA-3.1-8B shapes.
const HIDDEN: u32 = 4096;
const HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HD: u32 = 128;
const QKV: u32 = (HEADS + 2 * KV_HEADS) * HD;

pub(crate) fn layer(gpu: &Gpu) {
    for (batch, context) in [(1, 1024), (1, 8192), (1, 32768), (8, 2048), (16, 2048), (32, 2048)] {
        for keep in [KV_HEADS, 5] {
            // Without a selection the first pages may be loaded before q is there.
            for early in if keep == KV_HEADS { vec![0, 1] } else { vec![0] } {
                case(gpu, batch, context, keep, early);
            }
        }
    }
}

fn case(gpu: &Gpu, batch: u32, context: u32, keep: u32, early: u32) {
    let k = gpu.kernels(HD, HEADS / KV_HEADS);
    let sparse = keep < KV_HEADS;
    let pages = batch * context.div_ceil(16);
    let piece = u64::from(KV_HEADS) * 8192;
    let (w_bytes, o_bytes) = (2 * u64::from(QKV * HIDDEN), 2 * u64::from(HIDDEN * HIDDEN));
    let kv_bytes = u64::from(pages) * piece;
    let needed = w_bytes + o_bytes + kv_bytes / u64::from(KV_HEADS) * u64::from(keep);
    let copies = gpu.copies(needed);
    let weights = gpu.random((w_bytes + o_bytes) / 2 * copies, 0.02);
    let pool = gpu.random(kv_bytes / 2 * copies, 1.0);
    let [router, norm_weight] = [KV_HEADS * HIDDEN, HIDDEN].map(|n| gpu.random(u64::from(n), 0.02));
    let room = |count: u32, bytes: u32| gpu.room(u64::from(count) * u64::from(bytes));
    let residual = room(batch * HIDDEN, 4);
    let [h, q, attention] = [HIDDEN, HEADS * HD, HEADS * HD].map(|n| room(batch * n, 2));
    let n = if sparse { QKV + KV_HEADS } else { QKV };
    let (qkv_launch, qkv_splits) = k.linear(batch, n, HIDDEN);
    let (o_launch, o_splits) = k.linear(batch, HIDDEN, HEADS * HD);
    let (sums, delta) = (room(batch * n, 4 * qkv_splits), room(batch * HIDDEN, 4 * o_splits));
    let pieces = (0..batch).map(|_| (keep, context.div_ceil(16)));
    let line = k.line(pieces.clone(), Beside::Nothing);
    let decode = k.decode(batch, line.worker, false);
    let parts = room(decode.grid.0 * 2 * (HEADS / KV_HEADS) * (HD + 4), 4);
    let (counters, selected, nan) = (room(batch * KV_HEADS, 4), room(batch * KV_HEADS, 2), room(1, 4));
    let rotation = room(context * HD, 4);
    let table: Vec<u32> = {
        let mut rng = Rng(7);
        let mut v: Vec<u32> = (0..pages).collect();
        for i in (1..pages as usize).rev() {
            v.swap(i, (rng.bits() % (i as u64 + 1)) as usize);
        }
        v
    };
    let each = context.div_ceil(16);
    let last = |b: u32| table[(b * each + each - 1) as usize];
    let slots = gpu.words(&(0..batch).map(|b| last(b) * 16 + (context - 1) % 16).collect::<Vec<_>>());
    let first: Vec<u32> = (0..batch).map(|b| b * each).collect();
    let prefix: Vec<u32> = line.prefix(pieces).collect();
    let [table, first, prefix, keeps, tokens, positions, skip] = [
        &table,
        &first,
        &prefix,
        &vec![keep; batch as usize],
        &vec![context; batch as usize],
        &vec![context - 1; batch as usize],
        &vec![0; batch as usize],
    ]
    .map(|v| gpu.words(v));
    let run = |i: u64| {
        let w = weights.at.offset(i * (w_bytes + o_bytes));
        let kv = pool.at.offset(i * kv_bytes);
        let norm = NormParams {
            residual: residual.at,
            delta: Partial { data: delta.at, splits: o_splits, columns: HIDDEN },
            weight: norm_weight.at,
            out: h.at,
            rows: batch,
            hidden: HIDDEN,
            epsilon: 1e-5,
            ..NormParams::default()
        };
        gpu.start(&k.norm(batch, HIDDEN), &norm);
        let product = LinearParams {
            x: h.at,
            w,
            out: sums.at,
            rows: batch,
            n,
            k: HIDDEN,
            splits: qkv_splits,
            more: if sparse { router.at } else { Ptr::NULL },
            first: QKV,
            ..LinearParams::default()
        };
        gpu.start(&qkv_launch, &product);
        let qkv = Partial { data: sums.at, splits: qkv_splits, columns: n };
        let select = SelectParams {
            logits: Partial { data: sums.at.offset(4 * u64::from(QKV)), ..qkv },
            keep: keeps.at,
            selected: selected.at,
            attention: attention.at,
            nan_count: nan.at,
            rows: batch,
            sequences: batch,
            units: KV_HEADS,
            per_unit: 1,
            unit_width: HD * HEADS / KV_HEADS,
            ..SelectParams::default()
        };
        let params = QkvParams {
            qkv,
            rotation: rotation.at,
            positions: positions.at,
            kv_slot: slots.at,
            q: q.at,
            kv,
            rows: batch,
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HD,
            norm_dim: HD,
            epsilon: 1e-5,
            select: if sparse { select } else { SelectParams::default() },
            ..QkvParams::default()
        };
        gpu.start(
            &k.qkv(
                (batch, HEADS + 2 * KV_HEADS, params.qkv.splits),
                if sparse { KV_HEADS } else { 0 },
                false,
            ),
            &params,
        );
        let params = DecodeParams {
            q: q.at,
            kv,
            pages: table.at,
            first_page: first.at,
            tokens: tokens.at,
            skip: skip.at,
            selected: if sparse { selected.at } else { Ptr::NULL },
            keep: keeps.at,
            prefix: prefix.at,
            out: attention.at,
            lse: Ptr::NULL,
            parts: parts.at,
            counters: counters.at,
            page_stride: u64::from(64 * HD * KV_HEADS),
            head_stride: u64::from(64 * HD),
            q_stride: u64::from(HD * HEADS),
            sequences: batch,
            heads: HEADS,
            kv_heads: KV_HEADS,
            stages: k.stages,
            segment_cost: SEGMENT_COST,
            early,
            scale: std::f32::consts::LOG2_E / (HD as f32).sqrt(),
            ..DecodeParams::default()
        };
        gpu.start(&decode, &params);
        let product = LinearParams {
            x: attention.at,
            w: w.offset(w_bytes),
            out: delta.at,
            rows: batch,
            n: HIDDEN,
            k: HEADS * HD,
            splits: o_splits,
            ..LinearParams::default()
        };
        gpu.start(&o_launch, &product);
    };
    let us = gpu.time(copies, run);
    gpu.report(
        "attention layer",
        &format!("B={batch} S={context} keep {keep} early {early}"),
        &format!(
            r#""batch":{batch},"context":{context},"keep":{keep},"early":{early},"dtype":"{}""#,
            T.name()
        ),
        us,
        needed as f64,
    );
}
