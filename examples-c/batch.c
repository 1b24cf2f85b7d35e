/* batch.c - tokens in, tokens out: requests that differ in every setting, in one batch.
 *
 *   batch MODEL_DIR
 *
 * For hosts that have a tokenizer of their own. Shows sampling, seeds, stop tokens, priorities and
 * the likeliest alternatives of each token.
 */
#include <polar_sparsity.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 4, MAX_EVENTS = 8 };

static void check(polar_status status, const polar_error *err) {
  if (!POLAR_IS_ERROR(status)) return;
  fprintf(stderr, "batch: %s: %s\n", polar_status_name(status), err->message);
  exit(1);
}

static void print_event(const polar_event *event, const polar_logprob *alternatives) {
  if (event->flags & POLAR_EVENT_TOKEN) {
    printf("request %u: token %d, log probability %.3f", (unsigned)event->user_tag, (int)event->token,
           (double)event->logprob);
    for (uint32_t i = 0; i < event->n_logprobs; i++) {
      const polar_logprob *a = &alternatives[event->first_logprob + i];
      printf("%s %d (%.3f)", i == 0 ? "; likeliest" : ",", (int)a->token, (double)a->logprob);
    }
    printf("\n");
  }
  if (event->flags & POLAR_EVENT_FINISHED) {
    printf("request %u: finished, reason %u, after %u tokens\n", (unsigned)event->user_tag,
           (unsigned)event->reason, (unsigned)event->n_generated);
  }
}

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context *context = NULL;
  polar_model *model = NULL;
  polar_engine *engine = NULL;
  polar_request requests[N];
  polar_seq ids[N];
  polar_event events[MAX_EVENTS];
  polar_logprob alternatives[MAX_EVENTS * POLAR_MAX_LOGPROBS];
  polar_status status;
  size_t n_events, n_alternatives;

  /* One array holds every prompt and every stop token; requests point into it and may share. */
  const int32_t tokens[] = {11, 12, 13, 14, 15, 16, 17, 18, /* stop: */ 20, 21, 22};

  if (argc != 2) {
    fprintf(stderr, "usage: batch MODEL_DIR\n");
    return 2;
  }
  check(polar_context_create(NULL, &context, &err), &err);
  check(polar_model_load(context, argv[1], strlen(argv[1]), NULL, NULL, NULL, &model, &err), &err);
  check(polar_engine_create(model, NULL, NULL, &engine, &err), &err);

  memset(requests, 0, sizeof requests);
  for (uint32_t i = 0; i < N; i++) {
    requests[i].user_tag = i;
    requests[i].n_tokens = 2 + 2 * i; /* prompts of 2, 4, 6 and 8 tokens */
    requests[i].max_new_tokens = 8;
    requests[i].flags = POLAR_REQUEST_LOGPROB;
  }
  requests[0].n_logprobs = 3; /* greedy, with alternatives */
  requests[1].temperature = 0.8f, requests[1].top_p = 0.95f, requests[1].random_seed = 42;
  requests[2].temperature = 1.0f, requests[2].top_k = 20, requests[2].repetition_penalty = 1.2f;
  requests[3].first_stop = 8, requests[3].n_stop = 3, requests[3].priority = 1; /* runs first */

  check(polar_engine_submit(engine, requests, N, tokens, sizeof tokens / sizeof *tokens, ids, &err), &err);
  do {
    status = polar_engine_step(engine, UINT64_MAX, events, MAX_EVENTS, &n_events, alternatives,
                               MAX_EVENTS * POLAR_MAX_LOGPROBS, &n_alternatives, &err);
    check(status, &err);
    for (size_t i = 0; i < n_events; i++) print_event(&events[i], alternatives);
  } while (status != POLAR_IDLE);

  polar_engine_free(engine);
  polar_model_free(model);
  polar_context_free(context);
  return 0;
}
