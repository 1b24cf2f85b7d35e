//! How decode attention cuts its work, see `cuda/attention_decode.cu`: pieces, the kept KV heads of the sequences, lie on
//! a line of virtual pages, and workers, blocks of the kernel, own equal intervals of it.

use super::launch::{Kernels, Launch, SKINNY_ROWS, choice_bytes, router_bytes_room};
use super::params::SEGMENT_COST;
use crate::error::{Error, Result};
use std::iter::once;
use std::ops::RangeInclusive;

/// Bytes of the cache that decode attention keeps under way, a multiprocessor. Enough for the latency; more would
/// only queue, and then some multiprocessors are served first and end early while others end late.
const IN_FLIGHT: u32 = 64 << 10;
/// Fewest virtual pages that a worker of four warps is given.
pub const MIN_PAGES: u32 = 6;
/// Pages that a multiprocessor reads while workers add up pieces that they share: on an H200 20 to 28, in 5 to 7 us.
const SHARING_PAGES: u32 = 20;
/// Most pieces of a worker that shares none.
const MOST_PIECES: u32 = 4;
/// Pieces up to which, and pages from which, heads of a group of [`MANY_ROWS`] are in so many parts that fewer and larger
/// workers are faster (on an H200, one sequence, 32 query and 8 KV heads, 4k to 32k tokens 5 to 27 %).
const FEW_PIECES: u32 = 8;
const LONG_PAGES: u32 = 200;
const MANY_ROWS: u32 = 4;
/// Blocks of a cluster, and pages of each: one to four a warp. With more of them, or more blocks than multiprocessors, single
/// blocks with even shares of all pages are faster though they add up parts in global memory (on an H200, LLaMA-3.1-8B
/// at 4k; all heads of OPT-6.7B in clusters of eight); with so few it does not matter how uneven lengths are.
const CLUSTERS: [u32; 3] = [8, 4, 2];
const CLUSTER_PAGES: RangeInclusive<u32> = 4..=16;
/// Sequences whose scores decode attention takes along. With fewer it ends before they are there.
const ALONG: RangeInclusive<u32> = 5..=SKINNY_ROWS;

/// What owns an interval of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Worker {
    /// A block of four warps.
    Small,
    /// A block of eight warps, which has a multiprocessor to itself.
    Large,
    /// Several blocks of four warps, for one piece.
    Cluster {
        /// So many.
        blocks: u32,
        /// Clusters that are started.
        most: u32,
    },
}

/// What shares the device with decode attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Nothing.
    Nothing,
    /// The MLP router's scores, made by its own blocks.
    Scores,
    /// Kernels that wait for room, which large blocks would keep them, and they those (a step of 8 sequences of OPT-6.7B 5 %).
    Kernels,
}

/// A step's line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Of which kind its workers are.
    pub worker: Worker,
    /// Workers that own an interval, where so many run.
    pub workers: u32,
    /// Pages that a piece has on the line at least.
    pub pages: u32,
}

impl Line {
    /// Virtual pages of a piece of so many pages.
    pub fn piece(&self, pages: u32) -> u32 {
        SEGMENT_COST + pages.max(self.pages)
    }

    /// Where the pieces of sequences with so many kept heads and pages begin, the line's end, and what the kernel reads
    /// behind it (`DecodeParams::prefix`).
    pub fn prefix(&self, pieces: impl Iterator<Item = (u32, u32)>) -> impl Iterator<Item = u32> {
        let line = *self;
        let ends = pieces.scan(0, move |end, (keep, pages)| {
            *end += keep * line.piece(pages);
            Some(*end)
        });
        once(0).chain(ends).chain([line.workers, line.pages])
    }
}

