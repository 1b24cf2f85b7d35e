/* Struct sizes, values out of range, counts up to SIZE_MAX. */
#include <math.h>

#include "check.h"

#define INVALID(call) EXPECT(POLAR_E_INVALID, call)
#define ABI(call) EXPECT(POLAR_E_ABI, call)

/* Options of a later version: a field we do not know behind those we do. */
struct later_options {
  polar_context_options now;
  uint64_t new_field;
};

static void inputs(void) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *ctx = NULL;
  struct later_options o;
  memset(&o, 0, sizeof o);
  o.now.backend = POLAR_BACKEND_CPU;
  o.now.threads = 1;
  ABI(polar_context_create(&o.now, &ctx, &err));
  o.now.struct_size = sizeof o.now - 1;
  ABI(polar_context_create(&o.now, &ctx, &err));
  o.now.struct_size = UINT32_MAX;
  ABI(polar_context_create(&o.now, &ctx, &err));
  o.now.struct_size = sizeof o;
  o.new_field = 1;
  ABI(polar_context_create(&o.now, &ctx, &err));
  CHECK(strstr(err.message, "polar_context_options") != NULL);
  o.new_field = 0;
  OK(polar_context_create(&o.now, &ctx, &err));
  polar_context_free(ctx);
}

static void outputs(polar_context *ctx, polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  struct {
    polar_device_info now;
    uint64_t new_field;
  } d;
  memset(&d, 0xff, sizeof d);
  d.now.struct_size = 0;
  ABI(polar_device_get(ctx, 0, &d.now, &err));
  d.now.struct_size = sizeof d.now;
  OK(polar_device_get(ctx, 0, &d.now, &err));
  CHECK(d.new_field == UINT64_MAX); /* not ours */
  CHECK(d.now.struct_size == sizeof d.now && d.now.usable == 1 && d.now.memory_total > 0);
  CHECK(strlen(d.now.name) > 0 && strlen(d.now.name) < sizeof d.now.name);
  d.now.struct_size = sizeof d;
  OK(polar_device_get(ctx, 0, &d.now, &err));
  CHECK(d.new_field == 0); /* a field we do not know reads as zero */
  polar_stats s;
  s.struct_size = 8;
  ABI(polar_engine_stats(engine, &s, &err));
}

static void errors(polar_context *ctx) {
  polar_error err = POLAR_ERROR_INIT;
  uint32_t n = 0;
  err.struct_size = 0; /* forgotten: said by the status, whatever the call */
  CHECK(polar_device_count(ctx, &n, &err) == POLAR_E_ABI && n == 0 && err.code == 0);
  err.struct_size = sizeof err;
  INVALID(polar_device_count(NULL, &n, &err));
  OK(polar_device_count(ctx, &n, &err));
  CHECK(err.code == POLAR_E_INVALID); /* success leaves it alone */
  CHECK(n >= 1);
}

static void context_values(void) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *ctx = NULL;
  polar_context_options good, o;
  polar_context_options_init(&good, sizeof good);
  o = good, o.backend = 3;
  INVALID(polar_context_create(&o, &ctx, &err));
  o = good, o.log_level = 6;
  INVALID(polar_context_create(&o, &ctx, &err));
  o = good, o.log_ring_kib = UINT32_MAX;
  INVALID(polar_context_create(&o, &ctx, &err));
  o = good, o.threads = UINT32_MAX;
  INVALID(polar_context_create(&o, &ctx, &err));
  o = good, o.flags = POLAR_CONTEXT_UNTIMED_PRODUCTS << 1;
  INVALID(polar_context_create(&o, &ctx, &err));
  CHECK(ctx == NULL);
  o = good, o.backend = POLAR_BACKEND_CPU, o.flags = POLAR_CONTEXT_UNTIMED_PRODUCTS;
  OK(polar_context_create(&o, &ctx, &err));
  polar_context_free(ctx);
}

static void load_values(polar_context *ctx, const char *data) {
  polar_error err = POLAR_ERROR_INIT;
  polar_model *model = NULL;
  polar_load_options good, o;
  polar_load_options_init(&good, sizeof good);
  o = good, o.flags = 4;
  INVALID(polar_model_load(ctx, data, strlen(data), &o, NULL, NULL, &model, &err));
  o = good, o.weight_dtype = 9;
  INVALID(polar_model_load(ctx, data, strlen(data), &o, NULL, NULL, &model, &err));
  CHECK(model == NULL);
}

