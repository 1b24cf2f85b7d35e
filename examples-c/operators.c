/* The operator level: one decode layer of a host that owns its weights, its KV pages, its CUDA context and
 * its stream. Selects heads, attends over the pages, selects neurons, runs the MLP; then the same again
 * as a CUDA graph, with other lengths. Each result is compared with sums in double here.
 *
 *   operators            exits 0 if all agree, 1 if not, 77 if there is no GPU
 *
 * The driver is loaded at run time, so this builds without a CUDA toolkit. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "polar_sparsity.h"

/* ---- the part of the CUDA driver this needs ---- */

static struct {
  int (*cuInit)(unsigned flags);
  int (*cuDeviceGetCount)(int *count);
  int (*cuDeviceGet)(int *device, int ordinal);
  int (*cuDeviceGetName)(char *name, int len, int device);
  int (*cuCtxCreate_v2)(void **context, unsigned flags, int device);
  int (*cuCtxDestroy_v2)(void *context);
  int (*cuMemAlloc_v2)(uint64_t *at, size_t bytes);
  int (*cuMemcpyHtoD_v2)(uint64_t to, const void *from, size_t bytes);
  int (*cuMemcpyDtoH_v2)(void *to, uint64_t from, size_t bytes);
  int (*cuStreamCreate)(void **stream, unsigned flags);
  int (*cuStreamSynchronize)(void *stream);
  int (*cuStreamBeginCapture_v2)(void *stream, int mode);
  int (*cuStreamEndCapture)(void *stream, void **graph);
  int (*cuGraphInstantiateWithFlags)(void **exec, void *graph, unsigned long long flags);
  int (*cuGraphLaunch)(void *exec, void *stream);
  int (*cuGraphExecDestroy)(void *exec);
  int (*cuGraphDestroy)(void *graph);
} cuda;

static int nothing(const char *why) {
  printf("operators: %s; nothing to show\n", why);
  return 77;
}

/* Whether all functions are there. */
static int load_driver(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) return 0;
#define LOAD(name)                                  \
  do {                                              \
    void *symbol = dlsym(library, #name);           \
    if (!symbol) return 0;                          \
    memcpy(&cuda.name, &symbol, sizeof symbol);     \
  } while (0)
  LOAD(cuInit);
  LOAD(cuDeviceGetCount);
  LOAD(cuDeviceGet);
  LOAD(cuDeviceGetName);
  LOAD(cuCtxCreate_v2);
  LOAD(cuCtxDestroy_v2);
  LOAD(cuMemAlloc_v2);
  LOAD(cuMemcpyHtoD_v2);
  LOAD(cuMemcpyDtoH_v2);
  LOAD(cuStreamCreate);
  LOAD(cuStreamSynchronize);
  LOAD(cuStreamBeginCapture_v2);
  LOAD(cuStreamEndCapture);
  LOAD(cuGraphInstantiateWithFlags);
  LOAD(cuGraphLaunch);
  LOAD(cuGraphExecDestroy);
  LOAD(cuGraphDestroy);
  return 1;
}

#define CUDA(call)                                                                 \
  do {                                                                             \
    int code_ = cuda.call;                                                         \
    if (code_ != 0) {                                                              \
      fprintf(stderr, "operators: CUDA error %d: %s\n", code_, #call);             \
      exit(1);                                                                     \
    }                                                                              \
  } while (0)

#define POLAR(call)                                                                \
  do {                                                                             \
    polar_error err = POLAR_ERROR_INIT;                                            \
    polar_status status_ = polar_##call;                                           \
    if (POLAR_IS_ERROR(status_)) {                                                 \
      fprintf(stderr, "operators: %s: %s\n", polar_status_name(status_), err.message); \
      exit(1);                                                                     \
    }                                                                              \
  } while (0)

/* ---- numbers ---- */

static uint64_t random_state = 1;

/* Sum of four uniform numbers: roughly normal, standard deviation 1. */
static float random_float(void) {
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    sum += (float)(random_state >> 40) / (float)(1 << 24) - 0.5f;
  }
  return sum * 1.7320508f;
}

static uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static double from_bf16(uint16_t v) {
  uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* An array here and its copy on the device. */
typedef struct {
  void *host;
  size_t bytes;
  polar_device_ptr device;
} array;

static array new_array(size_t bytes) {
  array a = {malloc(bytes), bytes, 0};
  if (!a.host) exit(1);
  memset(a.host, 0xff, bytes); /* NaN: whatever must not be read would show */
  CUDA(cuMemAlloc_v2(&a.device, bytes));
  CUDA(cuMemcpyHtoD_v2(a.device, a.host, bytes));
  return a;
}

static void to_device(array a) { CUDA(cuMemcpyHtoD_v2(a.device, a.host, a.bytes)); }
static void to_host(array a) { CUDA(cuMemcpyDtoH_v2(a.host, a.device, a.bytes)); }

static array random_matrix(size_t rows, size_t columns, float scale) {
  array a = new_array(rows * columns * 2);
  for (size_t i = 0; i < rows * columns; i++) ((uint16_t *)a.host)[i] = to_bf16(random_float() * scale);
  to_device(a);
  return a;
}

static double element(array a, size_t i) { return from_bf16(((const uint16_t *)a.host)[i]); }
static uint16_t half_word(array a, size_t i) { return ((const uint16_t *)a.host)[i]; }
static int32_t *ints(array a) { return (int32_t *)a.host; }

/* Row `row` of `a` times row `other` of `b`, both `width` wide. */
static double dot(array a, size_t row, array b, size_t other, size_t width) {
  double sum = 0;
  for (size_t i = 0; i < width; i++) sum += element(a, row * width + i) * element(b, other * width + i);
  return sum;
}

static int failures;

static void check(const char *what, double error, double allowed) {
  int good = error <= allowed; /* NaN is not */
  printf("  %-34s %.1e, allowed %.0e%s\n", what, error, allowed, good ? "" : "   WRONG");
  failures += !good;
}

/* ---- the layer ---- */

enum {
  SEQUENCES = 5,
  HEADS = 32,
  KV_HEADS = 8,
  GROUP = HEADS / KV_HEADS,
  HEAD_DIM = 128,
  HIDDEN = 512,
  MAX_PAGES = 64,
  PAGES = SEQUENCES * MAX_PAGES + 7,
  NEURONS = 2048,
  RANK = 64,
  KEPT_NEURONS = 300
};

static array x, router, router_bias, q, kv, block_table, seq_lens, keep, selected, out, lse;
static array mlp_down, mlp_up, neurons, up, up_bias, down, down_bias, mlp_out;
static polar_op_attention attention;
static polar_op_head_selection heads;
static polar_op_neuron_selection choice;
static polar_op_mlp mlp;

/* Element of a page: `[page][kv_head][K or V][16][head_dim]`. */
static size_t kv_at(size_t page, size_t head, size_t v, size_t place) {
  return (((page * KV_HEADS + head) * 2 + v) * 16 + place) * HEAD_DIM;
}

static void set_lengths(const int32_t *lengths, const int32_t *kept) {
  memcpy(seq_lens.host, lengths, seq_lens.bytes);
  memcpy(keep.host, kept, keep.bytes);
  to_device(seq_lens);
  to_device(keep);
}

/* Random tokens in every page of the tables, which are shuffled; the pages nobody has stay NaN. */
static void fill_cache(void) {
  int32_t pages[PAGES];
  for (int i = 0; i < PAGES; i++) pages[i] = i;
  for (int i = PAGES - 1; i > 0; i--) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    int j = (int)(random_state >> 33) % (i + 1);
    int32_t other = pages[i];
    pages[i] = pages[j];
    pages[j] = other;
  }
  kv = new_array((size_t)PAGES * KV_HEADS * 2 * 16 * HEAD_DIM * 2);
  block_table = new_array(SEQUENCES * MAX_PAGES * 4);
  for (int i = 0; i < SEQUENCES * MAX_PAGES; i++) {
    ints(block_table)[i] = pages[i];
    for (size_t j = 0; j < KV_HEADS * 2 * 16 * HEAD_DIM; j++)
      ((uint16_t *)kv.host)[kv_at((size_t)pages[i], 0, 0, 0) + j] = to_bf16(random_float());
  }
  to_device(kv);
  to_device(block_table);
}

static polar_device_ptr workspace(uint64_t bytes) { return new_array(bytes).device; }

