//! Selective MLP: which neurons a batch runs, and the two products over their rows only.

use super::{
    Launcher, MAX_ROWS, MAX_WIDTH, Operator, Ops, Queue, Workspace, count, optional, pointer, sum_floats,
    width,
};
use crate::backend::cuda::launch::{Kernels, Launch, SKINNY_ROWS};
use crate::backend::cuda::memory::Places;
use crate::backend::cuda::params::{
    ActivateParams, ActivatedParams, DownParams, LinearParams, MarkParams, NO_ACTIVATION, NeuronParams,
    Partial, Ptr, RouterParams,
};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// The neurons with the largest sums, over the batch, of positive router logits.
#[derive(Clone, Copy, Debug)]
pub struct NeuronSelection {
    /// Of x and the router.
    pub dtype: DType,
    /// Rows of the batch.
    pub rows: u32,
    /// Width of x; with `rank` not needed with `logits`.
    pub hidden: u32,
    /// Width of the router's middle.
    pub rank: u32,
    /// Neurons.
    pub neurons: u32,
    /// Of them to keep.
    pub keep: u32,
    /// `[rows][hidden]`
    pub x: Ptr,
    /// `[rank][hidden]`
    pub down: Ptr,
    /// `[neurons][rank]`
    pub up: Ptr,
    /// f32 `[rows][neurons]` instead of a router; null: there is one.
    pub logits: Ptr,
    /// i32: rows from this number on are padding; null: there is none.
    pub active_rows: Ptr,
    /// u32 `[keep up to a multiple of 8]`
    pub index: Ptr,
    /// u32, raised by the number of NaN scores; null: not wanted.
    pub nan_count: Ptr,
    /// Holds what lies between the kernels.
    pub workspace: Workspace,
}

pub(super) struct SelectionLayout {
    narrow: Ptr,
    z: Ptr,
    sums: Ptr,
    group: Ptr,
    scores: Ptr,
    nan_count: Ptr,
}

impl Operator for NeuronSelection {
    type Layout = SelectionLayout;

    fn kernels<'a>(&self, ops: &'a Ops) -> Result<&'a Kernels> {
        count("num_rows", self.rows, MAX_ROWS)?;
        width("num_neurons", self.neurons)?;
        count("keep", self.keep, self.neurons)?;
        if self.logits == Ptr::NULL {
            width("hidden_size", self.hidden)?;
            width("rank", self.rank)?;
        }
        let k = ops.rows(self.dtype)?;
        if !k.neurons_fit(self.neurons) {
            return Err(Error::unsupported(format!(
                "num_neurons is {}: too many for the shared memory of this device",
                self.neurons
            )));
        }
        Ok(k)
    }

    fn layout(&self, k: &Kernels, p: &mut Places) -> Self::Layout {
        let (mut narrow, mut z, mut sums) = (0, 0, 0);
        if self.logits == Ptr::NULL {
            narrow = sum_floats(k.linear(self.rows, self.rank, self.hidden).1, self.rows, self.rank);
            z = self.rows as usize * self.rank as usize;
            if self.rows > SKINNY_ROWS {
                sums = sum_floats(k.linear(self.rows, self.neurons, self.rank).1, self.rows, self.neurons);
            }
        }
        SelectionLayout {
            narrow: p.take(narrow, 4),
            z: p.take(z, 2),
            sums: p.take(sums, 4),
            group: p.take(self.rows as usize, 4),
            scores: p.take(self.neurons as usize, 4),
            nan_count: p.take(1, 4),
        }
    }

    fn workspace(&self) -> Workspace {
        self.workspace
    }
}

/// `y = relu(x up^T + up_bias) down + down_bias`, of all neurons or of listed ones.
#[derive(Clone, Copy, Debug)]
pub struct Mlp {
    /// Of x, the weights and the output.
    pub dtype: DType,
    /// Rows of the batch.
    pub rows: u32,
    /// Width of x and of the output.
    pub hidden: u32,
    /// Neurons.
    pub neurons: u32,
    /// Of them in `index`.
    pub keep: u32,
    /// `[rows][hidden]`
    pub x: Ptr,
    /// `[neurons][hidden]`
    pub up: Ptr,
    /// `[neurons]`; null: none.
    pub up_bias: Ptr,
    /// `[neurons][hidden]`
    pub down: Ptr,
    /// `[hidden]`; null: none.
    pub down_bias: Ptr,
    /// u32 `[keep up to a multiple of 8]`; null: all neurons.
    pub index: Ptr,
    /// `[rows][hidden]`
    pub out: Ptr,
    /// Holds what lies between the kernels.
    pub workspace: Workspace,
}

