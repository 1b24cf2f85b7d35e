// What a launch passes: plain structs, the only file shared with Rust (mirrored in
// src/backend/cuda/params.rs; tests/cuda_kernels.rs compares sizes). Pointers are device addresses.
// Counts are elements unless said. `T` is the model's 16-bit type.
#pragma once
#include <stdint.h>

#define PAGE_TOKENS 16
// A page that no row is written to; a selection rule that applies to no sequence.
#define NONE 0xffffffffu

// Sum of `splits` fp32 matrices [rows][columns], one after another: what the products leave.
struct Partial {
    const float* data;
    uint32_t splits;
    uint32_t columns;
};

// residual[row] = table[token] (+ positions[position + offset]).
struct EmbedParams {
    const uint32_t* tokens;
    const uint32_t* positions;
    const void* table;
    const void* position_table;  // null: none
    float* residual;
    uint32_t hidden;
    uint32_t position_offset;
};

// residual += delta + delta_bias; out = norm(residual) * weight + bias.
struct NormParams {
    float* residual;          // [rows][hidden]
    Partial delta;            // splits 0: nothing to add
    const void* delta_bias;   // null: none
    const void* weight;
    const void* bias;         // null: root mean square; else mean and variance
    void* out;                // T [rows][hidden]
    const uint32_t* row_map;  // null: row i; else rows to read, residual then left as it was
    uint32_t rows;            // rows of the residual stream, the stride of delta's splits
    uint32_t hidden;
    float epsilon;
    uint32_t late;            // not 0: the kernel after the next may use what the one ahead of this one's wrote
};

// Flags of LinearParams::late: w is no constant, and read only when the kernel ahead has ended; the kernel after the next
// may use what the one ahead of this one's wrote, so the next one is let start only when that has ended.
constexpr uint32_t LATE_WEIGHTS = 1, LATE_SUCCESSOR = 2;

// Products into Partial [splits][rows][n]. linear_skinny takes a second matrix, whose rows are those
// from `first` on: the router beside q, k and v.
struct LinearParams {
    const void* x;          // T [rows][k]
    const void* w;          // T [n][k]; for linear_down and linear_tile_nn [k][n]
    const uint32_t* index;  // linear_up: [n] rows of w; linear_down: [k] or null; complete before the kernel ahead let this one start
    float* out;
    uint32_t rows;
    uint32_t n;
    uint32_t k;
    uint32_t splits;
    const void* more;       // T [n - first][k], null: none
    uint32_t first;
    uint32_t late;          // LATE_..., by linear_skinny and linear_wide
    const void* bytes;      // linear_wide_bytes: whole numbers [n - first_byte][k] as wide_bytes.cuh has them
    uint32_t first_byte;    // column, a multiple of 128
    uint32_t ends;          // there: columns of w and `more`; from here up to first_byte a sum means nothing
};

// Which units each decode sequence keeps.
struct SelectParams {
    Partial logits;        // columns 0 .. units * per_unit of it; by_unit: [splits][units * per_unit][sequences]
    const void* bias;      // T [units * per_unit], null: none
    const uint32_t* keep;  // [sequences] units to keep; 0: padding
    uint16_t* selected;    // [sequences][units], the first keep[b] ascending
    void* attention;       // T [sequences][units * unit_width]: zeroed where not selected
    uint32_t* nan_count;
    uint32_t rows;         // stride of logits' splits
    uint32_t sequences;
    uint32_t units;
    uint32_t per_unit;     // the router's rows per unit
    uint32_t unit_width;   // multiple of 8
    uint32_t by_unit;
};

// A layer's q, k and v, its attention router's logits and the choice by them, of one sequence: linear_heads.cu. Nothing of
// `attention` is made zero: ChosenParams do not need it.
struct ChoosingParams {
    LinearParams product;  // `more`: the router's rows; `first` a multiple of 128; splits of k and v, of at least five steps of 64 k
    SelectParams select;   // by the logits among the product's sums, in splits of their own; unit_width a multiple of 128
    uint32_t* arrived;     // [0] blocks that have logits, [2] those that have met the choice: zero between launches
                           // [1] becomes the splits of q
    uint32_t q;            // columns of q, which come first: units * unit_width
    uint32_t routing;      // blocks that have the router's rows; the others have k and v, and are as many as q has tiles or more
};

// Most splits of q.
constexpr uint32_t MOST_Q_PARTS = 16;

