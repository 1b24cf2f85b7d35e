/* NULL for each pointer of each function is an error or, where the header says so, fine. */
#include "check.h"

#define INVALID(call) EXPECT(POLAR_E_INVALID, call)

static void functions_without_a_status(void) {
  polar_context_options_init(NULL, sizeof(polar_context_options));
  polar_load_options_init(NULL, sizeof(polar_load_options));
  polar_engine_options_init(NULL, sizeof(polar_engine_options));
  polar_context_free(NULL);
  polar_model_free(NULL);
  polar_routers_free(NULL);
  polar_engine_free(NULL);
  polar_tokenizer_free(NULL);
  CHECK(polar_version() >> 8 == (POLAR_VERSION_MAJOR << 8 | POLAR_VERSION_MINOR));
  CHECK(polar_abi_version() == POLAR_ABI_VERSION);
  CHECK(strlen(polar_build_info()) > 20);
  CHECK(strcmp(polar_status_name(POLAR_E_BUSY), "POLAR_E_BUSY") == 0);
  CHECK(strcmp(polar_status_name(-5), "POLAR_UNKNOWN") == 0);
}

static void contexts(polar_context *ctx) {
  polar_error err = POLAR_ERROR_INIT;
  polar_device_info device;
  uint32_t count = 0;
  char text[64];
  size_t n = 7;
  INVALID(polar_context_create(NULL, NULL, &err));
  INVALID(polar_device_count(NULL, &count, &err));
  INVALID(polar_device_count(ctx, NULL, &err));
  device.struct_size = sizeof device;
  INVALID(polar_device_get(NULL, 0, &device, &err));
  INVALID(polar_device_get(ctx, 0, NULL, &err));
  INVALID(polar_device_get(ctx, 1000, &device, &err));
  INVALID(polar_log_set(NULL, NULL, NULL, &err));
  OK(polar_log_set(ctx, NULL, NULL, &err));
  INVALID(polar_log_drain(NULL, text, sizeof text, &n, NULL, &err));
  INVALID(polar_log_drain(ctx, NULL, sizeof text, &n, NULL, &err));
  INVALID(polar_log_drain(ctx, text, sizeof text, NULL, NULL, &err));
  CHECK(n == 7);
  /* Without a polar_error the status is all there is. */
  CHECK(polar_device_count(NULL, &count, NULL) == POLAR_E_INVALID);
}

static void models(polar_context *ctx, polar_model *model) {
  polar_error err = POLAR_ERROR_INIT;
  polar_model *m = NULL;
  polar_routers *r = NULL;
  polar_engine *e = NULL;
  polar_tokenizer *t = NULL;
  polar_model_info info;
  INVALID(polar_model_load(NULL, "x", 1, NULL, NULL, NULL, &m, &err));
  INVALID(polar_model_load(ctx, NULL, 1, NULL, NULL, NULL, &m, &err));
  INVALID(polar_model_load(ctx, NULL, 0, NULL, NULL, NULL, &m, &err));
  INVALID(polar_model_load(ctx, "x", 1, NULL, NULL, NULL, NULL, &err));
  INVALID(polar_model_load(ctx, "x\0y", 3, NULL, NULL, NULL, &m, &err));
  EXPECT(POLAR_E_LIMIT, polar_model_load(ctx, "x", SIZE_MAX, NULL, NULL, NULL, &m, &err));
  EXPECT(POLAR_E_IO, polar_model_load(ctx, "/nowhere", 8, NULL, NULL, NULL, &m, &err));
  CHECK(err.os_code != 0);
  polar_estimate estimate;
  estimate.struct_size = sizeof estimate;
  INVALID(polar_model_estimate(NULL, "x", 1, NULL, 0, NULL, NULL, &estimate, &err));
  INVALID(polar_model_estimate(ctx, NULL, 1, NULL, 0, NULL, NULL, &estimate, &err));
  INVALID(polar_model_estimate(ctx, "x", 1, NULL, 1, NULL, NULL, &estimate, &err));
  INVALID(polar_model_estimate(ctx, "x", 1, NULL, 0, NULL, NULL, NULL, &err));
  EXPECT(POLAR_E_IO, polar_model_estimate(ctx, "/nowhere", 8, NULL, 0, NULL, NULL, &estimate, &err));
  info.struct_size = sizeof info;
  INVALID(polar_model_get_info(NULL, &info, &err));
  INVALID(polar_model_get_info(model, NULL, &err));
  INVALID(polar_routers_load(NULL, "x", 1, NULL, &r, &err));
  INVALID(polar_routers_load(model, NULL, 1, NULL, &r, &err));
  INVALID(polar_routers_load(model, "x", 1, NULL, NULL, &err));
  INVALID(polar_engine_create(NULL, NULL, NULL, &e, &err));
  INVALID(polar_engine_create(model, NULL, NULL, NULL, &err));
  INVALID(polar_tokenizer_load(NULL, "x", 1, &t, &err));
  INVALID(polar_tokenizer_load(ctx, NULL, 1, &t, &err));
  INVALID(polar_tokenizer_load(ctx, "x", 1, NULL, &err));
  CHECK(m == NULL && r == NULL && e == NULL && t == NULL);
}

