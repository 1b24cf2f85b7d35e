//! Tokens from logits on the device: the likeliest of every row rides in the step itself; rows whose
//! requests want more are jobs of three further kernels, described in tables that change per step.
//!
//! The semantics are those of [`crate::sample`], whose random numbers and thresholds are made here; weights are summed in fixed point, so a token can differ from the host's only where the draw falls
//! within rounding of a boundary. Penalties need how often a token occurred: a table of counts per
//! penalised sequence stays on the device and learns only of new tokens.

use super::device::{Device, start};
use super::launch::{ARGMAX_PIECES, Kernels, Launch};
use super::memory::{HostWords, Memory, Places};
use super::params::{
    ArgmaxParams, CountParams, NONE, Params as Plain, Ptr, SAMPLE_BINS, SAMPLE_LIST, SampleJob, SampleParams,
    SampleState,
};
use crate::backend::{Report, Sampled};
use crate::error::{Error, Result, try_vec, try_with_capacity};
use crate::sample::{MAX_LOGPROBS, Params, uniform};
use std::sync::Arc;

/// Largest vocabulary: fixed-point weights of so many tokens add up in 64 bits.
const MAX_VOCAB: usize = 1 << 20;
/// New tokens of penalised sequences counted in one launch.
const NEWS: usize = 16_384;
/// Bit of a counted token's table row: it is of the prompt.
const PROMPT: u32 = 1 << 31;

/// What a job's kernel does; `SampleJob::kind`.
const LIKELIEST: u32 = 0;
const DRAW: u32 = 1;
const ALTERNATIVES: u32 = 2;

/// A row of the table of counts.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Whose tokens they are; 0: nobody's.
    sequence: u64,
    tokens: usize,
    /// Step that last used it.
    used: u64,
}

/// Where a row's result lies.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// Sampled by a job, not the plain likeliest.
    by_job: bool,
    alternatives: bool,
}

/// Addresses; results lie one after another in the order of the fields down to `top_logprob`.
#[derive(Clone, Copy, Debug, Default)]
struct Buffers {
    token: Ptr,
    logprob: Ptr,
    nan_count: Ptr,
    job_token: Ptr,
    job_logprob: Ptr,
    top_token: Ptr,
    top_logprob: Ptr,
    end: Ptr,
    parts: Ptr,
    counters: Ptr,
    jobs: Ptr,
    states: Ptr,
    bins: Ptr,
    list: Ptr,
    news: Ptr,
    occurrences: Ptr,
}

/// See the module.
pub struct Sampling<D: Device> {
    device: Arc<D>,
    _memory: Memory<D>,
    kernels: Kernels,
    vocab: usize,
    at: Buffers,
    /// Of this step, in the order of [`class`].
    jobs: Vec<SampleJob>,
    wanted: Vec<Wanted>,
    counted: Vec<Counted>,
    /// Pairs for `count_tokens`.
    news: Vec<u32>,
    step: u64,
    /// What the device answers: from `token` to `end`, as much as was asked for.
    results: HostWords<D>,
}

/// One request's row.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Row of logits.
    pub row: usize,
    /// Unique number of the sequence, not 0.
    pub sequence: u64,
    /// The sequence so far.
    pub tokens: &'a [u32],
    /// Leading tokens that are its prompt.
    pub prompt_len: usize,
    /// Its parameters.
    pub params: &'a Params,
}

/// Which kernels a job needs, so that each kernel's jobs are neighbours: `sample_penalised` runs 0 to 2,
/// `sample_bins` 1 to 4, `sample_finish` 2 and 3.
fn class(job: &SampleJob) -> u8 {
    match (job.kind, job.occurrences != NONE, job.top_k > 0 || job.top_p < 1.0) {
        (LIKELIEST, ..) => 0,
        (_, true, false) => 1,
        (_, true, true) => 2,
        (_, false, true) => 3,
        (_, false, false) => 4,
    }
}

/// Lays the buffers out from `at` on.
fn places(rows: usize, vocab: usize, at: Ptr) -> (Buffers, u64) {
    let mut p = Places::from(at);
    let jobs = 2 * rows;
    let buffers = Buffers {
        token: p.take(rows, 4),
        logprob: p.take(rows, 4),
        nan_count: p.take(1, 4),
        job_token: p.take(rows, 4),
        job_logprob: p.take(rows, 4),
        top_token: p.take(rows * MAX_LOGPROBS, 4),
        top_logprob: p.take(rows * MAX_LOGPROBS, 4),
        end: p.take(0, 1),
        parts: p.take(rows * 3 * ARGMAX_PIECES as usize, 4),
        counters: p.take(rows, 4),
        jobs: p.take(jobs, size_of::<SampleJob>()),
        states: p.take(jobs, size_of::<SampleState>()),
        bins: p.take(jobs * SAMPLE_BINS, 8),
        list: p.take(jobs * SAMPLE_LIST, 4),
        news: p.take(2 * NEWS, 4),
        occurrences: p.take(rows * vocab, 4),
    };
    (buffers, p.used() - at.0)
}