// The output projection of what attention over these heads left, up to 8 rows: linear_heads.cu.
struct ChosenParams {
    LinearParams product;      // k: units of equal width, a multiple of 64
    const uint16_t* selected;  // as SelectParams leaves it; complete before the kernel ahead let this one start
    const uint32_t* keep;
    uint32_t sequences;
    uint32_t units;            // up to 256
};

// Second product of a selective ReLU MLP, from the sums that the first one left.
struct DownParams {
    Partial up;             // columns k
    const void* up_bias;    // T by neuron, null: none
    const void* w;          // T [neurons][n]
    const uint32_t* index;  // [k] neurons, complete before the kernel ahead let this one start
    float* out;             // [splits][rows][n]
    uint32_t rows;
    uint32_t n;
    uint32_t k;             // a multiple of 8
    uint32_t valid;         // columns of `up` from here on count as zero
    uint32_t splits;
};

// Rows of sums as bytes with a scale each, as router_bytes.cuh multiplies them.
struct NarrowParams {
    Partial sums;         // columns at least `columns`
    void* out;            // [rows up to a multiple of 8][pieces][64]
    float* scales;        // [sequences]; NaN where a row is not finite
    const float* factors; // [columns] of the sums
    uint32_t rows;        // stride of the sums' splits
    uint32_t sequences;   // rows to do
    uint32_t columns;     // a multiple of 4
    uint32_t pieces;      // of 64 columns; what is beyond `columns` becomes zero
};

// Biases, q/k norms, rotation; q to `q`, K and V to their pages; and which heads to keep.
struct QkvParams {
    Partial qkv;            // columns at least (heads + 2 kv_heads) head_dim
    const void* bias;       // T [columns], null: none
    const void* q_norm;     // T [head_dim], null: none
    const void* k_norm;
    const float* rotation;  // [position][head_dim / 2][cos, sin], null: none
    const uint32_t* positions;
    const uint32_t* kv_slot;  // page * 16 + place in the page, NONE: row is padding
    void* q;                  // T [rows][heads][head_dim]
    void* kv;                 // T [page][kv_head][K|V][16][head_dim], this layer's
    uint32_t rows;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t norm_dim;  // dimensions of the model's head; the others are zero
    float epsilon;
    SelectParams select;  // sequences 0: no selection; else by blocks of a y of their own
    NarrowParams narrow;  // the same, of the last y
    uint32_t* arrived;    // qkv_chosen: as ChoosingParams has it; else null
};

// The MLP router's second product from bytes, as scores of the neurons: router_bytes.cuh.
struct RouterBytesParams {
    const void* z;          // as narrow_rows leaves it
    const float* z_scales;
    const void* w;          // tiles of 16 rows
    const float* scales;    // [n]
    float* scores;          // [groups of this launch][n]
    const uint32_t* group;  // [rows]: 0 sums its rows, every other group is one row, NONE: not wanted
    uint32_t rows;          // up to 64
    uint32_t n;             // 0: nothing to do
    uint32_t pieces;        // of 64 columns
    uint32_t first_group;
    uint32_t more;          // not 0: group 0's sums go on from what is in `scores`
    uint32_t reserved;
    uint32_t* arrived;      // attention_decode_scored: blocks that have scores, zero between launches; null: none wait
};

// The neurons with the largest sums of positive logits over the rows of a group.
struct NeuronParams {
    Partial logits;         // columns at least n
    float* scores;          // [groups of this launch][n]
    const uint32_t* group;  // [rows]
    const uint32_t* last_group;  // groups after *last_group have no rows; null: all have
    uint32_t* index;        // [keep0 up to a multiple of 8] ascending, then zeros, of group 0; null: not wanted
    uint32_t* masks;        // [groups][(n + 31) / 32]; null: not wanted
    uint32_t* nan_count;
    uint32_t rows;
    uint32_t n;
    uint32_t keep0;         // for group 0; NONE: that group keeps all
    uint32_t keep_other;    // for every other group
    uint32_t first_group;   // group of block 0
};

// Flags of DecodeParams::early: of each sequence, they write the newest page only; none of them writes `selected`.
constexpr uint32_t EARLY_PAGES = 1, EARLY_SELECTED = 2;