static void make_layer(const polar_op_library *ops) {
  x = random_matrix(SEQUENCES, HIDDEN, 1);
  router = random_matrix(KV_HEADS, HIDDEN, 0.1f);
  router_bias = random_matrix(1, KV_HEADS, 0.1f);
  q = random_matrix(SEQUENCES, HEADS * HEAD_DIM, 1);
  fill_cache();
  seq_lens = new_array(SEQUENCES * 4);
  keep = new_array(SEQUENCES * 4);
  selected = new_array(SEQUENCES * KV_HEADS * 2);
  out = new_array(SEQUENCES * HEADS * HEAD_DIM * 2);
  lse = new_array(SEQUENCES * HEADS * 4);
  mlp_down = random_matrix(RANK, HIDDEN, 0.05f);
  mlp_up = random_matrix(NEURONS, RANK, 0.1f);
  neurons = new_array((KEPT_NEURONS + 7) / 8 * 8 * 4);
  up = random_matrix(NEURONS, HIDDEN, 0.05f);
  up_bias = random_matrix(1, NEURONS, 0.1f);
  down = random_matrix(NEURONS, HIDDEN, 0.05f);
  down_bias = random_matrix(1, HIDDEN, 0.1f);
  mlp_out = new_array(SEQUENCES * HIDDEN * 2);

  heads.struct_size = sizeof heads;
  heads.dtype = POLAR_DTYPE_BF16;
  heads.num_sequences = SEQUENCES;
  heads.num_kv_heads = KV_HEADS;
  heads.router_rows = KV_HEADS;
  heads.hidden_size = HIDDEN;
  heads.x = x.device;
  heads.weight = router.device;
  heads.bias = router_bias.device;
  heads.keep = keep.device;
  heads.selected = selected.device;
  POLAR(op_head_selection_workspace(ops, &heads, &heads.workspace_bytes, &err));
  heads.workspace = workspace(heads.workspace_bytes);

  attention.struct_size = sizeof attention;
  attention.dtype = POLAR_DTYPE_BF16;
  attention.num_sequences = SEQUENCES;
  attention.num_heads = HEADS;
  attention.num_kv_heads = KV_HEADS;
  attention.head_dim = HEAD_DIM;
  attention.max_pages = MAX_PAGES;
  attention.q = q.device;
  attention.kv = kv.device;
  attention.block_table = block_table.device;
  attention.seq_lens = seq_lens.device;
  attention.keep = keep.device;
  attention.selected = selected.device;
  attention.out = out.device;
  attention.lse = lse.device;
  POLAR(op_attention_workspace(ops, &attention, &attention.workspace_bytes, &err));
  attention.workspace = workspace(attention.workspace_bytes);

  choice.struct_size = sizeof choice;
  choice.dtype = POLAR_DTYPE_BF16;
  choice.num_rows = SEQUENCES;
  choice.num_neurons = NEURONS;
  choice.keep = KEPT_NEURONS;
  choice.hidden_size = HIDDEN;
  choice.rank = RANK;
  choice.x = x.device;
  choice.router_down = mlp_down.device;
  choice.router_up = mlp_up.device;
  choice.index = neurons.device;
  POLAR(op_neuron_selection_workspace(ops, &choice, &choice.workspace_bytes, &err));
  choice.workspace = workspace(choice.workspace_bytes);

  mlp.struct_size = sizeof mlp;
  mlp.dtype = POLAR_DTYPE_BF16;
  mlp.num_rows = SEQUENCES;
  mlp.hidden_size = HIDDEN;
  mlp.num_neurons = NEURONS;
  mlp.keep = KEPT_NEURONS;
  mlp.x = x.device;
  mlp.up = up.device;
  mlp.up_bias = up_bias.device;
  mlp.down = down.device;
  mlp.down_bias = down_bias.device;
  mlp.index = neurons.device;
  mlp.out = mlp_out.device;
  POLAR(op_mlp_workspace(ops, &mlp, &mlp.workspace_bytes, &err));
  mlp.workspace = workspace(mlp.workspace_bytes);
}

/* What a decode step does. Only the plan is per step; the rest is per layer. */
static void run_layer(const polar_op_library *ops, void *stream) {
  POLAR(op_attention_plan(ops, &attention, stream, &err));
  POLAR(op_head_selection_run(ops, &heads, stream, &err));
  POLAR(op_attention_run(ops, &attention, stream, &err));
  POLAR(op_neuron_selection_run(ops, &choice, stream, &err));
  POLAR(op_mlp_run(ops, &mlp, stream, &err));
}

/* ---- the same in double ---- */