static void engines(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r = plain_request(1);
  polar_event event;
  polar_logprob top[POLAR_MAX_LOGPROBS];
  polar_stats stats;
  polar_seq id = 0;
  float logit = 0;
  size_t n = 0, m = 0;
  stats.struct_size = sizeof stats;
  INVALID(polar_engine_submit(NULL, &r, 1, PROMPT, 8, &id, &err));
  INVALID(polar_engine_submit(engine, NULL, 1, PROMPT, 8, &id, &err));
  INVALID(polar_engine_submit(engine, &r, 1, NULL, 8, &id, &err));
  INVALID(polar_engine_submit(engine, &r, 1, NULL, 0, &id, &err));
  INVALID(polar_engine_submit(engine, &r, 1, PROMPT, 8, NULL, &err));
  CHECK(id == 0);
  OK(polar_engine_submit(engine, NULL, 0, NULL, 0, NULL, &err));
  INVALID(polar_engine_cancel(NULL, &id, 1, &err));
  INVALID(polar_engine_cancel(engine, NULL, 1, &err));
  OK(polar_engine_cancel(engine, NULL, 0, &err));
  INVALID(polar_engine_push_token(NULL, 1, 1, &err));
  INVALID(polar_engine_logits(NULL, 1, &logit, 1, &n, &err));
  INVALID(polar_engine_logits(engine, 1, NULL, 1, &n, &err));
  INVALID(polar_engine_logits(engine, 1, &logit, 1, NULL, &err));
  INVALID(polar_engine_stats(NULL, &stats, &err));
  INVALID(polar_engine_stats(engine, NULL, &err));
  INVALID(polar_engine_step(NULL, 0, &event, 1, &n, NULL, 0, NULL, &err));
  INVALID(polar_engine_step(engine, 0, NULL, 1, &n, NULL, 0, NULL, &err));
  INVALID(polar_engine_step(engine, 0, &event, 1, NULL, NULL, 0, NULL, &err));
  INVALID(polar_engine_step(engine, 0, &event, 1, &n, NULL, 20, &m, &err));
  INVALID(polar_engine_step(engine, 0, &event, 1, &n, top, 20, NULL, &err));
  INVALID(polar_engine_begin(NULL, &err));
  INVALID(polar_engine_finish(NULL, 0, &event, 1, &n, NULL, 0, NULL, &err));
  INVALID(polar_engine_finish(engine, 0, NULL, 1, &n, NULL, 0, NULL, &err));
  INVALID(polar_engine_finish(engine, 0, &event, 1, NULL, NULL, 0, NULL, &err));
  INVALID(polar_engine_finish(engine, 0, &event, 1, &n, NULL, 20, &m, &err));
  INVALID(polar_engine_finish(engine, 0, &event, 1, &n, top, 20, NULL, &err));
  EXPECT(POLAR_IDLE, polar_engine_step(engine, 0, NULL, 0, &n, NULL, 0, &m, &err));
}

static void tokenizers(void) {
  polar_error err = POLAR_ERROR_INIT;
  char text[8];
  int32_t token = 1;
  size_t n = 0;
  INVALID(polar_tokenizer_encode(NULL, "x", 1, 0, &token, 1, &n, &err));
  INVALID(polar_tokenizer_decode(NULL, &token, 1, 0, text, sizeof text, &n, &err));
}

