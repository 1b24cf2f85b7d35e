//! What several test programs need: golden files, small engines, event collection.

#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use polar_sparsity::engine::{
    Context, ContextOptions, Engine, EngineOptions, Event, EventSink, FOREVER, LoadOptions, Model, Request,
    Routers, SeqId, TopLogprob,
};
use polar_sparsity::sample::Params;
use polar_sparsity::sparsity::MlpMode;
use polar_sparsity::{Result, Status};
use std::collections::HashMap;
use std::path::PathBuf;

mod root;
pub use root::root;

/// `tests/data/golden/<case>`.
pub fn golden_dir(case: &str) -> PathBuf {
    root().join("tests/data/golden").join(case)
}

/// A case's oracle answers, widened to f32; integers as they are in `ints`.
pub struct Golden {
    pub floats: HashMap<String, (Vec<usize>, Vec<f32>)>,
    pub ints: HashMap<String, (Vec<usize>, Vec<i32>)>,
    pub facts: serde_json::Value,
}

impl Golden {
    pub fn load(case: &str) -> Golden {
        let dir = golden_dir(case);
        let bytes = std::fs::read(dir.join("golden.safetensors")).expect("golden.safetensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let (mut floats, mut ints) = (HashMap::new(), HashMap::new());
        for (name, view) in file.iter() {
            let shape = view.shape().to_vec();
            let data = view.data();
            match view.dtype() {
                safetensors::Dtype::I32 => {
                    let v = data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
                    ints.insert(name.to_owned(), (shape, v));
                }
                safetensors::Dtype::F32 => {
                    let v = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    floats.insert(name.to_owned(), (shape, v));
                }
                _ => {}
            }
        }
        let facts = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).expect("golden.json"))
            .expect("JSON");
        Golden { floats, ints, facts }
    }

    pub fn int(&self, name: &str) -> &[i32] {
        &self.ints[name].1
    }

    /// Row `i` of a matrix of floats.
    pub fn row(&self, name: &str, i: usize) -> &[f32] {
        let (shape, data) = &self.floats[name];
        let width = shape[shape.len() - 1];
        &data[i * width..(i + 1) * width]
    }

    pub fn fact(&self, name: &str) -> f64 {
        self.facts[name].as_f64().expect("a number")
    }
}

pub fn context(threads: u32) -> Context {
    Context::new(&ContextOptions { threads, ..ContextOptions::default() }).expect("a context")
}

pub fn load_model(ctx: &Context, case: &str) -> Model {
    Model::load(ctx, &golden_dir(case), &LoadOptions::default(), &mut |_, _| 0).expect("a model")
}

pub fn load_routers(model: &Model, case: &str, file: &str) -> Routers {
    Routers::load(model, &golden_dir(case).join(file), &LoadOptions::default()).expect("routers")
}

/// A greedy request over `tokens[first..first + n]`.
pub fn request(first: usize, n: usize, max_new: u32) -> Request {
    Request {
        user_tag: 0,
        first_token: first as u32,
        n_tokens: n as u32,
        first_stop: 0,
        n_stop: 0,
        max_new_tokens: max_new,
        priority: 0,
        ignore_eos: true,
        host_samples: false,
        params: Params::GREEDY,
        attn_density: 0.0,
        mlp_mode: None,
    }
}

/// Collects events, `cap` at most per call.
#[derive(Default)]
pub struct Collect {
    pub events: Vec<Event>,
    pub top: Vec<Vec<TopLogprob>>,
    pub cap: Option<usize>,
}

impl EventSink for Collect {
    fn event(&mut self, event: &Event, top: &[TopLogprob]) -> bool {
        if self.cap.is_some_and(|cap| self.events.len() >= cap) {
            return false;
        }
        self.events.push(*event);
        self.top.push(top.to_vec());
        true
    }
}

/// One step, waiting for it; its events.
pub fn step(engine: &Engine) -> Result<(Status, Vec<Event>)> {
    let mut sink = Collect::default();
    let delivered = engine.step(FOREVER, &mut sink)?;
    Ok((delivered.status, sink.events))
}

/// Steps until idle; all events.
pub fn run(engine: &Engine) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        let (status, events) = step(engine).expect("a step");
        all.extend(events);
        if status == Status::IDLE {
            return all;
        }
    }
}

/// Output tokens of each sequence, in order.
pub fn outputs(events: &[Event]) -> HashMap<SeqId, Vec<i32>> {
    let mut out: HashMap<SeqId, Vec<i32>> = HashMap::new();
    for e in events {
        if let (Some(token), true) = (e.token, e.is_output) {
            out.entry(e.seq).or_default().push(token as i32);
        }
    }
    out
}

/// A sequence to decode by force: its prompt, what is fed after it, its settings.
pub struct Forced<'a> {
    pub prompt: &'a [i32],
    pub fed: &'a [i32],
    pub attn_density: f32,
    pub mlp: Option<MlpMode>,
}

/// Feeds each sequence token by token through one engine; per sequence the logits after the prompt
/// and after each fed token.
pub fn teacher_force(engine: &Engine, vocab: usize, seqs: &[Forced<'_>]) -> Vec<Vec<Vec<f32>>> {
    let mut tokens = Vec::new();
    let mut requests = Vec::new();
    for (i, s) in seqs.iter().enumerate() {
        requests.push(Request {
            user_tag: i as u64,
            host_samples: true,
            attn_density: s.attn_density,
            mlp_mode: s.mlp,
            ..request(tokens.len(), s.prompt.len(), s.fed.len() as u32 + 1)
        });
        tokens.extend_from_slice(s.prompt);
    }
    let mut ids = vec![SeqId::default(); requests.len()];
    engine.submit(&requests, &tokens, &mut ids).expect("submit");
    let mut out: Vec<Vec<Vec<f32>>> = seqs.iter().map(|_| Vec::new()).collect();
    let mut done = 0;
    while done < seqs.len() {
        let (_, events) = step(engine).expect("a step");
        for e in events.iter().filter(|e| e.logits) {
            let i = e.user_tag as usize;
            let mut logits = vec![0.0; vocab];
            assert_eq!(engine.logits(e.seq, &mut logits).expect("logits"), vocab);
            out[i].push(logits);
            match seqs[i].fed.get(e.n_generated as usize) {
                Some(&token) => engine.push_token(e.seq, token).expect("push"),
                None => {
                    engine.cancel(&[e.seq]).expect("cancel");
                    done += 1;
                }
            }
        }
    }
    run(engine);
    out
}

/// An engine with defaults but for `set`.
pub fn engine(model: &Model, routers: Option<&Routers>, set: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions::default();
    set(&mut options);
    Engine::new(model, routers, &options).expect("an engine")
}

pub fn max_diff(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| f64::from((x - y).abs())).fold(0.0, f64::max)
}

pub fn rms_diff(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let sum: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y) * f64::from(x - y)).sum();
    (sum / a.len() as f64).sqrt()
}
