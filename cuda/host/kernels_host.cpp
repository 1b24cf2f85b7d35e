// The kernels as a shared library for a CPU: tests load it and launch by name.
#include "../kernels.cu"
#include <string.h>

namespace {

using Entry = void (*)(const void*);
struct Named { const char* name; Entry entry; };

#define ONE(name, Params) {#name, [](const void* p) { name(*(const Params*)p); }},
#define BOTH(name, Params) ONE(name##_bf16, Params) ONE(name##_f16, Params)
#define SIZES(name, Params)                                                                  \
    ONE(name##_bf16_64, Params) ONE(name##_bf16_80, Params) ONE(name##_bf16_96, Params)      \
    ONE(name##_bf16_128, Params) ONE(name##_f16_64, Params) ONE(name##_f16_80, Params)       \
    ONE(name##_f16_96, Params) ONE(name##_f16_128, Params)
#define SCORED(name)                                                                         \
    ONE(name##_bf16_64, DecodeParams) ONE(name##_bf16_128, DecodeParams)                     \
    ONE(name##_f16_64, DecodeParams) ONE(name##_f16_128, DecodeParams)
#define ROWS(name, Params)                                                                   \
    ONE(name##_bf16_1, Params) ONE(name##_bf16_2, Params) ONE(name##_bf16_4, Params)         \
    ONE(name##_bf16_8, Params) ONE(name##_f16_1, Params) ONE(name##_f16_2, Params)           \
    ONE(name##_f16_4, Params) ONE(name##_f16_8, Params)

const Named kernels[] = {
    SIZES(attention_decode, DecodeParams)
    ONE(attention_decode_bf16_256, DecodeParams) ONE(attention_decode_f16_256, DecodeParams)
    SIZES(attention_decode_large, DecodeParams)
    SIZES(attention_decode_tall, DecodeParams)
    SIZES(attention_decode_cluster, DecodeParams)
    SCORED(attention_decode_scored) SCORED(attention_decode_scored_large)
    SIZES(attention_prefill, PrefillParams)
    ONE(attention_prefill_bf16_256, PrefillParams) ONE(attention_prefill_f16_256, PrefillParams)
    SIZES(attention_prefill_small, PrefillParams)
    ROWS(linear_skinny, LinearParams)
    ROWS(linear_wide, LinearParams)
    ROWS(linear_wide_bytes, LinearParams)
    ROWS(linear_wide_down, LinearParams)
    ROWS(linear_wide_activated, ActivatedParams)
    BOTH(linear_wide_choosing, ChoosingParams)
    BOTH(linear_wide_chosen, ChosenParams)
    ONE(linear_down_bf16_1, LinearParams) ONE(linear_down_bf16_2, LinearParams) ONE(linear_down_bf16_4, LinearParams)
    ONE(linear_down_f16_1, LinearParams) ONE(linear_down_f16_2, LinearParams) ONE(linear_down_f16_4, LinearParams)
    BOTH(mlp_down, DownParams)
    ROWS(linear_up, LinearParams)
    ROWS(router_scores, RouterParams)
    ONE(router_scores_bytes, RouterBytesParams)
    ONE(narrow_rows, NarrowParams)
    BOTH(linear_tile_nt, LinearParams)
    BOTH(linear_tile_nn, LinearParams)
    BOTH(linear_activated, ActivatedParams)
    BOTH(embed, EmbedParams)
    ONE(norm_bf16_1, NormParams) ONE(norm_bf16_2, NormParams) ONE(norm_bf16_4, NormParams)
    ONE(norm_f16_1, NormParams) ONE(norm_f16_2, NormParams) ONE(norm_f16_4, NormParams)
    BOTH(qkv, QkvParams) BOTH(qkv_whole, QkvParams) BOTH(qkv_long, QkvParams) BOTH(qkv_chosen, QkvParams)
    BOTH(activate, ActivateParams)
    BOTH(select_heads, SelectParams)
    ONE(attention_plan, PlanParams)
    ONE(zero_heads, ZeroParams)
    ONE(mark_rows, MarkParams)
    ONE(select_neurons, NeuronParams)
    ONE(select_neurons_large, NeuronParams)
    ONE(neuron_scores, NeuronParams)
    ONE(argmax, ArgmaxParams)
    ONE(count_tokens, CountParams)
    ONE(sample_penalised, SampleParams)
    ONE(sample_bins, SampleParams)
    ONE(sample_finish, SampleParams)
    ONE(transpose16, TransposeParams)
    ONE(convert, ConvertParams)
    ONE(read_stream, StreamParams)
    BOTH(fill, FillParams)
};

}  // namespace

// 0: done. 1: no such kernel. Others: see host::run.
extern "C" int polar_host_launch(const char* name, uint32_t x, uint32_t y, uint32_t threads, uint32_t shared_bytes,
                                 uint32_t cluster, uint32_t seed, const void* params) {
    for (const Named& k : kernels) {
        if (strcmp(k.name, name)) continue;
        host::Grid grid;
        grid.x = (int)x;
        grid.y = (int)y;
        grid.threads = (int)threads;
        grid.cluster = (int)cluster;
        grid.shared_bytes = shared_bytes;
        grid.seed = seed;
        return host::run(grid, [&] { k.entry(params); });
    }
    return 1;
}

// sizeof of each parameter struct, in the order of params.h.
extern "C" int polar_host_sizes(uint32_t* out) {
    const uint32_t sizes[] = {sizeof(Partial), sizeof(EmbedParams), sizeof(NormParams), sizeof(LinearParams),
                              sizeof(SelectParams), sizeof(ChoosingParams), sizeof(ChosenParams), sizeof(DownParams),
                              sizeof(NarrowParams), sizeof(QkvParams), sizeof(RouterBytesParams), sizeof(NeuronParams), sizeof(DecodeParams), sizeof(PlanParams),
                              sizeof(ZeroParams), sizeof(MarkParams), sizeof(PrefillTile),
                              sizeof(PrefillParams), sizeof(ActivateParams), sizeof(ActivatedParams), sizeof(RouterParams), sizeof(ArgmaxParams),
                              sizeof(SampleJob), sizeof(SampleState), sizeof(SampleParams), sizeof(CountParams),
                              sizeof(TransposeParams), sizeof(ConvertParams), sizeof(StreamParams), sizeof(FillParams)};
    const int n = sizeof sizes / sizeof *sizes;
    for (int i = 0; i < n; i++) out[i] = sizes[i];
    return n;
}
