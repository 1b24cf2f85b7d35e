//! The cases of each kernel.

use crate::timing::{Gpu, by_library};
use polar_sparsity::backend::cuda::device::Device;
use polar_sparsity::backend::cuda::launch::{Kernels, MADE_ROWS};
use polar_sparsity::backend::cuda::line::{Beside, Worker};
use polar_sparsity::backend::cuda::params::*;

/// splitmix64, for lengths, page orders and selections.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
    pub(crate) fn normal(&mut self) -> f64 {
        (-2.0 * self.unit().max(1e-12).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
    }
    pub(crate) fn shuffled(&mut self, n: u32) -> Vec<u32> {
        let mut v: Vec<u32> = (0..n).collect();
        for i in (1..n as usize).rev() {
            v.swap(i, (self.bits() % (i as u64 + 1)) as usize);
        }
        v
    }
}

/// Lengths of `batch` sequences with mean `context`; ragged: log-normal, sigma 0.8.
fn lengths(rng: &mut Rng, batch: u32, context: u32, ragged: bool) -> Vec<u32> {
    if !ragged {
        return vec![context; batch as usize];
    }
    let raw: Vec<f64> = (0..batch).map(|_| (0.8 * rng.normal()).exp()).collect();
    let mean = raw.iter().sum::<f64>() / f64::from(batch);
    raw.iter().map(|r| ((r / mean * f64::from(context)) as u32).max(1)).collect()
}

/// Decode attention, head size 128.
pub(crate) fn attention(gpu: &Gpu) {
    // (heads, KV heads, densities): LLaMA-3.1-8B, then LLaMA-2-7B and OPT-6.7B.
    for (heads, kv_heads, densities) in [(32, 8, [1.0, 0.625, 0.5]), (32, 32, [1.0, 0.5, 0.3])] {
        for density in densities {
            for (batch, context) in [(1, 2048), (1, 32_768), (8, 2048), (64, 2048), (64, 8192)] {
                attention_case(gpu, (heads, kv_heads, batch, context, density, false));
            }
            for batch in [32, 64, 128] {
                attention_case(gpu, (heads, kv_heads, batch, 2048, density, true));
            }
        }
    }
    for density in [1.0, 0.5, 0.3] {
        attention_case(gpu, (72, 72, 64, 1920, density, false)); // OPT-66B
    }
    for density in [1.0, 0.75] {
        attention_case(gpu, (28, 4, 64, 4096, density, false)); // Qwen2.5-7B
    }
}