static void check_heads(void) {
  double worst = 0; /* by how much a head that was left out is better than one that was kept */
  int wrong = 0;
  for (size_t b = 0; b < SEQUENCES; b++) {
    int kept[KV_HEADS] = {0};
    double lowest = INFINITY;
    for (size_t j = 0; j < (size_t)ints(keep)[b]; j++) {
      size_t h = half_word(selected, b * KV_HEADS + j);
      wrong += h >= KV_HEADS || (j > 0 && h <= half_word(selected, b * KV_HEADS + j - 1));
      if (h >= KV_HEADS) continue;
      kept[h] = 1;
      lowest = fmin(lowest, dot(x, b, router, h, HIDDEN) + element(router_bias, h));
    }
    for (size_t h = 0; h < KV_HEADS; h++) {
      double score = dot(x, b, router, h, HIDDEN) + element(router_bias, h);
      if (!kept[h]) worst = fmax(worst, score - lowest);
    }
  }
  check("heads: list out of order", wrong, 0);
  check("heads: better one left out by", worst, 1e-4);
}

/* Softmax of one head over its sequence; the log of the sum of exponentials. */
static double attend(size_t b, size_t head, double *result) {
  static double scores[MAX_PAGES * 16];
  size_t length = (size_t)ints(seq_lens)[b];
  double largest = -INFINITY, sum = 0;
  for (size_t token = 0; token < length; token++) {
    size_t page = (size_t)ints(block_table)[b * MAX_PAGES + token / 16];
    size_t k = kv_at(page, head / GROUP, 0, token % 16), row = (b * HEADS + head) * HEAD_DIM;
    double score = 0;
    for (size_t i = 0; i < HEAD_DIM; i++) score += element(q, row + i) * element(kv, k + i);
    scores[token] = score / sqrt(HEAD_DIM);
    largest = fmax(largest, scores[token]);
  }
  for (size_t i = 0; i < HEAD_DIM; i++) result[i] = 0;
  for (size_t token = 0; token < length; token++) {
    size_t page = (size_t)ints(block_table)[b * MAX_PAGES + token / 16];
    size_t v = kv_at(page, head / GROUP, 1, token % 16);
    double weight = exp(scores[token] - largest);
    sum += weight;
    for (size_t i = 0; i < HEAD_DIM; i++) result[i] += weight * element(kv, v + i);
  }
  for (size_t i = 0; i < HEAD_DIM; i++) result[i] /= sum;
  return largest + log(sum);
}

static void check_attention(void) {
  double error = 0, size = 0, log_error = 0, rest = 0, result[HEAD_DIM];
  for (size_t b = 0; b < SEQUENCES; b++) {
    int kept[KV_HEADS] = {0};
    for (size_t j = 0; j < (size_t)ints(keep)[b]; j++) kept[half_word(selected, b * KV_HEADS + j) % KV_HEADS] = 1;
    for (size_t head = 0; head < HEADS; head++) {
      size_t at = (b * HEADS + head) * HEAD_DIM;
      if (!kept[head / GROUP] || ints(seq_lens)[b] == 0) {
        for (size_t i = 0; i < HEAD_DIM; i++) rest += fabs(element(out, at + i));
        continue;
      }
      double wanted = attend(b, head, result), got = ((const float *)lse.host)[b * HEADS + head];
      log_error = fmax(log_error, fabs(got - wanted));
      for (size_t i = 0; i < HEAD_DIM; i++) {
        double difference = element(out, at + i) - result[i];
        error += difference * difference;
        size += result[i] * result[i];
      }
    }
  }
  check("attention: relative error", sqrt(error / size), 5e-3);
  check("attention: log of the sum", log_error, 1e-3);
  check("attention: what is left out", rest, 0);
}

