// One row of logits as a request sees it, and the search that top-k, top-p and the draw share.
//
// Every question is "which is the first token, in some order, with which the sum of some measure reaches
// a target": the k-th best (count, by value), the end of the nucleus (weight, by value), the drawn token
// (weight, by value or by index). Orders are integers that differ for every token (value first, then index,
// so ties go to the lower index); weights are exp() in fixed point. So sums do not depend on the order of
// threads, nothing is sorted, and a row's result is the same bits in any batch.
#pragma once
#include "common.cuh"

namespace sampling {

constexpr int THREADS = 512;
constexpr uint32_t DIGITS = 512, CHUNK = 128, GATHERED = 1024;
constexpr uint64_t ALL = ~0ull;
enum Kind : uint32_t { LIKELIEST, DRAW, ALTERNATIVES };
enum Measure { COUNT, WEIGHT };
enum Order { BY_VALUE, BY_INDEX };

DEVICE uint64_t shuffle64(uint64_t v, int lane) {
    return (uint64_t)shuffle((uint32_t)(v >> 32), lane) << 32 | shuffle((uint32_t)v, lane);
}
DEVICE uint64_t min64(uint64_t a, uint64_t b) { return a < b ? a : b; }
DEVICE uint64_t max64(uint64_t a, uint64_t b) { return a > b ? a : b; }
DEVICE uint64_t warp_sum64(uint64_t v) {
    for (int m = 16; m; m >>= 1) v += shuffle64(v, lane_index() ^ m);
    return v;
}

// Shared memory of a block: SAMPLE_BINS 64-bit sums as two words each, so that adding needs 32-bit
// atomics only; what a search has gathered; and a few words for reductions.
struct Shared {
    uint32_t* low;
    uint32_t* high;
    uint64_t* sums;   // [3 * 16]
    uint64_t* found;  // [4]
    uint64_t* kept;   // [MAX_LOGPROBS]
    uint32_t* words;  // [4]
    uint64_t* places;    // [GATHERED]
    uint64_t* measures;  // [GATHERED]

    DEVICE_MEMBER explicit Shared(unsigned char* at) {
        sums = (uint64_t*)at;
        found = sums + 48;
        kept = found + 4;
        words = (uint32_t*)(kept + MAX_LOGPROBS);
        low = (uint32_t*)(at + 1024);
        high = low + SAMPLE_BINS;
        places = (uint64_t*)(high + SAMPLE_BINS);
        measures = places + GATHERED;
    }
    DEVICE_MEMBER void clear(uint32_t bins) {
        for (uint32_t i = thread_index(); i < bins; i += THREADS) low[i] = high[i] = 0;
        sync_block();
    }
    DEVICE_MEMBER void add(uint32_t bin, uint64_t v) {
        const uint32_t old = atomic_add(low + bin, (uint32_t)v);
        const uint32_t carried = (uint32_t)(v >> 32) + (old + (uint32_t)v < old);
        if (carried) atomic_add(high + bin, carried);
    }
    DEVICE_MEMBER uint64_t at(uint32_t bin) const { return (uint64_t)high[bin] << 32 | low[bin]; }
};

// A row with its job.
struct Row {
    const float* logits;
    const uint32_t* occurrences;  // null: no penalties
    const SampleJob* job;
    float repetition, presence, frequency, max, inverse, floor, scale;
    uint32_t index_bits;
    bool listing;