fn attention_case(
    gpu: &Gpu,
    (heads, kv_heads, batch, context, density, ragged): (u32, u32, u32, u32, f64, bool),
) {
    const HD: u32 = 128;
    let mut rng = Rng(7);
    let mut k = gpu.kernels(HD, heads / kv_heads);
    let lengths = lengths(&mut rng, batch, context, ragged);
    let pages: u32 = lengths.iter().map(|l| l.div_ceil(16)).sum();
    let keep = ((f64::from(kv_heads) * density) as u32).max(1);
    let layer_bytes = u64::from(pages) * u64::from(kv_heads) * 8192;
    let needed = lengths.iter().map(|&l| f64::from(l)).sum::<f64>() * f64::from(keep) * 512.0;
    let copies = gpu.copies(needed as u64).min((40u64 << 30) / layer_bytes).max(1);
    let pool = gpu.random(layer_bytes / 2 * copies, 1.0);
    let table = gpu.words(&rng.shuffled(pages));
    let mut first = vec![0];
    for l in &lengths {
        first.push(first.last().unwrap() + l.div_ceil(16));
    }
    let mut selected: Vec<u16> = vec![];
    for _ in 0..batch {
        let mut kept = rng.shuffled(kv_heads)[..keep as usize].to_vec();
        kept.sort_unstable();
        kept.resize(kv_heads as usize, 0);
        selected.extend(kept.iter().map(|&h| h as u16));
    }
    let packed: Vec<u32> =
        selected.chunks(2).map(|c| u32::from(c[0]) | u32::from(*c.get(1).unwrap_or(&0)) << 16).collect();
    let (q, out) =
        (gpu.random(u64::from(batch * heads * HD), 1.0), gpu.room(u64::from(batch * heads * HD * 2)));
    let [first, lengths_d, keep_d] = [&first, &lengths, &vec![keep; batch as usize]].map(|v| gpu.words(v));
    let skip = gpu.words(&vec![0; batch as usize]);
    let selected = gpu.words(&packed);
    let parts =
        gpu.room(u64::from(k.decode_workers()) * 2 * u64::from(heads / kv_heads) * u64::from(HD + 4) * 4);
    let counters = gpu.room(u64::from(batch * kv_heads) * 4);
    // As launched, with one more load under way per warp, and in single blocks of four warps where those are not.
    let pieces = lengths.iter().map(|l| (keep, l.div_ceil(16)));
    let line = |k: &Kernels| k.line(pieces.clone(), Beside::Nothing);
    let mut variants = vec![(k.stages, true), (k.stages + 1, true)];
    if line(&k).worker != Worker::Small {
        variants.push((k.stages, false));
    }
    for (stages, others) in variants {
        k.stages = stages;
        (k.tuning.large, k.tuning.clusters) = (others, others);
        let line = line(&k);
        let launch = k.decode(batch, line.worker, false);
        let prefix = gpu.words(&line.prefix(pieces.clone()).collect::<Vec<_>>());
        let params = |i: u64| DecodeParams {
            q: q.at,
            kv: pool.at.offset(i * layer_bytes),
            pages: table.at,
            first_page: first.at,
            tokens: lengths_d.at,
            skip: skip.at,
            selected: if density < 1.0 { selected.at } else { Ptr::NULL },
            keep: keep_d.at,
            prefix: prefix.at,
            out: out.at,
            lse: Ptr::NULL,
            parts: parts.at,
            counters: counters.at,
            page_stride: u64::from(kv_heads) * 8192,
            head_stride: 8192,
            q_stride: u64::from(heads * HD),
            sequences: batch,
            heads,
            kv_heads,
            stages: k.stages,
            segment_cost: SEGMENT_COST,
            early: 0,
            scale: std::f32::consts::LOG2_E / (HD as f32).sqrt(),
            ..DecodeParams::default()
        };
        let us = gpu.time(copies, |i| gpu.start(&launch, &params(i)));
        let kind = if ragged { "ragged" } else { "equal" };
        let (large, cluster) = (line.worker == Worker::Large, launch.cluster);
        let blocks = match line.worker {
            Worker::Small => String::new(),
            Worker::Large => " large".into(),
            Worker::Cluster { blocks, .. } => format!(" by {blocks}"),
        };
        gpu.report(
            "attention_decode",
            &format!(
                "{heads}/{kv_heads} B={batch} S={context} {kind} density {density} stages {stages}{blocks}"
            ),
            &format!(
                r#""batch":{batch},"context":{context},"heads":{heads},"kv_heads":{kv_heads},"density":{density},"ragged":{ragged},"stages":{stages},"large":{large},"cluster":{cluster}"#
            ),
            us,
            needed,
        );
    }
}

/// Products of a decode step, LLaMA-3.1-8B shapes and OPT-6.7B's.
pub(crate) fn products(gpu: &Gpu) {
    let shapes = [
        ("qkv", 6144, 4096),
        ("o", 4096, 4096),
        ("gate_up", 28672, 4096),
        ("down", 4096, 14336),
        ("head", 128_256, 4096),
    ];
    for (name, n, k) in shapes {
        for rows in [1, 8, 16, 32, 64, 128, 512] {
            if rows <= 64 {
                product(gpu, "linear", name, rows, n, k, None);
            }
            product(gpu, "cublaslt", name, rows, n, k, None);
        }
    }
}