pub(super) struct MlpLayout {
    sums: Ptr,
    y: Ptr,
    delta: Ptr,
}

impl Operator for Mlp {
    type Layout = MlpLayout;

    fn kernels<'a>(&self, ops: &'a Ops) -> Result<&'a Kernels> {
        count("num_rows", self.rows, MAX_ROWS)?;
        width("hidden_size", self.hidden)?;
        width("num_neurons", self.neurons)?;
        if self.index != Ptr::NULL {
            count("keep", self.keep, self.neurons)?;
            if self.rows > SKINNY_ROWS {
                return Err(Error::limit(format!(
                    "num_rows is {}: products of listed neurons take at most {SKINNY_ROWS}",
                    self.rows
                )));
            }
        }
        ops.rows(self.dtype)
    }

    fn layout(&self, k: &Kernels, p: &mut Places) -> Self::Layout {
        let run = self.run();
        let first =
            if self.both(k, Ptr::NULL).is_some() { 0 } else { sum_floats(self.first(k).1, self.rows, run) };
        let second = sum_floats(self.second(k).1, self.rows, self.hidden);
        let y = if self.made(k) { 0 } else { self.rows as usize * run as usize };
        MlpLayout { sums: p.take(first, 4), y: p.take(y, 2), delta: p.take(second, 4) }
    }

    fn workspace(&self) -> Workspace {
        self.workspace
    }
}

impl Mlp {
    /// Neurons that the products run, filled up with repetitions that count nothing.
    fn run(&self) -> u32 {
        if self.index == Ptr::NULL { self.neurons } else { self.keep.next_multiple_of(8).min(MAX_WIDTH) }
    }

    /// The first product's launch and parts: listed neurons are known before it starts.
    fn first(&self, k: &Kernels) -> (Launch, u32) {
        let (rows, n, d) = (self.rows, self.run(), self.hidden);
        if self.index == Ptr::NULL { k.linear(rows, n, d) } else { k.linear_up(rows, n, d) }
    }

    /// What follows the first product, but for its sums; `y` holds the result.
    fn activation(&self, y: Ptr) -> ActivateParams {
        let (rows, n, index, up_bias) = (self.rows, self.run(), self.index, self.up_bias);
        let valid = if index == Ptr::NULL { n } else { self.keep };
        ActivateParams { up_bias, index, out: y, rows, n, valid, ..Default::default() }
    }

    /// The first product where it does its activation too.
    fn both(&self, k: &Kernels, y: Ptr) -> Option<(Launch, ActivatedParams)> {
        k.product_activated((self.x, self.up, self.hidden), &self.activation(y))
    }

    /// Whether the second product makes its own input from the first one's sums.
    fn made(&self, k: &Kernels) -> bool {
        self.index != Ptr::NULL && k.makes_input(self.rows) && self.both(k, Ptr::NULL).is_none()
    }

    /// The second product's launch and parts.
    fn second(&self, k: &Kernels) -> (Launch, u32) {
        let (n, run) = (self.hidden, self.run());
        if self.made(k) { k.mlp_down(n, run) } else { k.linear_transposed(self.rows, n, run) }
    }
}

impl Ops {
    /// Bytes of workspace that `op` needs.
    pub fn neuron_selection_workspace(&self, op: &NeuronSelection) -> Result<u64> {
        op.needed(self)
    }