impl Kernels {
    /// The line for sequences with so many kept heads and pages.
    ///
    /// Where each worker can have pieces of about the same length, none needs to be shared and added up: on an H200
    /// 128 pieces of about 2048 tokens take 33 us instead of 37. With few pieces, a cluster of blocks has each.
    pub fn line(&self, pieces: impl Iterator<Item = (u32, u32)>, beside: Beside) -> Line {
        let (mut count, mut sum, mut longest) = (0u32, 0u32, 0u32);
        for (keep, pages) in pieces.filter(|&(keep, pages)| keep > 0 && pages > 0) {
            count += keep;
            sum += keep * pages;
            longest = pages.max(longest);
        }
        let may_be_large = beside != Beside::Kernels && self.tuning.large && self.decode_large.is_some();
        let large = (Worker::Large, self.multiprocessors, SHARING_PAGES);
        let small = (Worker::Small, self.decode_workers(), SHARING_PAGES / self.decode_blocks);
        for (worker, all, sharing) in [large, small] {
            let large = worker == Worker::Large;
            // Without an even number, equal pieces would be shared; without sharing the others have nothing to do.
            let each = count.div_ceil(even(all));
            let excess = (each * longest).saturating_sub(sharing).saturating_mul(all);
            if (!large || may_be_large)
                && (1..=if large { 1 } else { MOST_PIECES }).contains(&each)
                && count.is_multiple_of(each)
                && longest >= 2 * MIN_PAGES
                && excess <= sum
            {
                return Line { worker, workers: count / each, pages: longest };
            }
        }
        let multiprocessors = even(self.multiprocessors);
        let cluster = CLUSTERS.into_iter().find(|&blocks| {
            beside != Beside::Scores
                && (1..=multiprocessors / blocks).contains(&count)
                && CLUSTER_PAGES.contains(&longest.div_ceil(blocks))
                && self.cluster(blocks, count).is_some()
        });
        if let Some(blocks) = cluster {
            let half = multiprocessors / 2 / blocks;
            let most = if count <= half { half } else { multiprocessors / blocks };
            return Line { worker: Worker::Cluster { blocks, most }, workers: count, pages: longest };
        }
        let line = sum + count * SEGMENT_COST;
        if may_be_large && count <= FEW_PIECES && longest >= LONG_PAGES && self.group >= MANY_ROWS {
            let workers = (line / (2 * MIN_PAGES)).clamp(1, even(self.multiprocessors));
            return Line { worker: Worker::Large, workers, pages: 0 };
        }
        Line { worker: Worker::Small, workers: (line / MIN_PAGES).max(1), pages: 0 }
    }

    /// Most workers: as many as run at once.
    pub fn decode_workers(&self) -> u32 {
        self.multiprocessors * self.decode_blocks
    }

    /// The launch of so many clusters of so many blocks, where there are such and two fit a multiprocessor. Clusters for half
    /// of the multiprocessors take so much memory that there is one on each, which still leaves room for a product's;
    /// more are left to find their places, since the groups of multiprocessors that clusters run on are not all even.
    fn cluster(&self, blocks: u32, most: u32) -> Option<Launch> {
        let (room, _) = self.decode_room(false);
        let shared = bytes(4, self.head_dim, self.group, self.stages)
            + blocks * self.group * (self.head_dim * 4 + 2 * 4);
        let kernel =
            self.decode_cluster.filter(|_| self.warpgroups && self.tuning.clusters && shared <= room)?;
        let shared = if 2 * most * blocks <= self.multiprocessors { room + 1024 } else { shared };
        Some(Launch { cluster: blocks, ..Launch::new(kernel, (most * blocks, 1), 4 * 32, shared) })
    }

    /// Decode attention of so many sequences; `worker` as the line says; `beside`: side work is waiting for room.
    pub fn decode(&self, sequences: u32, worker: Worker, beside: bool) -> Launch {
        if let Worker::Cluster { blocks, most } = worker
            && let Some(launch) = self.cluster(blocks, most)
        {
            return launch;
        }
        let large = self.decode_large.filter(|_| worker == Worker::Large);
        let (kernel, warps, blocks) = match large {
            Some(kernel) => (kernel, 8, even(self.multiprocessors)),
            None => (self.decode, 4, even_workers(self.decode_workers(), sequences, beside)),
        };
        let shared = bytes(warps, self.head_dim, self.group, self.stages);
        Launch::new(kernel, (blocks, 1), 32 * warps, shared)
    }