static void engine_values(polar_model *model) {
  polar_error err = POLAR_ERROR_INIT;
  polar_engine *e = NULL;
  polar_engine_options o;
  const float bad[] = {-0.1f, 1.1f, NAN, INFINITY, -INFINITY};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    o = engine_options(), o.attn_density = bad[i];
    INVALID(polar_engine_create(model, NULL, &o, &e, &err));
    CHECK(strstr(err.message, "attn_density") != NULL);
    o = engine_options(), o.mlp_density = bad[i];
    INVALID(polar_engine_create(model, NULL, &o, &e, &err));
    o = engine_options(), o.mlp_dense_above = bad[i];
    INVALID(polar_engine_create(model, NULL, &o, &e, &err));
  }
  o = engine_options(), o.attn_density = 0.5f; /* needs routers */
  INVALID(polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.mlp_mode = 4;
  INVALID(polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.attn_source = 3;
  INVALID(polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.flags = 1;
  INVALID(polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.page_tokens = 32;
  EXPECT(POLAR_E_UNSUPPORTED, polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.max_batch = UINT32_MAX;
  EXPECT(POLAR_E_LIMIT, polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.max_queue = UINT32_MAX;
  EXPECT(POLAR_E_LIMIT, polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.max_context = UINT32_MAX;
  EXPECT(POLAR_E_LIMIT, polar_engine_create(model, NULL, &o, &e, &err));
  o = engine_options(), o.kv_bytes = 1;
  EXPECT(POLAR_E_KV_FULL, polar_engine_create(model, NULL, &o, &e, &err));
  CHECK(e == NULL);
}

/* An estimate is what is taken then, and a cache that cannot fit is no error but an answer. */
static void estimates(polar_context *ctx, const char *data, const polar_model_info *info) {
  polar_error err = POLAR_ERROR_INIT;
  polar_engine_options o = engine_options();
  polar_estimate e;
  polar_load_options load;
  char path[1024], routers[1024];
  int n = snprintf(path, sizeof path, "%s/opt_f32", data);
  int r = snprintf(routers, sizeof routers, "%s/opt_f32/routers.safetensors", data);
  memset(&e, 0, sizeof e);
  e.struct_size = sizeof e - 1;
  ABI(polar_model_estimate(ctx, path, (size_t)n, NULL, 0, NULL, &o, &e, &err));
  e.struct_size = sizeof e;
  o.max_batch = 2;
  o.kv_bytes = 1u << 20;
  OK(polar_model_estimate(ctx, path, (size_t)n, NULL, 0, NULL, &o, &e, &err));
  CHECK(e.fits == 1 && e.weight_bytes == info->weight_bytes && e.router_bytes == 0);
  CHECK(e.max_batch == 2 && e.max_context == info->max_positions && e.scratch_bytes > 0);
  CHECK(e.page_bytes == 16 * e.token_bytes && e.token_bytes > 0);
  CHECK(e.kv_pages > 0 && e.kv_pages * e.page_bytes <= o.kv_bytes);
  CHECK(e.needed_bytes == e.weight_bytes + e.scratch_bytes + e.kv_pages * e.page_bytes);
  CHECK(e.needed_bytes <= e.free_bytes && e.max_kv_pages * e.page_bytes < e.free_bytes);
  CHECK(e.max_contexts == e.max_kv_pages / ((e.max_context + 15) / 16));
  const polar_estimate dense = e;
  OK(polar_model_estimate(ctx, path, (size_t)n, routers, (size_t)r, NULL, &o, &e, &err));
  CHECK(e.router_bytes > 0 && e.scratch_bytes > dense.scratch_bytes);
  o.kv_bytes = 1; /* holds no page */
  OK(polar_model_estimate(ctx, path, (size_t)n, NULL, 0, NULL, &o, &e, &err));
  CHECK(e.fits == 0 && e.kv_pages == 0);
  polar_load_options_init(&load, sizeof load);
  load.weight_dtype = POLAR_DTYPE_I8;
  OK(polar_model_estimate(ctx, path, (size_t)n, NULL, 0, &load, NULL, &e, &err));
  CHECK(e.weight_bytes < dense.weight_bytes && e.max_batch == 32);
  load.device = 9;
  INVALID(polar_model_estimate(ctx, path, (size_t)n, NULL, 0, &load, NULL, &e, &err));
  o = engine_options(), o.max_context = UINT32_MAX;
  EXPECT(POLAR_E_LIMIT, polar_model_estimate(ctx, path, (size_t)n, NULL, 0, NULL, &o, &e, &err));
}

/* One bad request refuses the batch; the message says which field of which request. */
static void refused(polar_engine *engine, polar_status wanted, polar_request bad, const char *field) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request both[2];
  polar_seq ids[2] = {0, 0};
  both[0] = plain_request(1);
  both[1] = bad;
  EXPECT(wanted, polar_engine_submit(engine, both, 2, PROMPT, 8, ids, &err));
  CHECK(ids[0] == 0 && ids[1] == 0);
  if (strstr(err.message, field) == NULL) {
    fprintf(stderr, "\"%s\" does not name %s\n", err.message, field);
    exit(1);
  }
}

static void request_values(polar_engine *engine) {
  polar_request good = plain_request(1), r;
  r = good, r.n_tokens = 0;
  refused(engine, POLAR_E_INVALID, r, "prompt");
  r = good, r.first_token = 1;
  refused(engine, POLAR_E_INVALID, r, "prompt");
  r = good, r.first_token = UINT32_MAX, r.n_tokens = 2; /* wraps */
  refused(engine, POLAR_E_INVALID, r, "prompt");
  r = good, r.first_stop = UINT32_MAX, r.n_stop = UINT32_MAX;
  refused(engine, POLAR_E_INVALID, r, "stop");
  r = good, r.max_new_tokens = 0;
  refused(engine, POLAR_E_INVALID, r, "max_new_tokens");
  r = good, r.flags = 1u << 31;
  refused(engine, POLAR_E_INVALID, r, "flags");
  r = good, r.reserved[0] = 1;
  refused(engine, POLAR_E_INVALID, r, "reserved");
  r = good, r.n_logprobs = POLAR_MAX_LOGPROBS + 1;
  refused(engine, POLAR_E_INVALID, r, "n_logprobs");
  r = good, r.temperature = NAN;
  refused(engine, POLAR_E_INVALID, r, "temperature");
  r = good, r.top_p = 2;
  refused(engine, POLAR_E_INVALID, r, "top_p");
  r = good, r.mlp_mode = POLAR_MLP_REFERENCE; /* the engine has no routers */
  refused(engine, POLAR_E_INVALID, r, "mlp");
  r = good, r.attn_density = 0.5f;
  refused(engine, POLAR_E_INVALID, r, "attn_density");
  CHECK(stats_of(engine).requests_accepted == 0);
}

static void tokens(polar_engine *engine, uint32_t vocab_size) {
  polar_error err = POLAR_ERROR_INIT;
  polar_seq id = 0;
  polar_request r = plain_request(1);
  int32_t bad[8];
  memcpy(bad, PROMPT, sizeof bad);
  bad[3] = -1;
  INVALID(polar_engine_submit(engine, &r, 1, bad, 8, &id, &err));
  bad[3] = (int32_t)vocab_size;
  INVALID(polar_engine_submit(engine, &r, 1, bad, 8, &id, &err));
  CHECK(id == 0);
}

static void counts(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r = plain_request(1);
  polar_event event;
  polar_logprob top[POLAR_MAX_LOGPROBS];
  polar_seq id = 0;
  size_t n = 0, m = 0;
  const size_t huge[] = {SIZE_MAX, SIZE_MAX / 64, SIZE_MAX / 128 + 1};
  for (size_t i = 0; i < 3; i++) {
    EXPECT(POLAR_E_LIMIT, polar_engine_submit(engine, &r, huge[i], PROMPT, 8, &id, &err));
    EXPECT(POLAR_E_LIMIT, polar_engine_submit(engine, &r, 1, PROMPT, huge[i], &id, &err));
    EXPECT(POLAR_E_LIMIT, polar_engine_cancel(engine, &id, huge[i], &err));
    EXPECT(POLAR_E_LIMIT, polar_engine_step(engine, 0, &event, huge[i], &n, NULL, 0, NULL, &err));
    EXPECT(POLAR_E_LIMIT, polar_engine_step(engine, 0, &event, 1, &n, top, huge[i], &m, &err));
  }
  EXPECT(POLAR_E_LIMIT, polar_engine_submit(engine, &r, POLAR_MAX_SUBMIT + 1, PROMPT, 8, &id, &err));
  for (size_t cap = 1; cap < POLAR_MAX_LOGPROBS; cap++) {
    INVALID(polar_engine_step(engine, 0, &event, 1, &n, top, cap, &m, &err));
  }
  EXPECT(POLAR_IDLE, polar_engine_step(engine, 0, &event, 1, &n, top, POLAR_MAX_LOGPROBS, &m, &err));
  EXPECT(POLAR_IDLE, polar_engine_step(engine, UINT64_MAX, &event, 1, &n, NULL, 0, NULL, &err));
}

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  CHECK(argc == 2);
  polar_context *ctx = new_context();
  polar_model *model = load_model(ctx, argv[1], "opt_f32");
  polar_engine *engine = NULL;
  polar_model_info info;
  OK(polar_engine_create(model, NULL, NULL, &engine, &err));
  info.struct_size = sizeof info;
  OK(polar_model_get_info(model, &info, &err));
  CHECK(strcmp(info.family, "opt") == 0 && info.dtype == POLAR_DTYPE_F32 && info.num_layers > 0);
  CHECK(info.num_heads * info.head_dim == info.hidden_size && info.weight_bytes > 0);
  inputs();
  outputs(ctx, engine);
  errors(ctx);
  context_values();
  load_values(ctx, argv[1]);
  estimates(ctx, argv[1], &info);
  engine_values(model);
  request_values(engine);
  tokens(engine, info.vocab_size);
  counts(engine);
  polar_engine_free(engine);
  polar_model_free(model);
  polar_context_free(ctx);
  return 0;
}
