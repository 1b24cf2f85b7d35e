//! The decode loop, once for every backend.

use super::{Backend, History, Live, Report, Site, Step};
use crate::error::Result;

/// Everything a step touches on one device.
pub struct Run<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// The model.
    pub weights: &'a B::Weights,
    /// Its routers, if the engine has any.
    pub routers: Option<&'a B::Routers>,
    /// Page storage.
    pub kv: &'a mut B::Kv,
    /// Activations and selections.
    pub scratch: &'a mut B::Scratch,
}

/// Runs (or, on an asynchronous device, starts) one step.
pub fn enqueue<B: Backend>(
    run: &mut Run<'_, B>,
    step: &Step,
    history: &dyn History,
    report: &mut Report,
) -> Result<()> {
    let (b, w) = (run.backend, run.weights);
    b.begin(w, run.scratch, step)?;
    b.embed(w, run.scratch, step)?;
    for layer in 0..b.spec(w).num_layers as usize {
        b.project(w, run.routers, run.kv, run.scratch, step, layer)?;
        // Both routers read the hidden state that entered `project`, so both may run before attention.
        let attn = choose(run, step, layer, Site::Attn)?;
        let mlp = choose(run, step, layer, Site::Mlp)?;
        b.attend(w, run.kv, run.scratch, step, layer, attn)?;
        b.mlp(w, run.scratch, step, layer, mlp)?;
    }
    b.logits(w, run.scratch, step)?;
    b.sample(run.scratch, step, history)?;
    b.end(run.scratch, step, report)
}

fn choose<B: Backend>(run: &mut Run<'_, B>, step: &Step, layer: usize, site: Site) -> Result<Live> {
    let sparse = match site {
        Site::Attn => step.plan.attn_sparse(layer),
        Site::Mlp => step.plan.mlp_sparse(layer),
    };
    if !sparse {
        return Ok(Live::All);
    }
    if step.plan.needs_router(site)
        && let Some(routers) = run.routers
    {
        run.backend.route(routers, run.scratch, step, layer, site)?;
    }
    run.backend.select(run.scratch, step, layer, site)?;
    Ok(Live::Selected)
}