    /// Whether decode attention takes the MLP router's scores of so many sequences along: its blocks have room for what they
    /// need and find memory idle when they start.
    pub fn takes_scores(&self, sequences: u32) -> bool {
        let [small, large] = self.decode_scored;
        self.tuning.along
            && ALONG.contains(&sequences)
            && small.is_some()
            && self.scored_bytes((4, self.stages), sequences) <= self.decode_room(false).0
            && (self.decode_large.is_none()
                || large.is_some() && self.scored_bytes((8, self.stages), sequences) <= self.shared_per_block)
    }

    /// Whether a block of that kernel, for such workers, may choose among `n` neurons as well.
    pub fn chooses(&self, n: u32, worker: Worker) -> bool {
        let large = self.is_large(worker);
        let (room, most) = self.decode_room(large);
        let takes = |n| choice_bytes(n, if large { 8 } else { 4 }) <= room;
        self.tuning.choose && n < 1 << 16 && takes(n) && most > 1
    }

    /// Whether such workers are large blocks here: not all head sizes have those.
    fn is_large(&self, worker: Worker) -> bool {
        worker == Worker::Large && self.decode_large.is_some()
    }

    /// Shared memory that a block may have, and how many blocks run at once.
    fn decode_room(&self, large: bool) -> (u32, u32) {
        if large {
            return (self.shared_per_block, self.multiprocessors);
        }
        let each = (self.shared_per_block + 1024) / self.decode_blocks - 1024;
        (self.shared_per_block.min(each), self.decode_workers())
    }

    /// Decode attention with those scores, and stages of its warps; `choice`: so many neurons from which a block of its own
    /// chooses.
    pub fn decode_scored(
        &self,
        sequences: u32,
        worker: Worker,
        choice: Option<u32>,
    ) -> Option<(Launch, u32)> {
        let large = self.is_large(worker);
        let launch = self.decode(sequences, if large { worker } else { Worker::Small }, false);
        let kernel = self.decode_scored[usize::from(large)]?;
        let room = self.decode_room(large);
        // One stage more in large blocks: when they are done with the scores, few loads are under way (on an H200 a step of 8
        // sequences of OPT-6.7B with 2k tokens .7 %).
        let warps = launch.threads / 32;
        let needs = |stages: u32| self.scored_bytes((warps, stages), sequences);
        let stages = self.stages + u32::from(large && needs(self.stages + 1) <= room.0);
        let shared = needs(stages).max(choice.map_or(0, |n| choice_bytes(n, warps)));
        let blocks = (launch.grid.0 + u32::from(choice.is_some())).min(room.1);
        Some((Launch { kernel, grid: (blocks, 1), shared, ..launch }, stages))
    }

    /// What a router multiplies lies where the pages of the stages after the first would.
    fn scored_bytes(&self, (warps, stages): (u32, u32), sequences: u32) -> u32 {
        let page = 64 * self.head_dim;
        let taken = (warps * page + router_bytes_room(sequences)).saturating_sub(warps * stages * page);
        bytes(warps, self.head_dim, self.group, stages) + taken
    }
}

/// Of `all` blocks that run at once a multiple of 32, unless a small GPU would lose too much.
fn even(all: u32) -> u32 {
    let even = all / 32 * 32;
    if 10 * even >= 9 * all { even } else { all }
}

/// Blocks of four warps for so many sequences, of `all` that run at once.
///
/// Heads and small batches mostly come in powers of two, so that with a multiple of 32 blocks few of them have to share a
/// sequence's head; and the places left over are for what comes next, or runs beside. On an H200 (256 blocks of
/// 264) that makes steps of 8 sequences 2 to 5 % faster, at 32 only those with work beside; at 64 and 128 some steps are
/// up to 8 % slower.
fn even_workers(all: u32, sequences: u32, beside: bool) -> u32 {
    if sequences <= if beside { 32 } else { 16 } { even(all) } else { all }
}