/// Bytes of device memory for up to `rows` rows of `vocab` logits.
pub(super) fn bytes(rows: usize, vocab: usize) -> u64 {
    places(rows, vocab, Ptr::NULL).1
}

impl<D: Device> Sampling<D> {
    /// For up to `rows` rows of `vocab` logits a step. Nothing is allocated later.
    pub fn new(device: &Arc<D>, kernels: &Kernels, rows: usize, vocab: usize) -> Result<Sampling<D>> {
        if vocab > MAX_VOCAB {
            return Err(Error::unsupported(format!(
                "sampling from {vocab} tokens on a CUDA device: at most {MAX_VOCAB}"
            )));
        }
        let memory = Memory::zeroed(device, bytes(rows, vocab))?;
        let at = places(rows, vocab, memory.at).0;
        Ok(Sampling {
            device: Arc::clone(device),
            _memory: memory,
            kernels: *kernels,
            vocab,
            at,
            jobs: try_with_capacity(2 * rows, "sampling jobs")?,
            wanted: try_vec(rows, Wanted::default(), "sampling jobs")?,
            counted: try_vec(rows, Counted::default(), "token counts")?,
            news: try_with_capacity(2 * NEWS, "token counts")?,
            step: 0,
            results: HostWords::zeroed(device, (at.end.0 - at.token.0) as usize / 4)?,
        })
    }

    /// Where kernels count NaN scores: it comes back with the tokens.
    pub fn nan_count(&self) -> Ptr {
        self.at.nan_count
    }

    /// The likeliest token of each of `rows` rows: to be launched before [`Sampling::run`].
    pub fn likeliest(&self, logits: Ptr, rows: u32) -> (Launch, ArgmaxParams) {
        let params = ArgmaxParams {
            logits,
            token: self.at.token,
            logprob: self.at.logprob,
            parts: self.at.parts,
            counters: self.at.counters,
            vocab: self.vocab as u32,
        };
        (self.kernels.argmax(rows), params)
    }

    /// Begins a step: no row wants more than the likeliest token.
    pub fn clear(&mut self) -> Result<()> {
        self.step += 1;
        self.jobs.clear();
        if !self.news.is_empty() {
            // A step that failed before it sent them.
            self.news.clear();
            self.counted.fill(Counted::default());
        }
        self.wanted.fill(Wanted::default());
        self.device.zero(self.at.nan_count, 4)
    }

    /// Adds what a request wants of its row; each row once.
    pub fn add(&mut self, request: &Request<'_>) -> Result<()> {
        let params = request.params;
        if request.row >= self.wanted.len() {
            return Err(Error::invalid(format!("row {}, sampling has {}", request.row, self.wanted.len())));
        }
        let row = request.row as u32;
        let inverse = 1.0 / params.temperature;
        // At a temperature whose inverse is no number, only the likeliest token has any weight.
        let draws = params.temperature > 0.0 && inverse.is_finite();
        let penalises = params.penalises();
        let mut wanted = Wanted::default();
        if draws || penalises {
            wanted.by_job = true;
            let occurrences = if penalises { self.count(request)? } else { NONE };
            let least = if params.min_p > 0.0 { params.min_p.ln().max(-104.0) } else { -104.0 };
            self.jobs.push(SampleJob {
                uniform: uniform(params.seed, request.tokens.len() as u64),
                row,
                occurrences,
                repetition: params.repetition_penalty,
                presence: params.presence_penalty,
                frequency: params.frequency_penalty,
                inverse,
                floor: least,
                bin_scale: (32.0 * inverse.max(1.0)).min(1e30),
                top_k: params.top_k,
                top_p: params.top_p,
                kind: if draws { DRAW } else { LIKELIEST },
                reserved: 0,
            });
        }
        if params.n_logprobs > 0 {
            wanted.alternatives = true;
            self.jobs.push(SampleJob {
                row,
                occurrences: NONE,
                inverse: 1.0,
                floor: f32::NEG_INFINITY,
                bin_scale: 32.0,
                top_k: params.n_logprobs,
                top_p: 1.0,
                kind: ALTERNATIVES,
                ..SampleJob::default()
            });
        }
        self.wanted[request.row] = wanted;
        Ok(())
    }

    /// The row of the table that holds a sequence's counts, brought up to date.
    fn count(&mut self, request: &Request<'_>) -> Result<u32> {
        let (sequence, tokens) = (request.sequence, request.tokens);
        let known = self.counted.iter().position(|c| c.sequence == sequence && c.tokens <= tokens.len());
        let at = match known {
            Some(at) => at,
            None => {
                // As many rows as a step has sequences: one that this step does not use is always left.
                let oldest = (0..self.counted.len()).min_by_key(|&i| self.counted[i].used).unwrap_or(0);
                let bytes = 4 * self.vocab as u64;
                self.counted[oldest] = Counted::default();
                self.device.zero(self.at.occurrences.offset(oldest as u64 * bytes), bytes)?;
                oldest
            }
        };
        let new = if known.is_some() { self.counted[at].tokens } else { 0 };
        // Should a copy or launch fail, nobody's counts are in the row.
        self.counted[at] = Counted::default();
        for (i, &token) in tokens.iter().enumerate().skip(new) {
            if token as usize >= self.vocab {
                return Err(Error::invalid(format!("token {token}, the vocabulary has {}", self.vocab)));
            }
            if self.news.len() == 2 * NEWS {
                self.send_news()?;
            }
            self.news.extend([at as u32 | if i < request.prompt_len { PROMPT } else { 0 }, token]);
        }
        self.counted[at] = Counted { sequence, tokens: tokens.len(), used: self.step };
        Ok(at as u32)
    }

