/* Handles are freed in every order, also with work in flight, and freed ones are refused. */
#include "check.h"

struct all {
  polar_context *ctx;
  polar_model *model;
  polar_routers *routers;
  polar_engine *engine;
};

static struct all make(const char *data) {
  polar_error err = POLAR_ERROR_INIT;
  polar_engine_options o = engine_options();
  struct all a;
  a.ctx = new_context();
  a.model = load_model(a.ctx, data, "opt_f32");
  a.routers = load_routers(a.model, data, "opt_f32");
  o.attn_density = 0.5f;
  OK(polar_engine_create(a.model, a.routers, &o, &a.engine, &err));
  return a;
}

static void drop(struct all *a, int which) {
  switch (which) {
    case 0: polar_context_free(a->ctx); break;
    case 1: polar_model_free(a->model); break;
    case 2: polar_routers_free(a->routers); break;
    default: polar_engine_free(a->engine); break;
  }
}

/* The engine works until it goes itself. */
static void one_order(const char *data, const int order[4]) {
  struct all a = make(data);
  polar_request r = plain_request(3);
  submit(a.engine, &r);
  for (int i = 0; i < 4; i++) {
    if (order[i] == 3) CHECK(drain(a.engine) == 1);
    drop(&a, order[i]);
  }
}

static void every_order(const char *data) {
  for (int i = 0; i < 256; i++) {
    const int order[4] = {i & 3, i >> 2 & 3, i >> 4 & 3, i >> 6 & 3};
    int seen = 0;
    for (int j = 0; j < 4; j++) seen |= 1 << order[j];
    if (seen == 15) one_order(data, order);
  }
}

/* Freed with requests queued, running, and in flight. */
static void freed_at_work(const char *data) {
  polar_error err = POLAR_ERROR_INIT;
  polar_event events[8];
  size_t n = 0;
  for (int stage = 0; stage < 4; stage++) {
    polar_engine *engine = new_engine(data, NULL);
    polar_request r = plain_request(20);
    if (stage > 0) submit(engine, &r);
    if (stage > 1) step(engine, events, 8, &n);
    if (stage > 2) OK(polar_engine_begin(engine, &err));
    polar_engine_free(engine);
  }
}

/* Best effort: the memory may have gone to someone else, but mostly it tells. */
static void freed_twice(void) {
  polar_error err = POLAR_ERROR_INIT;
  uint32_t n = 0;
  polar_context *ctx = new_context();
  polar_context *stale = ctx;
  polar_context_free(ctx);
  EXPECT(POLAR_E_INVALID, polar_device_count(stale, &n, &err));
  polar_context_free(stale);
}

static void many_times(const char *data) {
  for (int i = 0; i < 20; i++) {
    struct all a = make(data);
    for (int which = 0; which < 4; which++) drop(&a, which);
  }
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  every_order(argv[1]);
  freed_at_work(argv[1]);
  many_times(argv[1]);
  /* Last, and not under a tool that stops at the read of freed memory it provokes. */
  if (getenv("NO_USE_AFTER_FREE") == NULL) freed_twice();
  return 0;
}
