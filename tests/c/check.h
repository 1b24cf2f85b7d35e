/* What the C tests share: checks that say where they failed, and the way to an engine. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "polar_sparsity.h"

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

/* The call returns `wanted`; with an error it also says so in `err`, which is in scope. */
#define EXPECT(wanted, call)                                                                  \
  do {                                                                                        \
    polar_status got_ = (call);                                                               \
    if (got_ != (wanted)) {                                                                   \
      fprintf(stderr, "%s:%d: %s instead of %s (%s): %s\n", __FILE__, __LINE__,               \
              polar_status_name(got_), polar_status_name(wanted), err.message, #call);        \
      exit(1);                                                                                \
    }                                                                                         \
    if (POLAR_IS_ERROR(got_)) CHECK(err.code == got_ && err.message[0] != '\0');              \
  } while (0)

#define OK(call) EXPECT(POLAR_OK, call)

#define FOREVER UINT64_MAX

static inline polar_context_options context_options(polar_backend backend, uint32_t threads) {
  polar_context_options o;
  polar_context_options_init(&o, sizeof o);
  o.backend = backend;
  o.threads = threads;
  return o;
}

static inline polar_context *open_context(const polar_context_options *o) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *ctx = NULL;
  OK(polar_context_create(o, &ctx, &err));
  return ctx;
}

/* A context with a small pool. */
static inline polar_context *new_context(void) {
  polar_context_options o = context_options(POLAR_BACKEND_CPU, 2);
  o.log_level = POLAR_LOG_DEBUG;
  return open_context(&o);
}

/* A context on the first GPU. */
static inline polar_context *gpu_context(polar_context_flags flags) {
  polar_context_options o = context_options(POLAR_BACKEND_CUDA, 1);
  o.flags = flags;
  return open_context(&o);
}

/* A model of the golden data; `data` is their folder. */
static inline polar_model *load_model(polar_context *ctx, const char *data, const char *name) {
  polar_error err = POLAR_ERROR_INIT;
  polar_model *model = NULL;
  char path[1024];
  int n = snprintf(path, sizeof path, "%s/%s", data, name);
  CHECK(n > 0 && (size_t)n < sizeof path);
  OK(polar_model_load(ctx, path, (size_t)n, NULL, NULL, NULL, &model, &err));
  return model;
}

static inline polar_routers *load_routers(polar_model *model, const char *data, const char *name) {
  polar_error err = POLAR_ERROR_INIT;
  polar_routers *routers = NULL;
  polar_load_options o;
  char path[1024];
  int n = snprintf(path, sizeof path, "%s/%s/routers.safetensors", data, name);
  CHECK(n > 0 && (size_t)n < sizeof path);
  polar_load_options_init(&o, sizeof o);
  OK(polar_routers_load(model, path, (size_t)n, &o, &routers, &err));
  return routers;
}

/* A dense engine of the smallest model, with nothing else left to free. */
static inline polar_engine *new_engine(const char *data, const polar_engine_options *o) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *ctx = new_context();
  polar_model *model = load_model(ctx, data, "opt_f32");
  polar_engine *engine = NULL;
  OK(polar_engine_create(model, NULL, o, &engine, &err));
  polar_model_free(model);
  polar_context_free(ctx);
  return engine;
}

static inline polar_engine_options engine_options(void) {
  polar_engine_options o;
  polar_engine_options_init(&o, sizeof o);
  return o;
}

static const int32_t PROMPT[8] = {5, 6, 7, 8, 9, 10, 11, 12};

/* A greedy request for `PROMPT` that only its length ends. */
static inline polar_request plain_request(uint32_t max_new_tokens) {
  polar_request r;
  memset(&r, 0, sizeof r);
  r.n_tokens = 8;
  r.max_new_tokens = max_new_tokens;
  r.flags = POLAR_REQUEST_IGNORE_EOS;
  return r;
}

static inline polar_seq submit(polar_engine *engine, const polar_request *r) {
  polar_error err = POLAR_ERROR_INIT;
  polar_seq id = 0;
  OK(polar_engine_submit(engine, r, 1, PROMPT, 8, &id, &err));
  CHECK(id != 0);
  return id;
}

static inline polar_status step(polar_engine *engine, polar_event *events, size_t cap, size_t *n) {
  polar_error err = POLAR_ERROR_INIT;
  polar_status s = polar_engine_step(engine, FOREVER, events, cap, n, NULL, 0, NULL, &err);
  if (POLAR_IS_ERROR(s)) {
    fprintf(stderr, "step: %s: %s\n", polar_status_name(s), err.message);
    exit(1);
  }
  return s;
}

/* Steps until nothing is left; the number of FINISHED events. */
static inline size_t drain(polar_engine *engine) {
  polar_event events[64];
  size_t n = 0, finished = 0;
  polar_status s;
  do {
    s = step(engine, events, 64, &n);
    for (size_t i = 0; i < n; i++) finished += (events[i].flags & POLAR_EVENT_FINISHED) != 0;
  } while (s != POLAR_IDLE);
  return finished;
}

static inline polar_stats stats_of(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_stats s;
  memset(&s, 0, sizeof s);
  s.struct_size = sizeof s;
  OK(polar_engine_stats(engine, &s, &err));
  return s;
}

#endif
