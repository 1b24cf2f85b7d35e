//! The least time of a decode step, from what the GPU was measured to do: its bytes at the rate of a read
//! stream and, for the roofline, its products at the rate of large ones. Sums without a device: `tests/floor.rs`
//! compiles them too.

use polar_sparsity::model::ModelSpec;

/// Bytes of a number: weights, routers and cache are of a 16-bit type. That is the method's floor: MLP routers are kept
/// in 8 bits here, so that a Polar step reads less of them than this counts.
const STORED: f64 = 2.0;

/// One kind of work, in all layers of a step together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    /// That must be read, once.
    pub(crate) bytes: f64,
    /// An addition and a multiplication are two.
    pub(crate) flops: f64,
}

/// What a selective MLP reads: this share of its neurons, and routers of this rank.
#[derive(Clone, Copy)]
pub(crate) struct Selective {
    pub(crate) kept: f64,
    pub(crate) rank: u32,
}

/// A step of `rows` sequences: QKV, O, MLP, MLP routers, head, attention, and all that is only read.
/// `weight_bytes` are the whole model's, `kv_bytes` the step's.
///
/// QKV and O are counted whole, as the method has them. One sequence's Polar step reads the kept heads' part of q and O only
/// (`cuda/linear_heads.cu`), so that it may come below.
///
/// Attention routers are not counted, neither their bytes nor their flops: a row or less per head.
pub(crate) fn terms(
    spec: &ModelSpec,
    rows: u32,
    (weight_bytes, kv_bytes): (f64, f64),
    mlp: Option<Selective>,
) -> [Term; 7] {
    let [layers, hidden, ffn, vocab] =
        [spec.num_layers, spec.hidden_size, spec.ffn_size, spec.vocab_size].map(f64::from);
    let (q, kv) = (spec.q_size() as f64, spec.kv_size() as f64);
    let matrix = |elements: f64| Term { bytes: STORED * elements, flops: 2.0 * f64::from(rows) * elements };
    let qkv = layers * hidden * (q + 2.0 * kv);
    let o = layers * hidden * q;
    let whole_mlp = layers * hidden * ffn * if spec.activation.gated() { 3.0 } else { 2.0 };
    let head = vocab * hidden;
    // Of an embedding that is not the head too, a step reads a row per sequence.
    let embedding = if spec.tied_head { 0.0 } else { head };
    let rest = weight_bytes - STORED * (qkv + o + whole_mlp + head + embedding);
    assert!(rest >= 0.0, "more in the matrices than in the model: {rest}");
    let kept = mlp.map_or(1.0, |m| m.kept);
    let routers = mlp.map_or(0.0, |m| layers * f64::from(m.rank) * (hidden + ffn));
    [
        matrix(qkv),
        matrix(o),
        matrix(whole_mlp * kept),
        matrix(routers),
        matrix(head),
        // A number of the cache is used once by each query head of its group: q k, or weight times v.
        Term { bytes: kv_bytes, flops: 2.0 * kv_bytes / STORED * f64::from(spec.group()) },
        Term { bytes: rest, flops: 0.0 },
    ]
}

/// The least time of a step, milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Floor {
    /// Were there only bytes to read.
    pub(crate) bytes: f64,
    /// Roofline: each term takes the longer of its bytes and its flops. Terms follow one another, as a step's
    /// kernels do but for what runs on the side stream. Never less than `bytes`, and the same where every term is
    /// bound by its bytes.
    pub(crate) roof: Option<f64>,
}

impl Floor {
    /// `read`: the read stream, TB/s. `arithmetic`: large products, TFLOP/s; without it there is no roofline.
    pub(crate) fn new(terms: &[Term], read: f64, arithmetic: Option<f64>) -> Floor {
        let reading = |t: &Term| t.bytes / read / 1e9;
        Floor {
            bytes: terms.iter().map(reading).sum(),
            roof: arithmetic.map(|rate| terms.iter().map(|t| reading(t).max(t.flops / rate / 1e9)).sum()),
        }
    }
}
