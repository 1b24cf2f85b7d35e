/* Generates on the first GPU with a model of the golden data and prints the tokens. With a second argument,
 * its products are untimed. */
#include "check.h"

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  CHECK(argc > 1);
  polar_context *ctx = gpu_context(argc > 2 ? POLAR_CONTEXT_UNTIMED_PRODUCTS : 0);
  polar_model *model = load_model(ctx, argv[1], "opt_f32");
  polar_engine_options options = engine_options();
  options.max_batch = 2;
  options.step_tokens = 16;
  options.kv_bytes = 1 << 20;
  polar_engine *engine = NULL;
  OK(polar_engine_create(model, NULL, &options, &engine, &err));
  polar_request r = plain_request(6);
  submit(engine, &r);
  polar_event events[8];
  size_t n = 0;
  while (step(engine, events, 8, &n) != POLAR_IDLE)
    for (size_t i = 0; i < n; i++) {
      CHECK(events[i].status == POLAR_OK);
      if (events[i].flags & POLAR_EVENT_TOKEN) printf("%d ", events[i].token);
    }
  printf("\n");
  polar_engine_free(engine);
  polar_model_free(model);
  polar_context_free(ctx);
  return 0;
}