/* Without a GPU there is no library to get; what needs none is tried all the same. */
static void operators(void) {
  polar_error err = POLAR_ERROR_INIT;
  polar_op_library *library = NULL;
  polar_op_attention attention;
  polar_op_head_selection heads;
  polar_op_neuron_selection neurons;
  polar_op_mlp mlp;
  uint64_t bytes = 7;
  memset(&attention, 0, sizeof attention);
  memset(&heads, 0, sizeof heads);
  memset(&neurons, 0, sizeof neurons);
  memset(&mlp, 0, sizeof mlp);
  attention.struct_size = sizeof attention;
  heads.struct_size = sizeof heads;
  neurons.struct_size = sizeof neurons;
  mlp.struct_size = sizeof mlp;
  INVALID(polar_op_library_create(NULL, &err));
  polar_op_library_free(NULL);
  INVALID(polar_op_attention_workspace(NULL, &attention, &bytes, &err));
  INVALID(polar_op_attention_plan(NULL, &attention, NULL, &err));
  INVALID(polar_op_attention_run(NULL, &attention, NULL, &err));
  INVALID(polar_op_head_selection_workspace(NULL, &heads, &bytes, &err));
  INVALID(polar_op_head_selection_run(NULL, &heads, NULL, &err));
  INVALID(polar_op_neuron_selection_workspace(NULL, &neurons, &bytes, &err));
  INVALID(polar_op_neuron_selection_run(NULL, &neurons, NULL, &err));
  INVALID(polar_op_mlp_workspace(NULL, &mlp, &bytes, &err));
  INVALID(polar_op_mlp_run(NULL, &mlp, NULL, &err));
  polar_status status = polar_op_library_create(&library, &err);
  if (POLAR_IS_ERROR(status)) {
    CHECK(library == NULL && err.code == status && strlen(err.message) > 10);
    return;
  }
  INVALID(polar_op_attention_workspace(library, NULL, &bytes, &err));
  INVALID(polar_op_attention_workspace(library, &attention, NULL, &err));
  INVALID(polar_op_attention_workspace(library, &attention, &bytes, &err));
  INVALID(polar_op_attention_plan(library, NULL, NULL, &err));
  INVALID(polar_op_attention_run(library, NULL, NULL, &err));
  INVALID(polar_op_head_selection_workspace(library, NULL, &bytes, &err));
  INVALID(polar_op_head_selection_run(library, NULL, NULL, &err));
  INVALID(polar_op_neuron_selection_workspace(library, NULL, &bytes, &err));
  INVALID(polar_op_neuron_selection_run(library, NULL, NULL, &err));
  INVALID(polar_op_mlp_workspace(library, NULL, &bytes, &err));
  INVALID(polar_op_mlp_run(library, NULL, NULL, &err));
  CHECK(bytes == 7);
  polar_op_library_free(library);
}

/* A handle of another kind, and memory that was never one. */
static void foreign_handles(polar_context *ctx, polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  uint64_t noise[64] = {0};
  size_t n = 0;
  uint32_t count = 0;
  INVALID(polar_device_count((polar_context *)(void *)engine, &count, &err));
  INVALID(polar_engine_step((polar_engine *)(void *)ctx, 0, NULL, 0, &n, NULL, 0, NULL, &err));
  INVALID(polar_device_count((polar_context *)(void *)noise, &count, &err));
  INVALID(polar_device_count((polar_context *)(void *)((char *)noise + 1), &count, &err));
  polar_context_free((polar_context *)(void *)engine);
  polar_context_free((polar_context *)(void *)noise);
}

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  CHECK(argc == 2);
  polar_context *ctx = new_context();
  polar_model *model = load_model(ctx, argv[1], "opt_f32");
  polar_engine *engine = NULL;
  OK(polar_engine_create(model, NULL, NULL, &engine, &err));
  functions_without_a_status();
  contexts(ctx);
  models(ctx, model);
  engines(engine);
  tokenizers();
  operators();
  foreign_handles(ctx, engine);
  polar_engine_free(engine);
  polar_model_free(model);
  polar_context_free(ctx);
  return 0;
}