// One query token per sequence against its pages.
struct DecodeParams {
    const void* q;              // T [sequences][heads][head_dim], sequences q_stride elements apart
    const void* kv;             // this layer's pages
    const uint32_t* pages;      // block tables
    const uint32_t* first_page; // [sequences] into pages, of the first page attention reads
    const uint32_t* tokens;     // [sequences] tokens from that page's start to the newest
    const uint32_t* skip;       // [sequences] leading tokens of that page outside the window
    const uint16_t* selected;   // [sequences][kv_heads], null: all
    const uint32_t* keep;       // [sequences] kv heads to compute
    const uint32_t* prefix;     // [sequences + 1] sums of keep * (pages + segment_cost); workers, at least 1; least pages of a piece
    void* out;                  // T [sequences][heads][head_dim]
    float* lse;                 // [sequences][heads] ln of the sum of exponentials, null: not wanted
    float* parts;               // [workers][2][group][head_dim + 4]
    uint32_t* counters;         // [sequences][kv_heads], zero between launches
    uint64_t page_stride;       // bytes from a page to the next, and from a head of it to the next
    uint64_t head_stride;
    uint64_t q_stride;
    uint32_t sequences;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t stages;            // pages a warp has room for, at least 2: the one it works on, and those under way
    uint32_t segment_cost;      // virtual pages that opening a segment of a sequence costs
    uint32_t early;             // EARLY_...: what may be read before the kernels ahead have ended
    float scale;                // of q k, times log2(e)
    uint32_t late;              // not 0: the kernel after the next may use what the one ahead of this one's wrote
    RouterBytesParams router;   // attention_decode_scored: work of the blocks ahead of their pages
    NeuronParams choice;        // with router.arrived: group 0 alone, by a block more
};

// Operator level: the tables of DecodeParams from a host's block table and lengths (plan.cu).
struct PlanParams {
    const int32_t* lengths;   // [sequences] tokens in the cache, the newest included
    const int32_t* wanted;    // [sequences] kv heads to compute, null: all
    uint32_t* first_page;     // as in DecodeParams, from here on
    uint32_t* tokens;
    uint32_t* skip;
    uint32_t* keep;
    uint32_t* prefix;
    uint32_t* counters;
    uint32_t sequences;
    uint32_t kv_heads;
    uint32_t max_pages;       // pages of a sequence: what is longer is cut
    uint32_t table_stride;    // entries from a sequence's block table to the next
    uint32_t window;          // tokens, NONE: unlimited
    uint32_t segment_cost;    // as in DecodeParams
    uint32_t min_pages;       // fewest virtual pages per worker
};

// Operator level: zeros where decode attention writes nothing (plan.cu).
struct ZeroParams {
    const uint16_t* selected;  // as in DecodeParams
    const uint32_t* keep;
    void* out;                 // 16-bit [sequences][kv_heads][unit_width]
    float* lse;                // [sequences][kv_heads][group]: minus infinity there; null: none
    uint32_t kv_heads;
    uint32_t unit_width;       // a multiple of 8
    uint32_t group;
};

// Operator level: group 0 for the rows of a batch, NONE for its padding (plan.cu).
struct MarkParams {
    const int32_t* active;  // rows that are no padding, null: all
    uint32_t* group;        // [rows]
    uint32_t rows;
};

// A tile of query tokens of one sequence.
struct PrefillTile {
    uint32_t first_row;   // of q and out
    uint32_t tokens;      // query tokens in the tile
    uint32_t position;    // of the first one
    uint32_t context;     // tokens of the sequence in the cache
    uint32_t first_page;  // of the sequence, into pages
};

struct PrefillParams {
    const void* q;
    const void* kv;
    const uint32_t* pages;
    const struct PrefillTile* tiles;
    void* out;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t window;  // NONE: unlimited
    float scale;
};

// MLP activation: out = relu(up), silu(gate) up or relu(gate) up.
struct ActivateParams {
    Partial in;             // columns n, or 2 n with the gate first
    const void* gate_bias;  // null: none
    const void* up_bias;
    const uint32_t* index;  // null: neuron j; else neuron index[j], complete before the kernel ahead let this one start
    const uint32_t* masks;  // null: none; else bits per group [groups][(n + 31) / 32]
    const uint32_t* group;  // [rows] group whose mask applies, NONE: all neurons
    void* out;              // T [rows][n]
    uint32_t rows;
    uint32_t n;
    uint32_t valid;         // columns from here on become zero
    uint32_t kind;          // 0 relu, 1 silu gated, 2 relu gated, 3 none
};