    DEVICE_MEMBER float value(uint32_t i) const {
        float x = logits[i];
        if (listing) return x + 0.0f;  // -0 becomes 0
        if (occurrences) {
            const uint32_t seen = occurrences[i], output = seen & 0x7fffffffu;
            if (seen) {
                x = x > 0.0f ? x / repetition : product(x, repetition);
                if (output) x -= presence + product(frequency, (float)output);
            }
        }
        return x;
    }
    DEVICE_MEMBER float exponent(float x) const { return product(x - max, inverse); }
    DEVICE_MEMBER bool candidate(float x) const { return finite(x) && exponent(x) >= floor; }
    // In units of 2^-43: 2^20 tokens of the largest weight still fit.
    DEVICE_MEMBER uint64_t weight(float x) const { return (uint64_t)(exp_exact(exponent(x)) * 8796093022208.0f); }
    DEVICE_MEMBER uint32_t bin(float x) const { return (uint32_t)fminf((max - x) * scale, (float)(SAMPLE_BINS - 1)); }
    // Smaller is better; every bit of the float counts, as in Rust's total_cmp.
    DEVICE_MEMBER uint64_t order(float x, uint32_t i) const {
        const uint32_t b = bits_of_float(x), key = b & 0x80000000u ? ~b : b | 0x80000000u;
        return (uint64_t)~key << index_bits | i;
    }
    DEVICE_MEMBER static bool finite(float x) { return (bits_of_float(x) & 0x7f800000u) != 0x7f800000u; }
};

// Everything but the largest value.
DEVICE Row row_of(const SampleParams& p, uint32_t job_index) {
    const SampleJob& job = p.jobs[job_index];
    Row r;
    r.logits = p.logits + (uint64_t)job.row * p.vocab;
    r.occurrences = job.occurrences == NONE ? nullptr : p.occurrences + (uint64_t)job.occurrences * p.vocab;
    r.job = &job;
    r.repetition = job.repetition;
    r.presence = job.presence;
    r.frequency = job.frequency;
    r.max = 0;
    r.inverse = job.inverse;
    r.floor = job.floor;
    r.scale = job.bin_scale;
    r.index_bits = p.index_bits;
    r.listing = job.kind == ALTERNATIVES;
    return r;
}

// f(i, value) for every token of [begin, end), by a whole block; a NaN stands for none.
template <class F> DEVICE void each_value(const Row& r, uint32_t begin, uint32_t end, F f) {
    for (uint32_t base = begin + thread_index(); base - thread_index() < end; base += 8 * THREADS) {
        float v[8];  // loads first: atomics in between would serialise them
        UNROLL for (int k = 0; k < 8; k++) v[k] = base + k * THREADS < end ? r.value(base + k * THREADS) : float_of_bits(0x7fc00000u);
        UNROLL for (int k = 0; k < 8; k++) f(base + k * THREADS, v[k]);
    }
}

// True in the block of a job that arrives last, which then sees what the others wrote.
DEVICE bool arrives_last(SampleState* state, const Shared& s) {
    sync_block();
    if (thread_index() == 0) {
        fence_device();
        s.words[0] = atomic_add(&state->arrived, 1u) == (uint32_t)grid_x() - 1;
    }
    sync_block();
    const bool last = s.words[0];
    sync_block();
    if (last) fence_device();
    return last;
}

struct Crossing {
    uint32_t bin;              // NONE: the target is not reached
    uint64_t before, through;  // sums of the bins before it, and with it
    uint64_t total;
};

// The first of THREADS * `each` bins with which their sum reaches `target(total)`, at least 1.
template <class Load, class Target> DEVICE Crossing crossing(const Shared& s, uint32_t each, Load load, Target target) {
    const uint32_t first = thread_index() * each;
    uint64_t own = 0;
    for (uint32_t b = first; b < first + each; b++) own += load(b);
    uint64_t sum = own;
    for (int m = 1; m < 32; m *= 2) {
        const uint64_t from = shuffle64(sum, (lane_index() - m) & 31);
        if (lane_index() >= m) sum += from;
    }
    if (lane_index() == 31) s.sums[warp_index()] = sum;
    if (thread_index() == 0) s.found[0] = NONE;
    sync_block();
    uint64_t before = sum - own, total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp_index()) before += s.sums[w];
        total += s.sums[w];
    }
    const uint64_t wanted = target(total);
    if (before < wanted && wanted <= before + own) {
        uint32_t b = first;
        uint64_t here = load(b);
        while (before + here < wanted) {
            before += here;
            here = load(++b);
        }
        s.found[0] = b;
        s.found[1] = before;
        s.found[2] = before + here;
    }
    sync_block();
    const Crossing c = {(uint32_t)s.found[0], s.found[1], s.found[2], total};
    sync_block();
    return c;
}

// Tokens to look at: a list, or a range.
struct Source {
    const uint32_t* list;  // null: a range
    uint32_t first, count;
};

// Which of them, how they are ordered and what is summed.
struct Question {
    Measure measure;
    Order order;
    uint64_t limit;   // only tokens up to this one, by value
    uint32_t bin;     // only tokens of this bin; NONE: of any
    uint64_t target;  // at least 1
};