    fn send_news(&mut self) -> Result<()> {
        let count = (self.news.len() / 2) as u32;
        let params = CountParams {
            entries: self.at.news,
            occurrences: self.at.occurrences,
            count,
            vocab: self.vocab as u32,
        };
        let sent = copy_in(&*self.device, self.at.news, &self.news)
            .and_then(|()| start(&*self.device, &self.kernels.count_tokens(count), &params));
        self.news.clear();
        if sent.is_err() {
            self.counted.fill(Counted::default());
        }
        sent
    }

    /// Starts the jobs. `logits` are those that [`Sampling::likeliest`] was launched with.
    pub fn run(&mut self, logits: Ptr) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        self.upload()?;
        self.launch(logits)
    }

    /// The first half of [`Sampling::run`]: the jobs' tables to the device.
    pub fn upload(&mut self) -> Result<()> {
        if !self.news.is_empty() {
            self.send_news()?;
        }
        self.jobs.sort_unstable_by_key(|job| (class(job), job.row));
        copy_in(&*self.device, self.at.jobs, &self.jobs)
    }

    /// The second half: the kernels.
    pub fn launch(&self, logits: Ptr) -> Result<()> {
        let first = |c: u8| self.jobs.partition_point(|job| class(job) < c) as u32;
        for (stage, jobs) in
            [first(0)..first(3), first(1)..first(5), first(2)..first(4)].into_iter().enumerate()
        {
            if jobs.is_empty() {
                continue;
            }
            let params = SampleParams {
                logits,
                jobs: self.at.jobs,
                occurrences: self.at.occurrences,
                likeliest: self.at.token,
                likeliest_logprob: self.at.logprob,
                token: self.at.job_token,
                logprob: self.at.job_logprob,
                top_token: self.at.top_token,
                top_logprob: self.at.top_logprob,
                states: self.at.states,
                bins: self.at.bins,
                list: self.at.list,
                vocab: self.vocab as u32,
                index_bits: usize::BITS - (self.vocab - 1).leading_zeros(),
                first_job: jobs.start,
                reserved: 0,
            };
            start(&*self.device, &self.kernels.sample(stage, jobs.end - jobs.start), &params)?;
        }
        Ok(())
    }

    /// Starts the copy of the results, as much as is wanted, in one piece.
    pub fn fetch(&mut self) -> Result<()> {
        let end = if self.wanted.iter().any(|w| w.alternatives) {
            self.at.end
        } else if self.wanted.iter().any(|w| w.by_job) {
            self.at.top_token
        } else {
            self.at.nan_count.offset(4)
        };
        self.results.fetch(self.at.token, (end.0 - self.at.token.0) as usize / 4)
    }

    /// Puts the results of the first `rows` rows into `report`, once the device has finished.
    pub fn report(&self, rows: usize, report: &mut Report) {
        let results = self.results.words();
        let word = |at: Ptr, i: usize| results[(at.0 - self.at.token.0) as usize / 4 + i];
        for (row, wanted) in self.wanted[..rows].iter().enumerate() {
            let (token, logprob) = if wanted.by_job {
                (word(self.at.job_token, row), f32::from_bits(word(self.at.job_logprob, row)))
            } else {
                (word(self.at.token, row), f32::from_bits(word(self.at.logprob, row)))
            };
            let broken = logprob.is_nan();
            let first_top = report.top.len() as u32;
            if wanted.alternatives && !broken {
                let entries = (row * MAX_LOGPROBS..(row + 1) * MAX_LOGPROBS)
                    .map(|i| (word(self.at.top_token, i), f32::from_bits(word(self.at.top_logprob, i))));
                report.top.extend(entries.take_while(|e| e.0 != NONE));
            }
            report.sampled.push(Sampled {
                token,
                logprob: if broken { 0.0 } else { logprob },
                first_top,
                n_top: report.top.len() as u32 - first_top,
                broken,
            });
        }
        report.nan_scores = u64::from(word(self.at.nan_count, 0));
    }
}

/// Plain structs, or words, to the device.
fn copy_in<D: Device, T: Words>(device: &D, to: Ptr, from: &[T]) -> Result<()> {
    // SAFETY: plain repr(C) data without padding, read as bytes.
    let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from)) };
    device.copy_in(to, bytes)
}

/// What [`copy_in`] takes.
trait Words: Copy {}
impl Words for u32 {}
impl<P: Plain> Words for P {}