/// Blocks of four warps on a multiprocessor, two where registers and shared memory allow it, and stages of their warps.
pub(super) fn blocks_and_stages(head_dim: u32, group: u32, shared_per_block: u32) -> Result<(u32, u32)> {
    let (page, fixed) = (64 * head_dim, bytes(4, head_dim, group, 0));
    for blocks in if head_dim > 128 { 1..=1 } else { 1..=2 }.rev() {
        let room = shared_per_block.min((shared_per_block + 1024) / blocks - 1024);
        let fit = room.saturating_sub(fixed) / (4 * (page + 8));
        if fit >= 2 {
            return Ok((blocks, fit.min(1 + IN_FLIGHT.div_ceil(4 * blocks * page))));
        }
    }
    Err(Error::unsupported(format!(
        "head size {head_dim} with {group} query heads per KV head: decode attention needs {} bytes of shared memory a block, the device has {shared_per_block}",
        fixed + 8 * (page + 8)
    )))
}

/// Whether there are blocks of eight warps beside those, with as many stages, and room for one.
pub(super) fn large_fits(
    head_dim: u32,
    group: u32,
    (blocks, stages): (u32, u32),
    shared_per_block: u32,
) -> bool {
    blocks == 2 && group <= 8 && bytes(8, head_dim, group, stages) <= shared_per_block
}