// A product with the activation of its sums: an MLP's first one, or a router's. Of up to 8 rows (linear_activated), or of up
// to 64 without a gate, n even, by clusters of as many blocks as sums have parts (linear_wide_activated).
struct ActivatedParams {
    const void* x;          // T [rows][k]
    const void* w;          // T [n][k], or [2 n][k] with the gate's rows first
    const uint32_t* index;  // null: neuron j; else neuron index[j], complete before the kernel ahead let this one start; not with a gate
    const void* gate_bias;  // T by neuron, null: none
    const void* up_bias;
    void* out;              // T [rows][n]
    uint32_t rows;
    uint32_t n;
    uint32_t k;             // a multiple of 8
    uint32_t valid;         // columns of out from here on become zero
    uint32_t kind;          // as ActivateParams has it
};

// The MLP router's second product, as scores of the neurons.
struct RouterParams {
    const void* z;          // T [rows][rank]
    const void* w;          // T [n][rank]
    float* scores;          // as RouterBytesParams has them, from here on
    const uint32_t* group;
    uint32_t rows;
    uint32_t n;
    uint32_t rank;
    uint32_t first_group;
    uint32_t more;
    uint32_t reserved;
};

// Largest logit and log-sum-exp of each row.
struct ArgmaxParams {
    const float* logits;  // [rows][vocab]
    uint32_t* token;
    float* logprob;       // of that token; NaN: no finite logit
    float* parts;         // [rows][blocks][3]
    uint32_t* counters;   // [rows], zero between launches
    uint32_t vocab;
};

// Sampling (see sampling.cuh): bins of a row's first histogram, tokens of its list of candidates, most
// alternatives a request asks for.
#define SAMPLE_BINS 2048
#define SAMPLE_LIST 4096
#define MAX_LOGPROBS 20

// What is wanted of one row of logits.
struct SampleJob {
    double uniform;        // in [0, 1): where to draw
    uint32_t row;          // of logits and results
    uint32_t occurrences;  // row of that table, NONE: no penalties
    float repetition;
    float presence;
    float frequency;
    float inverse;         // 1 / temperature
    float floor;           // candidates have (logit - largest) * inverse at least this
    float bin_scale;       // bins per unit of logit
    uint32_t top_k;        // 0: all
    float top_p;           // 1: all
    uint32_t kind;         // 0 the likeliest after penalties, 1 draw, 2 list the top_k likeliest
    uint32_t reserved;
};

// A job's state between kernels: zeros before and after a step.
struct SampleState {
    uint64_t best;     // largest key after penalties, with the token's complement below
    uint64_t before;   // measure of the bins before `bin`
    uint64_t total;    // of all bins
    uint32_t bin;      // of the last token that stays
    uint32_t listed;   // tokens in `list`, or more than fit
    uint32_t arrived;  // blocks
    uint32_t reserved;
};

struct SampleParams {
    const float* logits;               // [rows][vocab]
    const struct SampleJob* jobs;
    const uint32_t* occurrences;       // [sequences][vocab]: bit 31 in the prompt, below how often in the output
    const uint32_t* likeliest;         // [rows] what argmax left
    const float* likeliest_logprob;
    uint32_t* token;                   // [rows]
    float* logprob;                    // [rows] of that token without penalties; NaN: no finite logit
    uint32_t* top_token;               // [rows][MAX_LOGPROBS], likeliest first, then NONE
    float* top_logprob;
    struct SampleState* states;        // [jobs]
    uint64_t* bins;                    // [jobs][SAMPLE_BINS], zero between steps
    uint32_t* list;                    // [jobs][SAMPLE_LIST]
    uint32_t vocab;
    uint32_t index_bits;               // that hold a token
    uint32_t first_job;                // of block 0
    uint32_t reserved;
};

// New tokens of penalised sequences into the table of occurrences.
struct CountParams {
    const uint32_t* entries;  // [count][2]: row of the table, bit 31: in the prompt; token
    uint32_t* occurrences;
    uint32_t count;
    uint32_t vocab;
};

// out[c][r] = in[r][c], 16-bit elements; `in_rows` rows starting at column `first` of out.
struct TransposeParams {
    const void* in;
    void* out;
    uint32_t in_rows;
    uint32_t columns;
    uint32_t out_columns;
    uint32_t first;
};

// 16-bit out from fp32 or the other 16-bit type. kinds: 0 f32, 1 bf16, 2 f16.
struct ConvertParams {
    const void* in;
    void* out;
    uint64_t count;
    uint32_t in_kind;
    uint32_t out_kind;
};

// Benchmarks: memory to read, and random contents.
struct StreamParams {
    const void* at;
    void* sink;
    uint64_t count;  // of 16 bytes
};

struct FillParams {
    void* at;
    uint64_t count;
    uint64_t seed;
    float scale;
    float offset;
};
