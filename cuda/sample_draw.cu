// Tokens for requests that are not plainly greedy, and lists of likeliest alternatives, from rows of
// logits that argmax has seen. The semantics are src/sample/sampler.rs's.
//
// A job is one row and what is wanted of it. Blocks (piece, job):
//   sample_penalised  the likeliest token after penalties; greedy jobs end here
//   sample_bins       draws from all candidates: weights per chunk of tokens, then the chunk drawn. Others: a
//                     histogram by distance from the largest logit, of counts (top-k) or weights (top-p),
//                     and the bin in which the cut falls
//   sample_finish     lists the tokens up to that bin; then cuts exactly and draws. When they are more than
//                     the list holds, the row itself is read instead
// Each reads the row once; the block of a job that arrives last does what is left.
#include "sampling.cuh"

namespace sampling {

// The largest value; false when no value is finite.
DEVICE bool open(const SampleParams& p, uint32_t job_index, Row& r) {
    r = row_of(p, job_index);
    const uint32_t row = r.job->row;
    const float logprob = p.likeliest_logprob[row];
    uint32_t best = p.likeliest[row];
    if (logprob != logprob) return false;
    if (r.occurrences) {
        const uint64_t key = p.states[job_index].best;
        if (key == 0) return false;
        best = ~(uint32_t)key;
    }
    r.max = r.value(best);
    return true;
}

DEVICE void put_token(const SampleParams& p, uint32_t row, uint32_t token) {
    const float* logits = p.logits + (uint64_t)row * p.vocab;
    p.token[row] = token;
    p.logprob[row] = logits[token] - logits[p.likeliest[row]] + p.likeliest_logprob[row];
}

// The result of a row without a finite value. By one thread.
DEVICE void put_nothing(const SampleParams& p, const SampleJob& job) {
    if (job.kind == ALTERNATIVES) {
        for (int i = 0; i < MAX_LOGPROBS; i++) p.top_token[job.row * MAX_LOGPROBS + i] = NONE;
    } else {
        p.token[job.row] = 0;
        p.logprob[job.row] = float_of_bits(0x7fc00000u);
    }
}

// A job's memory as the next step wants it. By a whole block, when no other block reads it any more.
DEVICE void leave_zeros(SampleState* state, uint64_t* bins) {
    for (uint32_t i = thread_index(); i < SAMPLE_BINS; i += THREADS) bins[i] = 0;
    if (thread_index() == 0) *state = SampleState{};
}

DEVICE void penalised(const SampleParams& p) {
    SHARED_BYTES(shared);
    Shared s(shared);
    const uint32_t job_index = p.first_job + block_y(), pieces = grid_x();
    SampleState* state = p.states + job_index;
    const Row r = row_of(p, job_index);
    const uint32_t begin = (uint32_t)((uint64_t)p.vocab * block_x() / pieces);
    const uint32_t end = (uint32_t)((uint64_t)p.vocab * (block_x() + 1) / pieces);
    uint64_t best = 0;
    each_value(r, begin, end, [&](uint32_t i, float x) {
        if (Row::finite(x)) best = max64(best, (uint64_t)sort_key(x) << 32 | (uint32_t)~i);
    });
    for (int m = 16; m; m >>= 1) best = max64(best, shuffle64(best, lane_index() ^ m));
    if (lane_index() == 0) s.sums[warp_index()] = best;
    sync_block();
    if (thread_index() == 0) {
        for (int w = 0; w < THREADS / 32; w++) best = max64(best, s.sums[w]);
        if (best) atomic_max(&state->best, best);
    }
    if (!arrives_last(state, s) || thread_index() > 0) return;
    state->arrived = 0;
    if (r.job->kind != LIKELIEST) return;
    best = atomic_max(&state->best, (uint64_t)0);
    const float likeliest = p.likeliest_logprob[r.job->row];
    if (best == 0 || likeliest != likeliest) put_nothing(p, *r.job);
    else put_token(p, r.job->row, ~(uint32_t)best);
    state->best = 0;
}

// A draw from all candidates, in the order of the tokens. `bins` holds the weight of each chunk.
DEVICE void draw_plainly(const SampleParams& p, const Row& r, SampleState* state, uint64_t* bins, Shared& s) {
    const uint32_t rounds = (p.vocab + CHUNK * SAMPLE_BINS - 1) / (CHUNK * SAMPLE_BINS), length = CHUNK * rounds;
    const uint32_t chunks = (p.vocab + length - 1) / length, warps = THREADS / 32;
    for (uint32_t chunk = block_x() * warps + warp_index(); chunk < chunks; chunk += grid_x() * warps) {
        uint64_t sum = 0;
        for (uint32_t i0 = chunk * length + lane_index(); i0 < (chunk + 1) * length; i0 += CHUNK) {
            float v[4];
            UNROLL for (int k = 0; k < 4; k++) v[k] = i0 + 32 * k < p.vocab ? r.value(i0 + 32 * k) : float_of_bits(0x7fc00000u);
            UNROLL for (int k = 0; k < 4; k++) sum += r.candidate(v[k]) ? r.weight(v[k]) : 0;
        }
        sum = warp_sum64(sum);
        if (lane_index() == 0) bins[chunk] = sum;
    }
    if (!arrives_last(state, s)) return;
    uint64_t target = 0;
    const Crossing c = crossing(
        s, SAMPLE_BINS / THREADS, [&](uint32_t b) { return b < chunks ? bins[b] : 0; },
        [&](uint64_t total) { return target = draw_target(r.job->uniform, total); });
    const uint32_t first = c.bin * length;
    const Source chunk = {nullptr, first, first + length < p.vocab ? length : p.vocab - first};
    const Answer drawn = search(r, chunk, {WEIGHT, BY_INDEX, ALL, NONE, target - c.before}, s);
    if (thread_index() == 0) put_token(p, r.job->row, (uint32_t)drawn.last);
    leave_zeros(state, bins);
}

DEVICE void histogram(const SampleParams& p) {
    SHARED_BYTES(shared);
    Shared s(shared);
    const uint32_t job_index = p.first_job + block_y(), pieces = grid_x();
    SampleState* state = p.states + job_index;
    uint64_t* bins = p.bins + (uint64_t)job_index * SAMPLE_BINS;
    Row r;
    if (!open(p, job_index, r)) {
        if (block_x() == 0 && thread_index() == 0) put_nothing(p, *r.job);
        return;
    }
    const uint32_t top_k = r.job->top_k;
    const float top_p = r.job->top_p;
    if (top_k == 0 && !(top_p < 1.0f)) {
        draw_plainly(p, r, state, bins, s);
        return;
    }
    const uint32_t begin = (uint32_t)((uint64_t)p.vocab * block_x() / pieces);
    const uint32_t end = (uint32_t)((uint64_t)p.vocab * (block_x() + 1) / pieces);
    s.clear(SAMPLE_BINS);
    // Far tokens are the most, and would all wait for the last bin: when counting, whether it holds the
    // cut is known without them; and most of their weights are 0.
    each_value(r, begin, end, [&](uint32_t i, float x) {
        if (!r.candidate(x)) return;
        const uint32_t bin = r.bin(x);
        if (top_k > 0) {
            if (bin < SAMPLE_BINS - 1) atomic_add(s.low + bin, 1u);
        } else {
            const uint64_t weight = r.weight(x);
            if (weight) s.add(bin, weight);
        }
    });
    sync_block();
    for (uint32_t b = thread_index(); b < SAMPLE_BINS; b += THREADS)
        if (s.at(b)) atomic_add(bins + b, s.at(b));
    if (!arrives_last(state, s)) return;
    const Crossing c = crossing(
        s, SAMPLE_BINS / THREADS, [&](uint32_t b) { return bins[b]; },
        [&](uint64_t total) {
            const uint64_t mass = (uint64_t)ceil((double)top_p * (double)total);
            return top_k > 0 ? (uint64_t)top_k : min64(max64(mass, 1), total);
        });
    if (thread_index() == 0) {
        state->bin = c.bin == NONE ? SAMPLE_BINS - 1 : c.bin;
        state->before = c.before;
        state->total = c.total;
        state->arrived = 0;
    }
}

// The first tokens up to `limit`, best first. By a whole block.
DEVICE void put_alternatives(const SampleParams& p, const Row& r, const Source& source, uint64_t limit, Shared& s) {
    if (thread_index() == 0) s.words[0] = 0;
    sync_block();
    for (uint32_t j = thread_index(); j < source.count; j += THREADS) {
        const uint32_t i = source.list ? source.list[j] : j;
        const float x = r.value(i);
        if (r.candidate(x) && r.order(x, i) <= limit) s.kept[atomic_add(s.words, 1u)] = r.order(x, i);
    }
    sync_block();
    const uint32_t kept = s.words[0], thread = thread_index();
    if (thread >= MAX_LOGPROBS) return;
    if (thread >= kept) {
        p.top_token[r.job->row * MAX_LOGPROBS + thread] = NONE;
        return;
    }
    uint32_t rank = 0;
    for (uint32_t t = 0; t < kept; t++) rank += s.kept[t] < s.kept[thread];
    const uint32_t token = (uint32_t)(s.kept[thread] & ((1ull << r.index_bits) - 1));
    p.top_token[r.job->row * MAX_LOGPROBS + rank] = token;
    p.top_logprob[r.job->row * MAX_LOGPROBS + rank] = r.logits[token] - r.max + p.likeliest_logprob[r.job->row];
}

// Top-k, top-p and the draw, from the tokens of `source`. By a whole block.
DEVICE uint32_t draw(const Row& r, const Source& source, const SampleState& found, const uint64_t* bins, Shared& s) {
    const uint32_t token_mask = (uint32_t)((1ull << r.index_bits) - 1);
    const float top_p = r.job->top_p;
    const double uniform = r.job->uniform;
    if (r.job->top_k == 0) {
        const uint64_t mass = min64(max64((uint64_t)ceil((double)top_p * (double)found.total), 1), found.total);
        const Answer nucleus = search(r, source, {WEIGHT, BY_VALUE, ALL, found.bin, mass - found.before}, s);
        const uint64_t target = draw_target(uniform, found.before + nucleus.through);
        const Crossing c = crossing(
            s, SAMPLE_BINS / THREADS, [&](uint32_t b) { return bins[b]; }, [&](uint64_t) { return target; });
        return (uint32_t)search(r, source, {WEIGHT, BY_VALUE, nucleus.last, c.bin, target - c.before}, s).last & token_mask;
    }
    uint64_t limit = search(r, source, {COUNT, BY_VALUE, ALL, NONE, r.job->top_k}, s).last;
    uint64_t total = search(r, source, {WEIGHT, BY_VALUE, limit, NONE, ALL}, s).through;
    if (top_p < 1.0f) {
        const uint64_t mass = min64(max64((uint64_t)ceil((double)top_p * (double)total), 1), total);
        const Answer nucleus = search(r, source, {WEIGHT, BY_VALUE, limit, NONE, mass}, s);
        const uint64_t target = draw_target(uniform, nucleus.through);
        return (uint32_t)search(r, source, {WEIGHT, BY_VALUE, nucleus.last, NONE, target}, s).last & token_mask;
    }
    return (uint32_t)search(r, source, {WEIGHT, BY_INDEX, limit, NONE, draw_target(uniform, total)}, s).last;
}

DEVICE void finish(const SampleParams& p) {
    SHARED_BYTES(shared);
    Shared s(shared);
    const uint32_t job_index = p.first_job + block_y(), pieces = grid_x();
    SampleState* state = p.states + job_index;
    Row r;
    if (!open(p, job_index, r)) return;
    const SampleState found = *state;
    uint32_t* list = p.list + (uint64_t)job_index * SAMPLE_LIST;
    const uint32_t begin = (uint32_t)((uint64_t)p.vocab * block_x() / pieces);
    const uint32_t end = (uint32_t)((uint64_t)p.vocab * (block_x() + 1) / pieces);
    each_value(r, begin, end, [&](uint32_t i, float x) {
        const bool stays = r.candidate(x) && r.bin(x) <= found.bin;
        const uint32_t all = vote(stays);
        if (!all) return;
        const int leader = lowest_bit(all);
        uint32_t at = lane_index() == leader ? atomic_add(&state->listed, (uint32_t)count_bits(all)) : 0;
        at = shuffle(at, leader) + count_bits(all & ((1u << lane_index()) - 1));
        if (stays && at < SAMPLE_LIST) list[at] = i;
    });
    if (!arrives_last(state, s)) return;
    if (thread_index() == 0) s.words[1] = atomic_add(&state->listed, 0u);
    sync_block();
    const uint32_t listed = s.words[1];
    const Source source = listed <= SAMPLE_LIST ? Source{list, 0, listed} : Source{nullptr, 0, p.vocab};
    uint64_t* bins = p.bins + (uint64_t)job_index * SAMPLE_BINS;
    if (r.listing) {
        const uint64_t limit = search(r, source, {COUNT, BY_VALUE, ALL, NONE, r.job->top_k}, s).last;
        put_alternatives(p, r, source, limit, s);
    } else {
        const uint32_t token = draw(r, source, found, bins, s);
        if (thread_index() == 0) put_token(p, r.job->row, token);
    }
    leave_zeros(state, bins);
}

}  // namespace sampling

KERNEL(512, 1) sample_penalised(const GRID_CONSTANT SampleParams p) { begin_kernel(); sampling::penalised(p); }
KERNEL(512, 2) sample_bins(const GRID_CONSTANT SampleParams p) { begin_kernel(); sampling::histogram(p); }
KERNEL(512, 1) sample_finish(const GRID_CONSTANT SampleParams p) { begin_kernel(); sampling::finish(p); }

KERNEL(256, 1) count_tokens(const GRID_CONSTANT CountParams p) {
    begin_kernel();
    const uint32_t i = block_x() * 256 + thread_index();
    if (i >= p.count) return;
    const uint32_t entry = p.entries[2 * i], token = p.entries[2 * i + 1];
    uint32_t* seen = p.occurrences + (uint64_t)(entry & 0x7fffffffu) * p.vocab + token;
    if (entry & 0x80000000u) atomic_or(seen, 0x80000000u);
    else atomic_add(seen, 1u);
}
