//! Whole decode steps as recorded programs (CUDA graphs): one per batch size and density setting.
//! Nothing a program launches depends on lengths, pages, tokens or which units win: those lie in
//! device tables.

use super::device::Device;
use super::scratch::{CudaScratch, MAX_PROGRAMS, Mode};
use super::{Cuda, CudaWeights};
use crate::backend::Step;
use crate::error::Result;
use crate::sparsity::Source;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Everything a step's launches depend on, or `None` when it must not be recorded.
fn key<D: Device>(w: &CudaWeights<D>, s: &CudaScratch<D>, step: &Step) -> Option<u64> {
    let decodes = step.n_decode() == step.seqs.len() && !step.seqs.is_empty();
    // Random selections are made on the host for each step.
    if !decodes || step.plan.source != Source::Router {
        return None;
    }
    let mut h = DefaultHasher::new();
    (w.shared.embed.0, s.buffers.tables.0, step.tokens.len(), step.logit_rows.len()).hash(&mut h);
    (s.tables.n_reference, s.tables.n_invariant).hash(&mut h);
    for layer in 0..s.shape.layers {
        (s.tables.layer_plan[layer], step.plan.attn_sparse(layer), step.plan.mlp_sparse(layer)).hash(&mut h);
        step.plan.mlp_rule(layer).hash(&mut h);
    }
    Some(h.finish())
}

impl<D: Device> Cuda<D> {
    /// Ends what a step that failed half way left open: side work, a recording. Before anything is copied.
    pub(super) fn abandon(&self, s: &mut CudaScratch<D>) -> Result<()> {
        if let Mode::Record(_) = std::mem::replace(&mut s.mode, Mode::Run)
            && let Ok(program) = self.device.recorded()
        {
            self.device.forget(program);
        }
        self.device.join()
    }

    /// Decides how this step's launches are treated. A setting is recorded when it is seen again, so
    /// that one that passes costs nothing.
    pub(super) fn choose_mode(&self, w: &CudaWeights<D>, s: &mut CudaScratch<D>, step: &Step) -> Result<()> {
        let Some(key) = key(w, s, step).filter(|_| self.records) else { return Ok(()) };
        if let Some((_, program)) = s.programs.iter().find(|p| p.0 == key) {
            s.mode = Mode::Replay(*program);
        } else if s.seen.contains(&key) {
            if self.device.record()? {
                s.mode = Mode::Record(key);
            }
        } else {
            if s.seen.len() == MAX_PROGRAMS {
                s.seen.remove(0);
            }
            s.seen.push(key);
        }
        Ok(())
    }

    /// After the last launch of a step's stages: runs what was recorded.
    pub(super) fn finish_recording(&self, s: &mut CudaScratch<D>) -> Result<()> {
        match std::mem::replace(&mut s.mode, Mode::Run) {
            Mode::Run => Ok(()),
            Mode::Replay(program) => self.device.replay(program),
            Mode::Record(key) => {
                let program = self.device.recorded()?;
                if s.programs.len() == MAX_PROGRAMS {
                    self.device.forget(s.programs.remove(0).1);
                }
                s.programs.push((key, program));
                self.device.replay(program)
            }
        }
    }
}