fn product(gpu: &Gpu, kernel: &str, name: &str, rows: u32, n: u32, k: u32, stored: Option<u32>) {
    let kernels = gpu.kernels(128, 1);
    let down = kernel == "linear_down";
    let (launch, splits) = match kernel {
        "linear_down" => kernels.linear_transposed(rows, n, k),
        "linear_up" => kernels.linear_up(rows, n, k),
        _ => kernels.linear(rows, n, k),
    };
    let bytes = u64::from(n) * u64::from(k) * 2;
    let matrix = stored.map_or(bytes, |s| bytes / u64::from(if down { k } else { n }) * u64::from(s));
    let copies = gpu.copies(bytes);
    let w = gpu.random(matrix / 2 * copies, 0.02);
    let x = gpu.random(u64::from(rows) * u64::from(k), 1.0);
    let out = gpu.room(u64::from(splits) * u64::from(rows) * u64::from(n) * 4);
    let picked = if down { k } else { n };
    let mut rng = Rng(3);
    let list = stored.map(|s| {
        let mut l = rng.shuffled(s)[..picked as usize].to_vec();
        l.sort_unstable();
        gpu.words(&l)
    });
    let us = gpu.time(copies, |i| {
        let params = LinearParams {
            x: x.at,
            w: w.at.offset(i * matrix),
            index: list.as_ref().map_or(Ptr::NULL, |l| l.at),
            out: out.at,
            rows,
            n,
            k,
            splits,
            ..LinearParams::default()
        };
        if kernel != "cublaslt" || !gpu.device.product(&by_library(&params)).unwrap() {
            gpu.start(&launch, &params);
        }
    });
    let tflops = 2.0 * f64::from(rows) * f64::from(n) * f64::from(k) / us / 1e6;
    gpu.report(
        kernel,
        &format!("{name} {n}x{k} B={rows} splits {splits} {tflops:.0} TFLOP/s"),
        &format!(r#""name":"{name}","rows":{rows},"n":{n},"k":{k},"splits":{splits},"tflops":{tflops:.1}"#),
        us,
        bytes as f64,
    );
}

/// The MLP's router chain and selective products, OPT-6.7B.
pub(crate) fn selective_mlp(gpu: &Gpu) {
    let (d, ffn) = (4096, 16384);
    for rows in [1, 8, 16, 32, 64] {
        for share in [0.1, 0.2, 0.3, 0.5, 1.0] {
            let kept = (f64::from(ffn) * share / 8.0) as u32 * 8;
            product(gpu, "linear_up", &format!("up {share}"), rows, kept, d, Some(ffn));
            product(gpu, "linear_down", &format!("down {share}"), rows, d, kept, Some(ffn));
            for by in [Activation::Apart, Activation::Up, Activation::Down] {
                mlp(gpu, by, share, (rows, kept, d, ffn));
            }
        }
    }
    for rows in [1, 8, 32, 64] {
        let rank = 1024;
        product(gpu, "linear", "router down", rows, rank, d, None);
        let (group, scores) = (gpu.room(4 * u64::from(rows)), gpu.room(4 * u64::from(ffn)));
        for width in [2, 1] {
            router_scores(gpu, width, (rows, ffn, rank), group.at, scores.at);
        }
        // Of these scores.
        for keep in [1632, 4912] {
            select(gpu, scores.at, ffn, keep, &format!("router's, B={rows}"));
        }
    }
    for n in [16_384, 36_864] {
        let mut rng = Rng(1);
        let spread = |rng: &mut Rng, positive: f64| -> Vec<u32> {
            (0..n)
                .map(|_| if rng.unit() < positive { rng.normal().exp() as f32 } else { 0.0 })
                .map(f32::to_bits)
                .collect()
        };
        for (what, scores) in [
            ("all positive", spread(&mut rng, 1.0)),
            ("a tenth positive", spread(&mut rng, 0.1)),
            ("all equal", vec![1.0f32.to_bits(); n as usize]),
        ] {
            select(gpu, gpu.words(&scores).at, n, n / 10 / 8 * 8, what);
        }
    }
}

/// The router's second product; `width`: bytes of a number of its matrix.
fn router_scores(gpu: &Gpu, width: u64, (rows, n, rank): (u32, u32, u32), group: Ptr, scores: Ptr) {
    let k = gpu.kernels(128, 1);
    let name = if width == 1 { "router_scores_bytes" } else { "router_scores" };
    let bytes = u64::from(n) * u64::from(rank) * width;
    let copies = gpu.copies(bytes);
    let (w, z) =
        (gpu.random(bytes / 2 * copies, 0.02), gpu.random(u64::from(rows.next_multiple_of(8) * rank), 1.0));
    // Two 16-bit numbers that are the size of a scale are a float of that size.
    let scales = gpu.random(2 * u64::from(n), 0.02);
    let us = gpu.time(copies, |i| {
        let w = w.at.offset(i * bytes);
        if width == 1 {
            let (z, z_scales, scales, pieces) = (z.at, scales.at, scales.at, rank / 64);
            let params = RouterBytesParams {
                z,
                z_scales,
                w,
                scales,
                scores,
                group,
                rows,
                n,
                pieces,
                ..Default::default()
            };
            gpu.start(&k.router_scores_bytes(rows, n), &params);
        } else {
            let params = RouterParams { z: z.at, w, scores, group, rows, n, rank, ..Default::default() };
            gpu.start(&k.router_scores(rows, n), &params);
        }
    });
    let case = format!("{n}x{rank} B={rows}");
    gpu.report(name, &case, &format!(r#""rows":{rows},"n":{n},"k":{rank}"#), us, bytes as f64);
}

fn select(gpu: &Gpu, scores: Ptr, n: u32, keep: u32, what: &str) {
    let room = || gpu.room(4 * u64::from(n));
    let (index, masks, nan) = (room(), room(), gpu.room(4));
    let params = NeuronParams {
        scores,
        index: index.at,
        masks: masks.at,
        nan_count: nan.at,
        n,
        keep0: keep,
        ..NeuronParams::default()
    };
    let launch = gpu.kernels(128, 1).select_neurons(1, n);
    let us = gpu.time(1, |_| gpu.start(&launch, &params));
    let case = format!("{keep} of {n}, {what}");
    gpu.report(
        "select_neurons",
        &case,
        &format!(r#""n":{n},"keep":{keep},"scores":"{what}""#),
        us,
        4.0 * f64::from(n),
    );
}

/// What makes the activations of a selective MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Activation {
    /// A kernel of its own.
    Apart,
    /// The up product.
    Up,
    /// Each block of the down product.
    Down,
}

/// Norm, up, activation and down of a layer one after another, as a step runs them; nothing where they cannot.
fn mlp(gpu: &Gpu, by: Activation, share: f64, (rows, kept, d, ffn): (u32, u32, u32, u32)) {
    let made = by == Activation::Down;
    let k = gpu.kernels(128, 1);
    let matrix = u64::from(ffn) * u64::from(d) * 2;
    let copies = gpu.copies(2 * u64::from(kept) * u64::from(d) * 2);
    let (up, down) = (gpu.random(matrix / 2 * copies, 0.02), gpu.random(matrix / 2 * copies, 0.02));
    let mut list = Rng(3).shuffled(ffn)[..kept as usize].to_vec();
    list.sort_unstable();
    let index = gpu.words(&list);
    let wide = u64::from(rows) * u64::from(d.max(kept)) * 4;
    let [residual, h, y, sums, delta] = [1, 1, 1, 32, 32].map(|parts| gpu.room(parts * wide));
    let weight = gpu.random(u64::from(d), 1.0);
    let (up_launch, up_splits) = k.linear_up(rows, kept, d);
    let act = ActivateParams {
        input: Partial { data: sums.at, splits: up_splits, columns: kept },
        index: index.at,
        out: y.at,
        rows,
        n: kept,
        valid: kept,
        ..ActivateParams::default()
    };
    let both = |w_up| k.product_activated((h.at, w_up, d), &act).filter(|_| by == Activation::Up);
    if (made && rows > MADE_ROWS) || (by == Activation::Up && both(up.at).is_none()) {
        return;
    }
    let (made_launch, made_splits) = k.mlp_down(d, kept);
    let (down_launch, down_splits) = k.linear_transposed(rows, d, kept);
    let splits = if made { made_splits } else { down_splits };
    let us = gpu.time(copies, |i| {
        let norm = NormParams {
            residual: residual.at,
            delta: Partial { data: delta.at, splits, columns: d },
            weight: weight.at,
            bias: weight.at,
            out: h.at,
            rows,
            hidden: d,
            epsilon: 1e-5,
            ..NormParams::default()
        };
        gpu.start(&k.norm(rows, d), &norm);
        let (w_up, w_down) = (up.at.offset(i * matrix), down.at.offset(i * matrix));
        let product = |x, w, out, n, k, splits| LinearParams {
            x,
            w,
            index: index.at,
            out,
            rows,
            n,
            k,
            splits,
            ..Default::default()
        };
        if let Some((launch, up)) = both(w_up) {
            gpu.start(&launch, &up);
        } else {
            gpu.start(&up_launch, &product(h.at, w_up, sums.at, kept, d, up_splits));
            if !made {
                gpu.start(&k.activate(rows, kept), &act);
            }
        }
        if !made {
            gpu.start(&down_launch, &product(y.at, w_down, delta.at, d, kept, down_splits));
        } else {
            let params = DownParams {
                up: act.input,
                up_bias: Ptr::NULL,
                w: w_down,
                index: index.at,
                out: delta.at,
                rows,
                n: d,
                k: kept,
                valid: kept,
                splits,
            };
            gpu.start(&made_launch, &params);
        }
    });
    gpu.report(
        "mlp",
        &format!("norm, up, down {share} B={rows} activation {by:?} splits {up_splits} {splits}"),
        &format!(r#""rows":{rows},"share":{share},"activation":"{by:?}""#),
        us,
        2.0 * f64::from(kept) * f64::from(d) * 2.0,
    );
}

/// The kernels between the products, LLaMA-3.1-8B.
pub(crate) fn small(gpu: &Gpu) {
    let (d, heads, kv_heads, hd, ffn) = (4096u32, 32u32, 8u32, 128u32, 14336u32);
    let k = gpu.kernels(hd, heads / kv_heads);
    for rows in [1, 8, 64, 256] {
        let columns = (heads + 2 * kv_heads) * hd;
        let splits = k.linear(rows, columns, d).1;
        let sums = gpu.room(u64::from(rows) * u64::from(columns.max(2 * ffn)) * 4 * 32);
        let out = gpu.room(u64::from(rows) * u64::from(ffn) * 2);
        let residual = gpu.room(u64::from(rows) * u64::from(d) * 4);
        let weight = gpu.random(u64::from(d), 1.0);
        let norm = NormParams {
            residual: residual.at,
            delta: Partial { data: sums.at, splits: k.linear(rows, d, d).1, columns: d },
            weight: weight.at,
            out: out.at,
            rows,
            hidden: d,
            epsilon: 1e-5,
            ..NormParams::default()
        };
        let us = gpu.time(1, |_| gpu.start(&k.norm(rows, d), &norm));
        gpu.report(
            "norm",
            &format!("B={rows} splits {}", norm.delta.splits),
            &format!(r#""rows":{rows}"#),
            us,
            0.0,
        );
        let kv = gpu.room(u64::from(rows) * u64::from(kv_heads) * 8192);
        let rotation = gpu.room(4 * u64::from(rows) * u64::from(hd));
        let index: Vec<u32> = (0..rows).collect();
        let (positions, slots) =
            (gpu.words(&index), gpu.words(&index.iter().map(|i| i * 16).collect::<Vec<_>>()));
        let qkv = QkvParams {
            qkv: Partial { data: sums.at, splits, columns },
            rotation: rotation.at,
            positions: positions.at,
            kv_slot: slots.at,
            q: out.at,
            kv: kv.at,
            rows,
            heads,
            kv_heads,
            head_dim: hd,
            ..QkvParams::default()
        };
        let us =
            gpu.time(1, |_| gpu.start(&k.qkv((rows, heads + 2 * kv_heads, qkv.qkv.splits), 0, false), &qkv));
        gpu.report("qkv", &format!("B={rows} splits {splits}"), &format!(r#""rows":{rows}"#), us, 0.0);
        let (keep, selected, nan) =
            (gpu.words(&vec![5; rows as usize]), gpu.room(2 * u64::from(rows * kv_heads)), gpu.room(4));
        let attention = gpu.room(2 * u64::from(rows * heads * hd));
        let select = SelectParams {
            logits: Partial { data: sums.at, splits, columns },
            keep: keep.at,
            selected: selected.at,
            attention: attention.at,
            nan_count: nan.at,
            rows,
            sequences: rows,
            units: kv_heads,
            per_unit: 1,
            unit_width: hd * heads / kv_heads,
            ..SelectParams::default()
        };
        let both = QkvParams { select, ..qkv };
        let us = gpu.time(1, |_| {
            gpu.start(&k.qkv((rows, heads + 2 * kv_heads, both.qkv.splits), kv_heads, false), &both)
        });
        gpu.report("qkv+select", &format!("B={rows} splits {splits}"), &format!(r#""rows":{rows}"#), us, 0.0);
        let act = ActivateParams {
            input: Partial { data: sums.at, splits: k.linear(rows, 2 * ffn, d).1, columns: 2 * ffn },
            out: out.at,
            rows,
            n: ffn,
            valid: ffn,
            kind: 1,
            ..ActivateParams::default()
        };
        let us = gpu.time(1, |_| gpu.start(&k.activate(rows, ffn), &act));
        gpu.report(
            "activate",
            &format!("B={rows} splits {}", act.input.splits),
            &format!(r#""rows":{rows}"#),
            us,
            0.0,
        );
        let us = gpu.time(1, |_| gpu.start(&k.select_heads(rows, kv_heads), &select));
        gpu.report("select_heads", &format!("B={rows}"), &format!(r#""rows":{rows}"#), us, 0.0);
        product(gpu, "linear", "attention router", rows, kv_heads, d, None);
    }
    for rows in [1, 64] {
        let vocab = 128_256;
        let logits = gpu.random(u64::from(rows * vocab) * 2, 1.0);
        let (token, logprob) = (gpu.room(4 * u64::from(rows)), gpu.room(4 * u64::from(rows)));
        let (parts, counters) = (gpu.room(12 * 32 * u64::from(rows)), gpu.room(4 * u64::from(rows)));
        let params = ArgmaxParams {
            logits: logits.at,
            token: token.at,
            logprob: logprob.at,
            parts: parts.at,
            counters: counters.at,
            vocab,
        };
        let us = gpu.time(1, |_| gpu.start(&k.argmax(rows), &params));
        gpu.report(
            "argmax",
            &format!("B={rows}"),
            &format!(r#""rows":{rows}"#),
            us,
            f64::from(rows * vocab) * 4.0,
        );
    }
}
