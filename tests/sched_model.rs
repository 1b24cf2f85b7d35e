//! The scheduler against random traces: a model of an engine without a device steps thousands of
//! random workloads and checks, after every step, that pages add up, budgets hold, decoding never
//! waits for prefill, and that everybody finishes.

use polar_sparsity::kv::{BlockTable, PagePool, pages_for};
use polar_sparsity::sched::policy::{Bounds, Decision, View};

struct Seq {
    slot: u32,
    priority: u32,
    arrival: u64,
    prompt: u32,
    total: u32,
    known: u32,
    computed: u32,
    table: BlockTable,
    preempted: u32,
}

impl Seq {
    fn view(&self) -> View {
        View {
            slot: self.slot,
            known: self.known,
            computed: self.computed,
            prefill: self.prompt,
            pages: self.table.pages().len() as u32,
            ready: true,
        }
    }

    fn urgency(&self) -> (std::cmp::Reverse<u32>, u64) {
        (std::cmp::Reverse(self.priority), self.arrival)
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as u32) % n
    }
}

struct Machine {
    pool: PagePool,
    running: Vec<Seq>,
    waiting: Vec<Seq>,
    max_batch: usize,
    step_tokens: usize,
    finished: usize,
    preemptions: usize,
}

impl Machine {
    fn new(pages: usize, max_batch: usize, step_tokens: usize) -> Machine {
        let pool = PagePool::new(pages).expect("memory");
        Machine {
            pool,
            running: vec![],
            waiting: vec![],
            max_batch,
            step_tokens,
            finished: 0,
            preemptions: 0,
        }
    }

    fn views(&self) -> (Vec<View>, Vec<View>) {
        (self.running.iter().map(Seq::view).collect(), self.waiting.iter().map(Seq::view).collect())
    }

    /// One step; false when there was nothing to do.
    fn step(&mut self, decision: &mut Decision) -> bool {
        self.running.sort_by_key(Seq::urgency);
        self.waiting.sort_by_key(Seq::urgency);
        let bounds =
            Bounds { max_batch: self.max_batch, step_tokens: self.step_tokens, free_pages: self.pool.free() };
        let (running, waiting) = self.views();
        decision.plan(&running, &waiting, bounds);
        assert_eq!(decision.stuck, None, "every sequence fits alone");
        for &slot in &decision.preempt {
            let i = self.running.iter().position(|s| s.slot == slot).expect("preempts what runs");
            let mut seq = self.running.remove(i);
            // Whoever is preempted is not more urgent than anybody who runs on.
            for share in &decision.run {
                let other = self.running.iter().find(|s| s.slot == share.slot);
                assert!(other.is_none_or(|o| o.urgency() < seq.urgency()), "a less urgent sequence runs on");
            }
            seq.table.shrink(0, &mut self.pool);
            (seq.computed, seq.preempted) = (0, seq.preempted + 1);
            self.preemptions += 1;
            self.waiting.push(seq);
        }
        for &slot in &decision.admit {
            let i = self.waiting.iter().position(|s| s.slot == slot).expect("admits who waits");
            let seq = self.waiting.remove(i);
            self.running.push(seq);
        }
        assert!(self.running.len() <= self.max_batch);
        let rows: u32 = decision.run.iter().map(|s| s.rows).sum();
        assert!(rows as usize <= self.step_tokens);
        let decoding = decision.run.iter().take_while(|s| s.decode).count();
        assert!(decision.run[decoding..].iter().all(|s| !s.decode), "decode rows come first");
        for share in &decision.run {
            let seq = self.running.iter_mut().find(|s| s.slot == share.slot).expect("runs what runs");
            assert_eq!(share.decode, seq.computed >= seq.prompt);
            assert!(share.rows > 0 && (!share.decode || share.rows == 1));
            seq.computed += share.rows;
            assert!(seq.computed <= seq.known);
            assert!(seq.table.grow(seq.computed as usize, &mut self.pool), "planned pages exist");
            if seq.computed == seq.known {
                seq.known += 1;
            }
        }
        let pool = &mut self.pool;
        let before = self.running.len();
        self.running.retain_mut(|s| {
            let done = s.known > s.total;
            if done {
                s.table.shrink(0, pool);
            }
            !done
        });
        self.finished += before - self.running.len();
        let held = self.running.iter().chain(&self.waiting).flat_map(|s| s.table.pages());
        self.pool.check(held).expect("pages add up");
        !decision.run.is_empty()
    }
}

#[test]
fn random_traces_keep_every_promise() {
    let mut preemptions = 0;
    for seed in 0..400 {
        let mut random = Random(seed);
        let max_batch = 1 + random.below(8) as usize;
        let step_tokens = max_batch + random.below(64) as usize;
        let pages = 6 + random.below(30) as usize;
        let longest = (pages * 16) as u32;
        let mut machine = Machine::new(pages, max_batch, step_tokens);
        let mut decision = Decision::with_room(max_batch).expect("memory");
        let requests = 1 + random.below(40);
        let mut submitted = 0;
        let mut steps = 0;
        while machine.finished < requests as usize {
            while submitted < requests && random.below(3) > 0 {
                let prompt = 1 + random.below(longest - 1);
                let total = (prompt + 1 + random.below(60)).min(longest);
                machine.waiting.push(Seq {
                    slot: submitted,
                    priority: random.below(3),
                    arrival: u64::from(submitted),
                    prompt,
                    total,
                    known: prompt,
                    computed: 0,
                    table: BlockTable::with_room(longest as usize).expect("memory"),
                    preempted: 0,
                });
                submitted += 1;
            }
            let worked = machine.step(&mut decision);
            let alive = machine.running.len() + machine.waiting.len();
            assert!(worked || alive == 0, "seed {seed}: {alive} sequences and nothing runs");
            steps += 1;
            assert!(steps < 200_000, "seed {seed}: no end in sight");
        }
        assert_eq!(machine.pool.free(), pages, "seed {seed}: pages came back");
        preemptions += machine.preemptions;
    }
    assert!(preemptions > 100, "the traces are too easy: {preemptions} preemptions");
}

#[test]
fn the_same_trace_gives_the_same_decisions() {
    let view = |slot, computed: u32| View {
        slot,
        known: computed + 1,
        computed,
        prefill: 4,
        pages: pages_for(computed as usize) as u32,
        ready: true,
    };
    let running = [view(3, 16), view(1, 32), view(7, 20)];
    let bounds = Bounds { max_batch: 4, step_tokens: 8, free_pages: 1 };
    let decide = || {
        let mut d = Decision::with_room(4).expect("memory");
        d.plan(&running, &[], bounds);
        (d.preempt, d.admit, d.run)
    };
    assert_eq!(decide(), decide());
}