    /// Selects.
    pub fn neuron_selection(&self, op: &NeuronSelection, launcher: &dyn Launcher) -> Result<()> {
        let k = op.kernels(self)?;
        pointer("index", op.index, 16)?;
        optional("active_rows", op.active_rows, 4)?;
        optional("nan_count", op.nan_count, 4)?;
        let l = op.places(k)?;
        let queue = Queue::new(launcher);
        let mark = MarkParams { active: op.active_rows, group: l.group, rows: op.rows };
        let mut params = NeuronParams {
            scores: l.scores,
            group: l.group,
            index: op.index,
            nan_count: if op.nan_count == Ptr::NULL { l.nan_count } else { op.nan_count },
            rows: op.rows,
            n: op.neurons,
            keep0: op.keep,
            ..Default::default()
        };
        if op.logits != Ptr::NULL {
            pointer("logits", op.logits, 16)?;
            queue.go(&k.mark_rows(), &mark)?;
            params.logits = Partial { data: op.logits, splits: 1, columns: op.neurons };
            queue.go(&k.neuron_scores(1, op.neurons), &params)?;
            return queue.go(&k.select_neurons(1, op.neurons), &params);
        }
        for (name, at) in [("x", op.x), ("router_down", op.down), ("router_up", op.up)] {
            pointer(name, at, 16)?;
        }
        queue.go(&k.mark_rows(), &mark)?;
        queue.settle();
        let (rows, n, out, kind) = (op.rows, op.rank, l.z, NO_ACTIVATION);
        let mut z = ActivateParams { out, rows, n, valid: n, kind, ..Default::default() };
        if let Some((launch, both)) = k.product_activated((op.x, op.down, op.hidden), &z) {
            queue.go(&launch, &both)?;
        } else {
            let (launch, narrow) = k.product((op.x, op.down), (rows, n, op.hidden), l.narrow);
            queue.go(&launch, &narrow)?;
            z.input = narrow.sums();
            queue.go(&k.activate(rows, n), &z)?;
        }
        if op.rows <= SKINNY_ROWS {
            let scores = RouterParams {
                z: l.z,
                w: op.up,
                scores: l.scores,
                group: l.group,
                rows: op.rows,
                n: op.neurons,
                rank: op.rank,
                first_group: 0,
                ..Default::default()
            };
            queue.go(&k.router_scores(op.rows, op.neurons), &scores)?;
        } else {
            let (launch, logits) = k.product((l.z, op.up), (op.rows, op.neurons, op.rank), l.sums);
            queue.go(&launch, &logits)?;
            params.logits = logits.sums();
            queue.go(&k.neuron_scores(1, op.neurons), &params)?;
        }
        queue.go(&k.select_neurons(1, op.neurons), &params)
    }

    /// Bytes of workspace that `op` needs.
    pub fn mlp_workspace(&self, op: &Mlp) -> Result<u64> {
        op.needed(self)
    }

    /// Runs the MLP.
    pub fn mlp(&self, op: &Mlp, launcher: &dyn Launcher) -> Result<()> {
        let k = op.kernels(self)?;
        for (name, at) in [("x", op.x), ("up", op.up), ("down", op.down), ("out", op.out)] {
            pointer(name, at, 16)?;
        }
        optional("index", op.index, 16)?;
        optional("up_bias", op.up_bias, 2)?;
        optional("down_bias", op.down_bias, 8)?;
        let l = op.places(k)?;
        let (queue, run) = (Queue::new(launcher), op.run());
        let (index, rows, hidden, made) = (op.index, op.rows, op.hidden, op.made(k));
        let mut act = op.activation(l.y);
        if let Some((launch, both)) = op.both(k, l.y) {
            queue.go(&launch, &both)?;
        } else {
            let (launch, splits) = op.first(k);
            let (x, w, out) = (op.x, op.up, l.sums);
            let up = LinearParams { x, w, index, out, rows, n: run, k: hidden, splits, ..Default::default() };
            queue.go(&launch, &up)?;
            act.input = up.sums();
            if !made {
                queue.go(&k.activate(rows, run), &act)?;
            }
        }
        let (launch, splits) = op.second(k);
        let (w, out) = (op.down, l.delta);
        if made {
            let ActivateParams { input: up, up_bias, valid, .. } = act;
            let down = DownParams { up, up_bias, w, index, out, rows, n: hidden, k: run, valid, splits };
            queue.go(&launch, &down)?;
        } else {
            let x = l.y;
            let down =
                LinearParams { x, w, index, out, rows, n: hidden, k: run, splits, ..Default::default() };
            queue.go(&launch, &down)?;
        }
        let sum = ActivateParams {
            input: Partial { data: l.delta, splits, columns: op.hidden },
            up_bias: op.down_bias,
            out: op.out,
            rows: op.rows,
            n: op.hidden,
            valid: op.hidden,
            kind: NO_ACTIVATION,
            ..Default::default()
        };
        queue.go(&k.activate(op.rows, op.hidden), &sum)
    }
}
