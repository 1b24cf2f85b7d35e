//! One accepted request: its tokens, its pages, how far it got.

use super::types::{Request, SeqId};
use crate::error::{Error, Result, try_with_capacity};
use crate::kv::{BlockTable, pages_for};
use crate::sample::Params;
use crate::sched::policy::View;
use crate::sparsity::{Counts, MlpMode, Policy, SeqSetting};

/// What a request is checked against.
#[derive(Clone, Debug)]
pub(crate) struct Admission {
    pub(crate) vocab_size: u32,
    pub(crate) max_context: usize,
    pub(crate) total_pages: usize,
    pub(crate) policy: Policy,
}

pub(crate) struct Seq {
    pub(crate) id: SeqId,
    pub(crate) user_tag: u64,
    /// Prompt, then generated tokens. Room for all of them was taken at submit.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// Prompt and generated tokens at which it ends by length.
    pub(crate) max_tokens: usize,
    pub(crate) params: Params,
    pub(crate) stop: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) host_samples: bool,
    pub(crate) setting: SeqSetting,
    pub(crate) priority: u32,
    /// Order of submission.
    pub(crate) arrival: u64,
    /// Tokens whose K and V are in the pages.
    pub(crate) computed: usize,
    pub(crate) table: BlockTable,
    pub(crate) counts: Counts,
    /// The host has been shown logits and has not chosen yet.
    pub(crate) awaits_host: bool,
    /// Last logits, when the host samples: kept here so that other sequences' steps cannot
    /// overwrite them.
    pub(crate) logits: Vec<f32>,
    /// Was running before (a preempted one waits too, but is not in the bounded queue).
    pub(crate) admitted: bool,
}

impl Seq {
    /// Checks a request and takes all the memory it will need. The id comes later.
    pub(crate) fn new(index: usize, request: &Request, tokens: &[i32], limits: &Admission) -> Result<Seq> {
        let named = |what: std::fmt::Arguments<'_>| format!("request {index}: {what}");
        let prompt = slice(tokens, request.first_token, request.n_tokens)
            .map_err(|e| Error::invalid(named(format_args!("prompt {e}"))))?;
        let stop = slice(tokens, request.first_stop, request.n_stop)
            .map_err(|e| Error::invalid(named(format_args!("stop tokens {e}"))))?;
        if prompt.is_empty() {
            return Err(Error::invalid(named(format_args!("the prompt is empty"))));
        }
        if request.max_new_tokens == 0 {
            return Err(Error::invalid(named(format_args!("max_new_tokens is 0"))));
        }
        request.params.check().map_err(|e| Error::new(e.status, named(format_args!("{}", e.message))))?;
        if prompt.len() >= limits.max_context {
            let text =
                format_args!("prompt of {} tokens, the context holds {}", prompt.len(), limits.max_context);
            return Err(Error::limit(named(text)));
        }
        if pages_for(prompt.len() + 1) > limits.total_pages {
            let text = format_args!(
                "prompt needs {} KV pages, the cache has {}",
                pages_for(prompt.len() + 1),
                limits.total_pages
            );
            return Err(Error::new(crate::Status::E_KV_FULL, named(text)));
        }
        let setting = limits
            .policy
            .resolve(request.attn_density, request.mlp_mode)
            .map_err(|e| Error::new(e.status, named(format_args!("{}", e.message))))?;
        let max_tokens = prompt.len().saturating_add(request.max_new_tokens as usize).min(limits.max_context);
        let mut all = try_with_capacity(max_tokens, "tokens of a request")?;
        for (i, &t) in prompt.iter().enumerate() {
            all.push(
                check_token(t, limits.vocab_size)
                    .map_err(|e| Error::invalid(named(format_args!("prompt token {i}: {e}"))))?,
            );
        }
        let mut stops = try_with_capacity(stop.len(), "stop tokens of a request")?;
        for (i, &t) in stop.iter().enumerate() {
            stops.push(
                check_token(t, limits.vocab_size)
                    .map_err(|e| Error::invalid(named(format_args!("stop token {i}: {e}"))))?,
            );
        }
        let room = max_tokens.min(limits.total_pages * crate::kv::PAGE_TOKENS);
        let logits = if request.host_samples { limits.vocab_size as usize } else { 0 };
        Ok(Seq {
            id: SeqId(0),
            user_tag: request.user_tag,
            tokens: all,
            prompt_len: prompt.len(),
            max_tokens,
            params: request.params,
            stop: stops,
            ignore_eos: request.ignore_eos,
            host_samples: request.host_samples,
            setting,
            priority: request.priority,
            arrival: 0,
            computed: 0,
            table: BlockTable::with_room(room)?,
            counts: Counts::default(),
            awaits_host: false,
            logits: try_with_capacity(logits, "logits of a request")?,
            admitted: false,
        })
    }

    /// Leading tokens that are computed densely and in chunks. That is the prompt; after a
    /// preemption also what a dense sequence had generated. A sparse sequence decodes its own
    /// tokens again, one a step, so that its cache is what it was and its answer does not depend on
    /// how full the machine is.
    pub(crate) fn prefill_len(&self) -> usize {
        let dense = self.setting.attn_density == Some(1.0) && self.setting.mlp == MlpMode::Dense;
        if dense { self.tokens.len() } else { self.prompt_len }
    }

    /// Tokens generated so far.
    pub(crate) fn n_generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_len) as u32
    }

    /// As the scheduler sees it.
    pub(crate) fn view(&self, slot: u32) -> View {
        // A dense sequence past its first pass decodes like any other: one new token.
        let prefill = if self.computed >= self.prompt_len && self.computed + 1 == self.tokens.len() {
            self.prompt_len
        } else {
            self.prefill_len()
        };
        View {
            slot,
            known: self.tokens.len() as u32,
            computed: self.computed as u32,
            prefill: prefill as u32,
            pages: self.table.pages().len() as u32,
            ready: !self.awaits_host,
        }
    }

    /// Key of the order of service, smallest first.
    pub(crate) fn urgency(&self) -> (std::cmp::Reverse<u32>, u64) {
        (std::cmp::Reverse(self.priority), self.arrival)
    }
}

/// A token id in range, or a sentence with both values.
pub(crate) fn check_token(token: i32, vocab_size: u32) -> std::result::Result<u32, String> {
    match u32::try_from(token) {
        Ok(t) if t < vocab_size => Ok(t),
        _ => Err(format!("id {token}, the vocabulary has {vocab_size}")),
    }
}

fn slice(tokens: &[i32], first: u32, n: u32) -> std::result::Result<&[i32], String> {
    let end = u64::from(first) + u64::from(n);
    if end > tokens.len() as u64 {
        return Err(format!("slice {first}..{end} of an array of {}", tokens.len()));
    }
    Ok(&tokens[first as usize..end as usize])
}