struct Answer {
    uint64_t last;     // the token with which the sum reaches the target, in the order asked for; ALL: none
    uint64_t through;  // the sum up to and with it
};

// By a whole block. Each round measures the interval that holds the answer, then cuts it into up to 512.
// As soon as an interval's tokens fit, they are gathered in shared memory and the source is not read again.
DEVICE Answer search(const Row& r, const Source& source, const Question& q, Shared& s) {
    uint64_t first = 0, end = ALL, before = 0;
    uint32_t gathered = NONE;
    const auto each = [&](auto f) {
        if (gathered != NONE) {
            for (uint32_t j = thread_index(); j < gathered; j += THREADS)
                if (s.places[j] >= first && s.places[j] <= end) f(s.places[j], s.measures[j]);
            return;
        }
        constexpr int AT_ONCE = 8;
        for (uint32_t j0 = thread_index(); j0 < source.count; j0 += AT_ONCE * THREADS) {
            uint32_t token[AT_ONCE];
            float v[AT_ONCE];
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                const uint32_t j = j0 + k * THREADS < source.count ? j0 + k * THREADS : j0;
                token[k] = source.list ? source.list[j] : source.first + j;
            }
            UNROLL for (int k = 0; k < AT_ONCE; k++) v[k] = r.value(token[k]);
            UNROLL for (int k = 0; k < AT_ONCE; k++) {
                const float x = v[k];
                if (j0 + k * THREADS >= source.count || !r.candidate(x) || (q.bin != NONE && r.bin(x) != q.bin)) continue;
                const uint64_t by_value = r.order(x, token[k]), place = q.order == BY_INDEX ? token[k] : by_value;
                if (by_value > q.limit || place < first || place > end) continue;
                f(place, q.measure == COUNT ? 1 : r.weight(x));
            }
        }
    };
    for (;;) {
        uint64_t low = ALL, high = 0, sum = 0;
        if (thread_index() == 0) s.words[0] = 0;
        sync_block();
        each([&](uint64_t place, uint64_t measure) {
            low = min64(low, place);
            high = max64(high, place);
            sum += measure;
            // Past its end the counter stands still: that they do not fit is all it has to tell.
            if (gathered == NONE && load_relaxed(s.words) <= GATHERED) {
                const uint32_t at = atomic_add(s.words, 1u);
                if (at < GATHERED) {
                    s.places[at] = place;
                    s.measures[at] = measure;
                }
            }
        });
        for (int m = 16; m; m >>= 1) {
            low = min64(low, shuffle64(low, lane_index() ^ m));
            high = max64(high, shuffle64(high, lane_index() ^ m));
        }
        sum = warp_sum64(sum);
        if (lane_index() == 0) {
            s.sums[warp_index()] = low;
            s.sums[16 + warp_index()] = high;
            s.sums[32 + warp_index()] = sum;
        }
        sync_block();
        low = ALL, high = sum = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            low = min64(low, s.sums[w]);
            high = max64(high, s.sums[16 + w]);
            sum += s.sums[32 + w];
        }
        if (gathered == NONE && s.words[0] <= GATHERED) gathered = s.words[0];
        sync_block();
        if (before + sum < q.target) return {ALL, before + sum};
        if (low == high) return {low, before + sum};
        const int width = highest_bit(low ^ high) + 1, shift = width > 9 ? width - 9 : 0;
        const uint64_t base = low >> shift;
        s.clear(DIGITS);
        each([&](uint64_t place, uint64_t measure) {
            if (measure) s.add((uint32_t)((place >> shift) - base), measure);
        });
        sync_block();
        const uint64_t left = q.target - before;
        const Crossing c = crossing(
            s, 1, [&](uint32_t b) { return s.at(b); }, [&](uint64_t) { return left; });
        before += c.before;
        first = (base + c.bin) << shift;
        end = first + ((1ull << shift) - 1);
    }
}

// Where a draw among weights that add up to `total` ends.
DEVICE uint64_t draw_target(double uniform, uint64_t total) {
    return min64((uint64_t)(uniform * (double)total) + 1, total);
}

}  // namespace sampling
