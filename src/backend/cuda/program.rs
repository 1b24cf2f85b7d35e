//! Whole decode steps as recorded programs (CUDA graphs): one per bucket of rows and density setting.
//! Nothing a program launches depends on lengths, pages, tokens, how many rows of the bucket are
//! padding, which densities requests have or which units win: those lie in device tables.

use super::device::Device;
use super::neurons::SIDE_FIRST;
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
    (w.shared.embed.0, s.buffers.tables.0, s.tables.layout(), s.tables.all_reference).hash(&mut h);
    for layer in 0..s.shape.layers {
        (s.tables.layer_plan[layer], step.plan.attn_sparse(layer), step.plan.mlp_sparse(layer)).hash(&mut h);
        s.tables.workers[usize::from(s.tables.layer_plan[layer])].hash(&mut h);
        (s.tables.layer_groups(step, layer), step.plan.mlp_rule(layer)).hash(&mut h);
    }
    Some(h.finish())
}

impl<D: Device> Cuda<D> {
    /// Decides how this step's launches are treated. A setting is recorded when it is seen again, so
    /// that one that passes costs nothing.
    pub(super) fn choose_mode(&self, w: &CudaWeights<D>, s: &mut CudaScratch<D>, step: &Step) -> Result<()> {
        s.mode = Mode::Run;
        let Some(key) = key(w, s, step).filter(|_| self.records) else { return Ok(()) };
        if let Some(i) = s.programs.iter().position(|p| p.0 == key) {
            s.mode = Mode::Replay(s.programs[i].1);
            s.programs[i..].rotate_left(1);
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

    /// Runs a stage, unless a program has it; one that fails ends a recording and side work.
    pub(super) fn stage(
        &self,
        s: &mut CudaScratch<D>,
        run: impl FnOnce(&mut CudaScratch<D>) -> Result<()>,
    ) -> Result<()> {
        if let Mode::Replay(_) = s.mode {
            return Ok(());
        }
        let done = run(s);
        if done.is_err() {
            self.stop_recording(s);
            // The first error is the one to tell.
            let _ = self.device.join();
        }
        done
    }

    /// Drops a recording that will not be finished, so that what is started next runs.
    pub(super) fn stop_recording(&self, s: &mut CudaScratch<D>) {
        if let Mode::Record(_) = std::mem::replace(&mut s.mode, Mode::Run) {
            self.device.unrecord();
        }
    }

    /// After the last launch of a step's stages: runs what was recorded.
    pub(super) fn finish_recording(&self, s: &mut CudaScratch<D>) -> Result<()> {
        match std::mem::replace(&mut s.mode, Mode::Run) {
            Mode::Run => Ok(()),
            Mode::Replay(program) => self.device.replay(program),
            Mode::Record(key) => {
                let beside = s.neurons_selected.is_some();
                let program = self.device.recorded(beside && SIDE_FIRST.contains(&s.tables.rows().decode))?;
                if s.programs.len() == MAX_PROGRAMS {
                    self.device.forget(s.programs.remove(0).1);
                }
                s.programs.push((key, program));
                self.device.replay(program)
            }
        }
    }
}