/// Shared memory of a block of so many warps.
fn bytes(warps: u32, head_dim: u32, group: u32, stages: u32) -> u32 {
    warps * (group * head_dim * 4 + 2 * 16 * 4 + stages * (64 * head_dim + 8)) + 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    const KIB: u32 = 1 << 10;

    #[test]
    fn a_line_shares_no_piece_where_every_multiprocessor_can_have_one() {
        let kernels = |group| Kernels::new(DType::BF16, 128, group, 132, 227 * KIB).unwrap();
        let whole = |workers, pages| Line { worker: Worker::Large, workers, pages };
        let small = |workers, pages| Line { worker: Worker::Small, workers, pages };
        let split = |workers| small(workers, 0);
        let (one, grouped) = (kernels(1), kernels(4));
        // 8 sequences, 16 heads; about the same length; one much longer, or nothing but waiting rows beside them.
        let line =
            |k: &Kernels, pages: &[u32], keep| k.line(pages.iter().map(|&p| (keep, p)), Beside::Nothing);
        assert_eq!(line(&one, &[128; 8], 16), whole(128, 128));
        assert_eq!(line(&one, &[128, 127, 126, 125, 124, 123, 130, 128], 16), whole(128, 130));
        assert_eq!(line(&one, &[128, 128, 128, 128, 128, 128, 128, 0], 18), whole(126, 128));
        assert_eq!(line(&one, &[128; 7], 16), whole(112, 128));
        assert_eq!(line(&one, &[90, 90, 90, 90, 90, 90, 90, 128], 16), split(16 * (758 + 32) / 6));
        assert_eq!(line(&one, &[128; 6], 16), split(6 * 16 * 132 / 6));
        assert_eq!(line(&one, &[11; 8], 16), split(16 * 8 * 15 / 6));
        // More pieces than large blocks, and than small ones.
        assert_eq!(line(&one, &[128; 8], 32), small(256, 128));
        assert_eq!(line(&one, &[128; 16], 32), small(256, 128));
        assert_eq!(line(&one, &[256; 16], 32), split(16 * 32 * 260 / 6));
        assert_eq!(line(&one, &[128; 16], 24), split(16 * 24 * 132 / 6));
        assert_eq!(line(&one, &[64; 27], 19), split(27 * 19 * 68 / 6));
        assert_eq!(line(&one, &[64; 40], 32), split(40 * 32 * 68 / 6));
        // Few long heads of a group.
        assert_eq!(line(&grouped, &[512], 8), whole(128, 0));
        assert_eq!(line(&grouped, &[200], 5), whole(1020 / 12, 0));
        assert_eq!(line(&grouped, &[199], 8), split(8 * 203 / 6));
        assert_eq!(line(&one, &[512], 8), split(8 * 516 / 6));
        // In clusters: one sequence's heads, or half of them, of a group or not, two sequences; too many, too long, too
        // short, scores along.
        let cluster =
            |blocks, most, workers, pages| Line { worker: Worker::Cluster { blocks, most }, workers, pages };
        let [one_9, grouped_9] = [one, grouped].map(|k| k.with_warpgroups(true));
        assert_eq!(line(&one_9, &[64], 32), cluster(4, 32, 32, 64));
        assert_eq!(line(&one_9, &[64], 16), cluster(8, 16, 16, 64));
        assert_eq!(line(&grouped_9, &[128], 8), cluster(8, 8, 8, 128));
        assert_eq!(line(&grouped_9, &[127, 90], 5), cluster(8, 16, 10, 127));
        assert_eq!(line(&one_9, &[64, 64], 16), cluster(4, 32, 32, 64));
        assert_eq!(line(&one_9, &[64, 64], 32), split(64 * 68 / 6));
        assert_eq!(line(&grouped_9, &[129], 8), split(8 * 133 / 6));
        assert_eq!(line(&grouped_9, &[7], 8), cluster(2, 32, 8, 7));
        assert_eq!(line(&grouped_9, &[6], 8), split(8 * 10 / 6));
        assert_eq!(one_9.line([(16, 64)].into_iter(), Beside::Scores), split(16 * 68 / 6));
        assert_eq!(grouped_9.decode(1, cluster(8, 8, 0, 0).worker, false).shared, 114 * KIB);
        // Side work, another choice, nothing to do.
        assert_ne!(one.line([(16, 128); 8].into_iter(), Beside::Kernels).worker, Worker::Large);
        let mut without = one;
        without.tuning.large = false;
        assert_eq!(line(&without, &[128; 8], 16), split(8 * 16 * 132 / 6));
        assert_eq!(line(&one, &[], 1), split(1));
    }

    #[test]
    fn few_sequences_have_even_workers_on_a_large_gpu() {
        for (all, sequences, beside, want) in [
            (264, 1, false, 256), // H100, H200
            (264, 16, false, 256),
            (264, 17, false, 264),
            (264, 32, true, 256),
            (264, 33, true, 264),
            (296, 8, false, 288), // B200
            (216, 8, false, 216), // A100: 192 would be too few
            (40, 8, false, 40),
            (10, 1, false, 10),
        ] {
            assert_eq!(even_workers(all, sequences, beside), want, "{all} {sequences} {beside}");
        }
    }

    #[test]
    fn decode_attention_fits_what_a_multiprocessor_has() {
        let kib = |n: u32| n * KIB;
        // H100 and A100, a consumer GPU, and a head size whose pages need more.
        assert_eq!(blocks_and_stages(128, 4, kib(227)).unwrap(), (2, 2));
        assert_eq!(blocks_and_stages(64, 1, kib(227)).unwrap(), (2, 3));
        assert_eq!(blocks_and_stages(128, 1, kib(163)).unwrap(), (2, 2));
        assert_eq!(blocks_and_stages(128, 4, kib(99)).unwrap(), (1, 2));
        assert_eq!(blocks_and_stages(256, 1, kib(227)).unwrap(), (1, 2));
        let error = blocks_and_stages(256, 8, kib(99)).unwrap_err();
        assert!(error.message.contains("head size 256 with 8 query heads"), "{}", error.message);
        for head_dim in [64, 80, 96, 128, 256] {
            for group in 1..=16 {
                for shared in [kib(99), kib(163), kib(227)] {
                    let Ok((blocks, stages)) = blocks_and_stages(head_dim, group, shared) else {
                        continue;
                    };
                    let block = bytes(4, head_dim, group, stages);
                    assert!(
                        blocks * (block + 1024) <= shared + 1024 && stages >= 2,
                        "{head_dim} {group} {shared}"
                    );
                }
            }
        }
    }
}
