/* async.c - the two halves of a step, for an event loop that must not block.
 *
 *   async MODEL_DIR
 *
 * `begin` starts a step; `finish` with a timeout of 0 asks whether it is done. In between the loop
 * does its other work: here it counts, submits a late request and writes out the log.
 */
#include <polar_sparsity.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EVENTS = 32 };

static void check(polar_status status, const polar_error *err) {
  if (!POLAR_IS_ERROR(status)) return;
  fprintf(stderr, "async: %s: %s\n", polar_status_name(status), err->message);
  exit(1);
}

static void submit(polar_engine *engine, uint64_t tag, uint32_t max_new) {
  static const int32_t PROMPT[] = {11, 12, 13, 14};
  polar_error err = POLAR_ERROR_INIT;
  polar_request r;
  polar_seq id;
  memset(&r, 0, sizeof r);
  r.user_tag = tag;
  r.n_tokens = 4;
  r.max_new_tokens = max_new;
  check(polar_engine_submit(engine, &r, 1, PROMPT, 4, &id, &err), &err);
}

static void write_log(polar_context *context) {
  polar_error err = POLAR_ERROR_INIT;
  char text[1024];
  size_t len;
  do {
    check(polar_log_drain(context, text, sizeof text, &len, NULL, &err), &err);
    fwrite(text, 1, len, stdout);
  } while (len > 0);
}

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *context = NULL;
  polar_model *model = NULL;
  polar_engine *engine = NULL;
  polar_event events[MAX_EVENTS];
  polar_status status = POLAR_OK;
  unsigned long turns = 0, steps = 0, finished = 0;
  size_t n_events;

  if (argc != 2) {
    fprintf(stderr, "usage: async MODEL_DIR\n");
    return 2;
  }
  check(polar_context_create(NULL, &context, &err), &err);
  check(polar_model_load(context, argv[1], strlen(argv[1]), NULL, NULL, NULL, &model, &err), &err);
  check(polar_engine_create(model, NULL, NULL, &engine, &err), &err);

  for (uint64_t tag = 0; tag < 4; tag++) submit(engine, tag, 16);
  while (status != POLAR_IDLE) {
    check(polar_engine_begin(engine, &err), &err);
    if (steps++ == 2) submit(engine, 4, 8); /* between the halves: joins the next step */
    do {
      turns++; /* the loop's other work */
      status = polar_engine_finish(engine, 0, events, MAX_EVENTS, &n_events, NULL, 0, NULL, &err);
      check(status, &err);
      for (size_t i = 0; i < n_events; i++) finished += (events[i].flags & POLAR_EVENT_FINISHED) != 0;
    } while (status == POLAR_PENDING);
  }
  write_log(context);
  printf("%lu requests finished in %lu steps; the loop turned %lu times\n", finished, steps, turns);

  polar_engine_free(engine);
  polar_model_free(model);
  polar_context_free(context);
  return 0;
}
