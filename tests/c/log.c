/* Logs pushed and pulled; a callback that calls back; a load that is cancelled. */
#include "check.h"

static polar_context *the_context;
static polar_status from_log = POLAR_OK, from_progress = POLAR_OK;
static size_t lines;

static void on_line(void *user, polar_log_level level, const char *text, size_t len) {
  polar_error err = POLAR_ERROR_INIT;
  uint32_t n = 0;
  CHECK(user == &lines && len > 0 && text != NULL);
  CHECK(level >= POLAR_LOG_ERROR && level <= POLAR_LOG_DEBUG);
  from_log = polar_device_count(the_context, &n, &err);
  polar_context_free(the_context); /* does nothing in here */
  lines++;
}

static void push(polar_context *ctx, const char *data) {
  polar_error err = POLAR_ERROR_INIT;
  OK(polar_log_set(ctx, on_line, &lines, &err));
  polar_model_free(load_model(ctx, data, "opt_f32"));
  CHECK(lines > 0 && from_log == POLAR_E_BUSY);
  OK(polar_log_set(ctx, NULL, NULL, &err));
  size_t before = lines;
  polar_model_free(load_model(ctx, data, "opt_f32"));
  CHECK(lines == before);
}

static void pull(polar_context *ctx) {
  polar_error err = POLAR_ERROR_INIT;
  polar_model *model = NULL;
  char text[4096];
  size_t n = 0;
  uint64_t dropped = 1;
  do OK(polar_log_drain(ctx, text, sizeof text, &n, &dropped, &err));
  while (n > 0);
  CHECK(dropped == 0 && text[0] == '\0');
  EXPECT(POLAR_E_IO, polar_model_load(ctx, "/nowhere", 8, NULL, NULL, NULL, &model, &err));
  EXPECT(POLAR_TRUNCATED, polar_log_drain(ctx, text, 8, &n, NULL, &err));
  CHECK(n > 8 && text[0] == '\0');
  EXPECT(POLAR_TRUNCATED, polar_log_drain(ctx, NULL, 0, &n, NULL, &err));
  OK(polar_log_drain(ctx, text, n + 1, &n, NULL, &err));
  CHECK(strlen(text) == n && text[n - 1] == '\n' && strstr(text, "/nowhere") != NULL);
}

struct progress {
  int calls, cancel_at;
  uint64_t last, total;
};

static int32_t on_progress(void *user, uint64_t done, uint64_t total) {
  struct progress *p = user;
  polar_error err = POLAR_ERROR_INIT;
  uint32_t n = 0;
  CHECK(done >= p->last && done <= total);
  p->last = done, p->total = total;
  from_progress = polar_device_count(the_context, &n, &err);
  return ++p->calls == p->cancel_at;
}

static polar_status load(polar_context *ctx, const char *data, struct progress *p, polar_model **out) {
  polar_error err = POLAR_ERROR_INIT;
  char path[1024];
  int n = snprintf(path, sizeof path, "%s/opt_f32", data);
  return polar_model_load(ctx, path, (size_t)n, NULL, on_progress, p, out, &err);
}

static void cancelled_loads(polar_context *ctx, const char *data) {
  struct progress whole = {0, 0, 0, 0};
  polar_model *model = NULL;
  CHECK(load(ctx, data, &whole, &model) == POLAR_OK);
  polar_model_free(model);
  CHECK(whole.calls > 0 && whole.last == whole.total && from_progress == POLAR_E_BUSY);
  for (int k = 1; k <= whole.calls; k++) {
    struct progress p = {0, k, 0, 0};
    model = NULL;
    CHECK(load(ctx, data, &p, &model) == POLAR_E_CANCELLED && model == NULL && p.calls == k);
  }
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  the_context = new_context();
  push(the_context, argv[1]);
  pull(the_context);
  cancelled_loads(the_context, argv[1]);
  polar_context_free(the_context);
  return 0;
}