static void check_mlp(void) {
  static double scores[NEURONS], y[KEPT_NEURONS];
  static char kept[NEURONS];
  double z[RANK], largest = 0, lowest = INFINITY, left = 0, error = 0, size = 0;
  int wrong = 0;
  memset(scores, 0, sizeof scores);
  memset(kept, 0, sizeof kept);
  for (size_t b = 0; b < SEQUENCES; b++) {
    for (size_t r = 0; r < RANK; r++) z[r] = dot(x, b, mlp_down, r, HIDDEN);
    for (size_t n = 0; n < NEURONS; n++) {
      double logit = 0;
      for (size_t r = 0; r < RANK; r++) logit += z[r] * element(mlp_up, n * RANK + r);
      scores[n] += fmax(logit, 0);
    }
  }
  for (size_t j = 0; j < KEPT_NEURONS; j++) {
    size_t n = (size_t)ints(neurons)[j];
    if (n >= NEURONS || (j > 0 && ints(neurons)[j] <= ints(neurons)[j - 1])) {
      wrong++;
      continue;
    }
    kept[n] = 1;
    lowest = fmin(lowest, scores[n]);
  }
  for (size_t n = 0; n < NEURONS; n++) {
    largest = fmax(largest, scores[n]);
    if (!kept[n]) left = fmax(left, scores[n] - lowest);
  }
  check("neurons: list out of order", wrong, 0);
  check("neurons: better one left out by", left / largest, 1e-2);
  if (wrong) return;
  for (size_t b = 0; b < SEQUENCES; b++) {
    for (size_t j = 0; j < KEPT_NEURONS; j++) {
      size_t n = (size_t)ints(neurons)[j];
      y[j] = fmax(dot(x, b, up, n, HIDDEN) + element(up_bias, n), 0);
    }
    for (size_t i = 0; i < HIDDEN; i++) {
      double sum = element(down_bias, i);
      for (size_t j = 0; j < KEPT_NEURONS; j++)
        sum += y[j] * element(down, (size_t)ints(neurons)[j] * HIDDEN + i);
      double difference = element(mlp_out, b * HIDDEN + i) - sum;
      error += difference * difference;
      size += sum * sum;
    }
  }
  check("mlp: relative error", sqrt(error / size), 1e-2);
}

static void check_layer(const char *what) {
  printf("%s\n", what);
  to_host(selected);
  to_host(out);
  to_host(lse);
  to_host(neurons);
  to_host(mlp_out);
  check_heads();
  check_attention();
  check_mlp();
}

int main(void) {
  int count = 0, device = 0;
  void *context = NULL, *stream = NULL, *graph = NULL, *program = NULL;
  char name[128] = "";
  polar_op_library *ops = NULL;
  if (!load_driver()) return nothing("no NVIDIA driver (libcuda.so.1) was found");
  if (cuda.cuInit(0) != 0 || cuda.cuDeviceGetCount(&count) != 0 || count == 0)
    return nothing("the NVIDIA driver finds no GPU");
  CUDA(cuDeviceGet(&device, 0));
  CUDA(cuDeviceGetName(name, (int)sizeof name, device));
  CUDA(cuCtxCreate_v2(&context, 0, device));
  CUDA(cuStreamCreate(&stream, 1 /* does not wait for the default stream */));

  polar_error err = POLAR_ERROR_INIT;
  polar_status status = polar_op_library_create(&ops, &err);
  if (status == POLAR_E_UNSUPPORTED || status == POLAR_E_NO_DRIVER) return nothing(err.message);
  if (POLAR_IS_ERROR(status)) {
    fprintf(stderr, "operators: %s: %s\n", polar_status_name(status), err.message);
    return 1;
  }
  make_layer(ops);

  const int32_t lengths[SEQUENCES] = {1, 16, 300, 1000, 17}, kept[SEQUENCES] = {4, 8, 3, 4, 1};
  set_lengths(lengths, kept);
  run_layer(ops, stream);
  CUDA(cuStreamSynchronize(stream));
  check_layer("launched");

  /* Recorded once, then run with lengths that were not known at that time; 0 is padding. */
  const int32_t later[SEQUENCES] = {33, 1024, 0, 15, 512}, fewer[SEQUENCES] = {2, 2, 5, 8, 7};
  CUDA(cuStreamBeginCapture_v2(stream, 0 /* global: refuses all that must not be in a graph */));
  run_layer(ops, stream);
  CUDA(cuStreamEndCapture(stream, &graph));
  CUDA(cuGraphInstantiateWithFlags(&program, graph, 0));
  set_lengths(later, fewer);
  CUDA(cuGraphLaunch(program, stream));
  CUDA(cuStreamSynchronize(stream));
  check_layer("as a graph");

  CUDA(cuGraphExecDestroy(program));
  CUDA(cuGraphDestroy(graph));
  polar_op_library_free(ops);
  CUDA(cuCtxDestroy_v2(context));
  printf("%s: %s\n", name, failures ? "WRONG" : "all agree");
  return failures != 0;
}
