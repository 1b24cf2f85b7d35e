//! Sampling of whole batches, beyond the likeliest token, which `small` times.

use crate::kernels::Rng;
use crate::timing::Gpu;
use polar_sparsity::backend::cuda::device::{self, Device};
use polar_sparsity::backend::cuda::sampling::{Request, Sampling};
use polar_sparsity::sample::Params;

const VOCAB: usize = 128_256;

/// Logits of a sure model (a few tokens far above the rest) and of an unsure one.
fn logits(rng: &mut Rng, rows: usize, sure: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 * VOCAB * rows);
    for _ in 0..rows {
        let mut row: Vec<f32> = (0..VOCAB).map(|_| 2.0 * rng.normal() as f32).collect();
        if sure {
            for i in 0..20 {
                row[(rng.bits() % VOCAB as u64) as usize] = 18.0 - 0.4 * i as f32;
            }
        }
        out.extend(row.iter().flat_map(|x| x.to_le_bytes()));
    }
    out
}

/// All rows of a batch with the same parameters.
pub(crate) fn sampling(gpu: &Gpu) {
    let warm = Params { temperature: 0.8, ..Params::GREEDY };
    let cases = [
        ("temperature", warm),
        ("min_p 0.05", Params { min_p: 0.05, ..warm }),
        ("top_k 50", Params { top_k: 50, ..warm }),
        ("top_p 0.9", Params { top_p: 0.9, ..warm }),
        ("top_k 50, top_p 0.9", Params { top_k: 50, top_p: 0.9, ..warm }),
        ("penalties", Params { repetition_penalty: 1.1, ..Params::GREEDY }),
        ("penalties, top_k 50, top_p 0.9", Params { repetition_penalty: 1.1, top_k: 50, top_p: 0.9, ..warm }),
        ("20 alternatives", Params { n_logprobs: 20, ..Params::GREEDY }),
    ];
    for rows in [1usize, 8, 64] {
        for sure in [true, false] {
            let mut rng = Rng(12);
            let bytes = logits(&mut rng, rows, sure);
            let at = gpu.room(bytes.len() as u64);
            gpu.device.copy_in(at.at, &bytes).unwrap();
            let tokens: Vec<u32> = (0..2048).map(|_| (rng.bits() % VOCAB as u64) as u32).collect();
            let mut sampling = Sampling::new(&gpu.device, &gpu.kernels(128, 4), rows, VOCAB).unwrap();
            let (launch, params) = sampling.likeliest(at.at, rows as u32);
            device::start(&*gpu.device, &launch, &params).unwrap();
            for (name, params) in &cases {
                sampling.clear().unwrap();
                for row in 0..rows {
                    let params = Params { seed: row as u64, ..*params };
                    let sequence = row as u64 + 1;
                    let request =
                        Request { row, sequence, tokens: &tokens, prompt_len: 1024, params: &params };
                    sampling.add(&request).unwrap();
                }
                sampling.upload().unwrap();
                gpu.device.synchronize().unwrap();
                let us = gpu.time(1, |_| sampling.launch(at.at).unwrap());
                let kind = if sure { "sure" } else { "unsure" };
                gpu.report(
                    "sampling",
                    &format!("{name}, {kind}, B={rows}"),
                    &format!(r#""case":"{name}","logits":"{kind}","rows":{rows}"#),
                    us,
                    bytes.len() as f64,
                );
            }
        }
    }
}
