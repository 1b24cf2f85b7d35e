/* Generates on the first GPU with routers of the golden data, for so many requests at once (second argument):
 * enough steps that one is recorded. Prints how many tokens came. */
#include "check.h"

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  CHECK(argc > 2);
  polar_context *ctx = gpu_context(0);
  polar_model *model = load_model(ctx, argv[1], "opt_f32");
  polar_routers *routers = load_routers(model, argv[1], "opt_f32");
  polar_engine_options options = engine_options();
  const unsigned requests = (unsigned)atoi(argv[2]);
  options.max_batch = requests;
  options.step_tokens = 8 * requests;
  options.kv_bytes = 16 << 20;
  options.attn_density = 0.5f;
  options.mlp_density = 0.3f;
  polar_engine *engine = NULL;
  OK(polar_engine_create(model, routers, &options, &engine, &err));
  polar_request r = plain_request(5);
  for (unsigned i = 0; i < requests; i++) submit(engine, &r);
  polar_event events[256];
  size_t n = 0;
  unsigned tokens = 0;
  while (step(engine, events, 256, &n) != POLAR_IDLE)
    for (size_t i = 0; i < n; i++) {
      CHECK(events[i].status == POLAR_OK);
      tokens += (events[i].flags & POLAR_EVENT_TOKEN) != 0;
    }
  printf("%u tokens\n", tokens);
  polar_engine_free(engine);
  polar_routers_free(routers);
  polar_model_free(model);
  polar_context_free(ctx);
  return 0;
}
