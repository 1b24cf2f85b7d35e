//! Teacher-forced decoding over the public engine: feed known text token by token, read the logits,
//! score the next token. What `fixtures/reference.py` does in PyTorch, through the library.
//!
//! A window is 256 tokens: 0..64 are the prompt (dense prefill), 64..256 are fed one at a time
//! under the policy. Scored are the decode steps: positions 64..=254 predicting tokens 65..=255.

use polar_sparsity::engine::{
    Engine, EngineOptions, Event, EventSink, FOREVER, Model, Request, Routers, SeqId, TopLogprob,
};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::{MlpMode, Options, Source};
use polar_sparsity::{Result, Status};
use std::path::Path;

/// Tokens of a window.
pub const WINDOW: usize = 256;
/// Tokens of its prompt.
pub const PROMPT: usize = 64;
/// Scored predictions of a window.
pub const SCORED: usize = WINDOW - PROMPT - 1;

/// What one window scored.
#[derive(Clone, Debug, Default)]
pub struct Score {
    /// Sum of negative log likelihoods over the scored positions, nats.
    pub nll: f64,
    /// Most likely next token at each scored position.
    pub top1: Vec<u32>,
    /// Attention density that really ran.
    pub attn_density: f32,
    /// MLP density that really ran.
    pub mlp_density: f32,
}

/// One cell of a table.
#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub source: Source,
    pub attn_density: f32,
    pub mlp: MlpMode,
}

/// Reads windows: little-endian u16 tokens, [`WINDOW`] each.
pub fn read_windows(path: &Path) -> std::io::Result<Vec<Vec<i32>>> {
    let bytes = std::fs::read(path)?;
    let tokens: Vec<i32> =
        bytes.as_chunks::<2>().0.iter().map(|b| i32::from(u16::from_le_bytes(*b))).collect();
    Ok(tokens.as_chunks::<WINDOW>().0.iter().map(|w| w.to_vec()).collect())
}

/// Decodes every window under `cell`, `max_batch` at a time.
pub fn score(
    model: &Model,
    routers: Option<&Routers>,
    cell: Cell,
    windows: &[Vec<i32>],
    max_batch: u32,
) -> Result<Vec<Score>> {
    let options = EngineOptions {
        max_batch,
        max_context: WINDOW as u32 + 1,
        sparsity: Options { attn_density: cell.attn_density, source: cell.source, ..Options::default() },
        ..EngineOptions::default()
    };
    let engine = Engine::new(model, routers, &options)?;
    let tokens: Vec<i32> = windows.concat();
    let requests: Vec<Request> = (0..windows.len())
        .map(|i| Request {
            user_tag: i as u64,
            first_token: (i * WINDOW) as u32,
            n_tokens: PROMPT as u32,
            first_stop: 0,
            n_stop: 0,
            max_new_tokens: (WINDOW - PROMPT) as u32,
            priority: 0,
            ignore_eos: true,
            host_samples: true,
            params: Params::GREEDY,
            attn_density: 0.0,
            mlp_mode: Some(cell.mlp),
        })
        .collect();
    let mut ids = vec![SeqId::default(); requests.len()];
    engine.submit(&requests, &tokens, &mut ids)?;
    let mut scores = vec![Score::default(); windows.len()];
    let mut logits = vec![0.0f32; model.spec().vocab_size as usize];
    let mut inbox = Collect::default();
    loop {
        inbox.0.clear();
        if engine.step(FOREVER, &mut inbox)?.status == Status::IDLE {
            return Ok(scores);
        }
        for event in &inbox.0 {
            let i = event.user_tag as usize;
            if event.logits {
                let fed = PROMPT + event.n_generated as usize;
                if event.n_generated > 0 && fed < WINDOW {
                    engine.logits(event.seq, &mut logits)?;
                    let (nll, top1) = judge(&logits, windows[i][fed] as usize);
                    scores[i].nll += nll;
                    scores[i].top1.push(top1);
                }
                // The last token is fed too: it ends the sequence by length.
                engine.push_token(event.seq, windows[i][fed.min(WINDOW - 1)])?;
            }
            if event.finished.is_some() {
                scores[i].attn_density = event.counts.attn_density();
                scores[i].mlp_density = event.counts.mlp_density();
            }
        }
    }
}

fn judge(logits: &[f32], next: usize) -> (f64, u32) {
    let mut top = 0;
    for (i, &l) in logits.iter().enumerate() {
        if l > logits[top] {
            top = i;
        }
    }
    let max = f64::from(logits[top]);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - max).exp()).sum();
    (max + sum.ln() - f64::from(logits[next]), top as u32)
}

#[derive(Default)]
struct Collect(Vec<Event>);

impl EventSink for Collect {
    fn event(&mut self, event: &Event, _: &[TopLogprob]) -> bool {
        self.0.push(*event);
        true
    }
}

/// Mean, and standard error over windows, of the paired difference `a - b` per scored token.
pub fn paired(a: &[Score], b: &[Score]) -> (f64, f64) {
    let d: Vec<f64> = a.iter().zip(b).map(|(a, b)| (a.nll - b.nll) / SCORED as f64).collect();
    let n = d.len() as f64;
    let mean = d.iter().sum::<f64>() / n;
    let var = d.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0);
    (mean, (var / n).sqrt())
}

/// Perplexity over all scored tokens.
pub fn perplexity(scores: &[Score]) -> f64 {
    (scores.iter().map(|s| s.nll).sum::<f64>() / (scores.len() * SCORED) as f64).exp()
}

/// Share of scored positions whose most likely token is the same.
pub fn agreement(a: &[Score], b: &[Score]) -> f64 {
    let same: usize =
        a.iter().zip(b).map(|(a, b)| a.top1.iter().zip(&b.top1).filter(|(x, y)| x == y).count()).sum();
    same as f64 / (a.len() * SCORED) as f64
}
