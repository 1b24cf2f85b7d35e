/* What the caller reads: events through arrays of any size, halves of a step, logits, cancel. */
#include <math.h>

#include "check.h"

enum { N = 6, NEW = 5 };

/* Tokens of one run of N requests, and what ended them. */
struct run {
  int32_t tokens[N][NEW];
  uint32_t n[N], finished[N], reason[N];
};

static void submit_all(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r[N];
  polar_seq ids[N];
  for (uint32_t i = 0; i < N; i++) {
    r[i] = plain_request(NEW);
    r[i].user_tag = i;
    r[i].n_tokens = i + 1;
  }
  OK(polar_engine_submit(engine, r, N, PROMPT, 8, ids, &err));
}

static void take(struct run *run, const polar_event *e) {
  CHECK(e->user_tag < N && e->seq != 0);
  CHECK(run->finished[e->user_tag] == 0);
  if (e->flags & POLAR_EVENT_TOKEN) {
    CHECK(e->token >= 0 && run->n[e->user_tag] < NEW);
    run->tokens[e->user_tag][run->n[e->user_tag]++] = e->token;
    CHECK(e->n_generated == run->n[e->user_tag]);
  }
  if (e->flags & POLAR_EVENT_FINISHED) {
    run->finished[e->user_tag]++;
    run->reason[e->user_tag] = e->reason;
    CHECK(e->status == POLAR_OK);
  } else {
    CHECK(e->reason == POLAR_FINISH_NONE);
  }
  CHECK(e->attn_density == 1.0f && e->mlp_density == 1.0f); /* a dense engine */
}

static void check_complete(const struct run *run) {
  for (int i = 0; i < N; i++) {
    CHECK(run->finished[i] == 1 && run->n[i] == NEW && run->reason[i] == POLAR_FINISH_LENGTH);
  }
}

/* Steps with room for `cap` events; with 0 now and then a call that must lose nothing. */
static struct run run_with(polar_engine *engine, size_t cap, int empty_calls) {
  struct run run;
  polar_event events[64];
  polar_status s;
  size_t n = 0;
  memset(&run, 0, sizeof run);
  submit_all(engine);
  do {
    if (empty_calls) {
      s = step(engine, NULL, 0, &n);
      CHECK(n == 0);
    }
    s = step(engine, events, cap, &n);
    CHECK(n <= cap);
    CHECK(s == POLAR_OK || s == POLAR_IDLE || s == POLAR_TRUNCATED);
    if (s == POLAR_TRUNCATED) CHECK(n == cap);
    for (size_t i = 0; i < n; i++) take(&run, &events[i]);
  } while (s != POLAR_IDLE);
  check_complete(&run);
  return run;
}

static void any_room(polar_engine *engine) {
  struct run wide = run_with(engine, 64, 0);
  struct run one = run_with(engine, 1, 0);
  struct run none = run_with(engine, 3, 1);
  CHECK(memcmp(wide.tokens, one.tokens, sizeof wide.tokens) == 0);
  CHECK(memcmp(wide.tokens, none.tokens, sizeof wide.tokens) == 0);
}

/* begin and finish with a timeout of 0 give the same. */
static void halves(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  struct run whole = run_with(engine, 64, 0), run;
  polar_event events[64];
  polar_status s = POLAR_OK;
  size_t n = 0;
  int pending = 0;
  memset(&run, 0, sizeof run);
  EXPECT(POLAR_IDLE, polar_engine_finish(engine, FOREVER, events, 64, &n, NULL, 0, NULL, &err));
  submit_all(engine);
  for (;;) {
    OK(polar_engine_begin(engine, &err));
    do {
      s = polar_engine_finish(engine, pending % 2 ? 1000000 : 0, events, 64, &n, NULL, 0, NULL, &err);
      CHECK(!POLAR_IS_ERROR(s));
      pending += s == POLAR_PENDING;
      if (s == POLAR_PENDING) CHECK(n == 0);
      for (size_t i = 0; i < n; i++) take(&run, &events[i]);
    } while (s == POLAR_PENDING);
    if (s == POLAR_IDLE) break;
  }
  check_complete(&run);
  CHECK(memcmp(whole.tokens, run.tokens, sizeof run.tokens) == 0);
}

static void begin_twice(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r = plain_request(2);
  polar_event events[4];
  size_t n = 0;
  submit(engine, &r);
  OK(polar_engine_begin(engine, &err));
  EXPECT(POLAR_E_BUSY, polar_engine_begin(engine, &err));
  submit(engine, &r); /* joins the next step */
  OK(polar_engine_step(engine, FOREVER, events, 4, &n, NULL, 0, NULL, &err)); /* finishes it */
  CHECK(n >= 1);
  CHECK(drain(engine) == 2);
}

static void cancelled(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r = plain_request(50);
  polar_event events[8];
  polar_seq ids[3] = {0, 0xdeadbeefcafef00d, 0};
  size_t n = 0;
  ids[0] = submit(engine, &r);
  ids[2] = submit(engine, &r);
  step(engine, events, 8, &n);
  OK(polar_engine_cancel(engine, ids, 3, &err));
  OK(polar_engine_cancel(engine, ids, 3, &err)); /* twice is once */
  size_t finished = 0;
  polar_status s;
  do {
    s = step(engine, events, 8, &n);
    for (size_t i = 0; i < n; i++) {
      if (!(events[i].flags & POLAR_EVENT_FINISHED)) continue;
      finished++;
      CHECK(events[i].reason == POLAR_FINISH_CANCELLED);
    }
  } while (s != POLAR_IDLE);
  CHECK(finished == 2);
  OK(polar_engine_cancel(engine, ids, 3, &err)); /* stale ids are ignored */
  float logit;
  EXPECT(POLAR_TRUNCATED, polar_engine_logits(engine, ids[0], &logit, 1, &n, &err));
  EXPECT(POLAR_E_NOT_FOUND, polar_engine_push_token(engine, ids[0], 1, &err));
  CHECK(stats_of(engine).kv_pages_free == stats_of(engine).kv_pages_total);
}

static void stop_token(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  struct run plain = run_with(engine, 64, 0);
  int32_t tokens[9];
  polar_request r = plain_request(NEW);
  polar_event events[8];
  polar_seq id = 0;
  size_t n = 0;
  int finished = 0;
  memcpy(tokens, PROMPT, sizeof PROMPT);
  tokens[8] = plain.tokens[0][2]; /* the third token of request 0, whose prompt has one token */
  r.n_tokens = 1, r.first_stop = 8, r.n_stop = 1;
  OK(polar_engine_submit(engine, &r, 1, tokens, 9, &id, &err));
  while (step(engine, events, 8, &n) != POLAR_IDLE) {
    for (size_t i = 0; i < n; i++) {
      if (!(events[i].flags & POLAR_EVENT_FINISHED)) continue;
      finished++;
      CHECK(events[i].reason == POLAR_FINISH_STOP && events[i].token == tokens[8]);
      CHECK(!(events[i].flags & POLAR_EVENT_TOKEN) && events[i].n_generated <= 2);
    }
  }
  CHECK(finished == 1);
}

static void logprobs(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request r = plain_request(3);
  polar_event events[8];
  polar_logprob top[8 * POLAR_MAX_LOGPROBS];
  polar_status s;
  size_t n = 0, m = 0;
  r.n_logprobs = POLAR_MAX_LOGPROBS, r.flags |= POLAR_REQUEST_LOGPROB;
  for (int i = 0; i < 3; i++) submit(engine, &r);
  do { /* room for the alternatives of one event: one event a call */
    s = polar_engine_step(engine, FOREVER, events, 8, &n, top, POLAR_MAX_LOGPROBS, &m, &err);
    CHECK(s == POLAR_OK || s == POLAR_IDLE || s == POLAR_TRUNCATED);
    size_t with = 0;
    for (size_t i = 0; i < n; i++) {
      if (!(events[i].flags & POLAR_EVENT_TOKEN)) continue;
      with++;
      CHECK(events[i].n_logprobs == POLAR_MAX_LOGPROBS && events[i].first_logprob == 0);
      CHECK(m == POLAR_MAX_LOGPROBS && top[0].token == events[i].token); /* greedy */
      CHECK(fabsf(top[0].logprob - events[i].logprob) < 1e-5f);
      for (size_t j = 1; j < POLAR_MAX_LOGPROBS; j++) CHECK(top[j].logprob <= top[j - 1].logprob);
    }
    CHECK(with <= 1);
  } while (s != POLAR_IDLE);
  /* Without an array they are dropped, and the event says so. */
  submit(engine, &r);
  while (step(engine, events, 8, &n) != POLAR_IDLE) {
    for (size_t i = 0; i < n; i++) CHECK(events[i].n_logprobs == 0);
  }
}

/* A host that samples greedily by itself gets what the library would have chosen. */
static void host_samples(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  struct run plain = run_with(engine, 64, 0);
  polar_request r = plain_request(NEW);
  polar_event events[8];
  polar_status s;
  size_t n = 0, vocab = 0;
  int finished = 0;
  uint32_t taken = 0;
  r.flags |= POLAR_REQUEST_HOST_SAMPLES;
  r.n_tokens = 6;
  polar_seq id = submit(engine, &r);
  EXPECT(POLAR_TRUNCATED, polar_engine_logits(engine, id, NULL, 0, &vocab, &err));
  float *logits = malloc(vocab * sizeof *logits);
  CHECK(logits != NULL);
  while (!finished) {
    s = step(engine, events, 8, &n);
    CHECK(s == POLAR_OK);
    for (size_t i = 0; i < n; i++) {
      if (events[i].flags & POLAR_EVENT_FINISHED) finished = 1;
      if (!(events[i].flags & POLAR_EVENT_LOGITS)) continue;
      size_t best = 0;
      OK(polar_engine_logits(engine, id, logits, vocab, &n, &err));
      CHECK(n == vocab);
      for (size_t t = 1; t < vocab; t++) best = logits[t] > logits[best] ? t : best;
      CHECK((int32_t)best == plain.tokens[5][taken]);
      EXPECT(POLAR_E_INVALID, polar_engine_push_token(engine, id, -1, &err));
      OK(polar_engine_push_token(engine, id, (int32_t)best, &err));
      taken++;
      break;
    }
  }
  CHECK(taken == NEW);
  free(logits);
  CHECK(drain(engine) == 0);
}

static void queue_full(const char *data) {
  polar_error err = POLAR_ERROR_INIT;
  polar_engine_options o = engine_options();
  o.max_batch = 1, o.max_queue = 2;
  polar_engine *engine = new_engine(data, &o);
  polar_request r = plain_request(2), three[3];
  polar_seq ids[3] = {0, 0, 0};
  three[0] = three[1] = three[2] = r;
  EXPECT(POLAR_E_QUEUE_FULL, polar_engine_submit(engine, three, 3, PROMPT, 8, ids, &err));
  CHECK(ids[0] == 0);
  OK(polar_engine_submit(engine, three, 2, PROMPT, 8, ids, &err));
  EXPECT(POLAR_E_QUEUE_FULL, polar_engine_submit(engine, three, 1, PROMPT, 8, ids, &err));
  CHECK(stats_of(engine).admission_refusals > 0 && stats_of(engine).requests_accepted == 2);
  CHECK(drain(engine) == 2);
  polar_engine_free(engine);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  polar_engine *engine = new_engine(argv[1], NULL);
  any_room(engine);
  halves(engine);
  begin_twice(engine);
  cancelled(engine);
  stop_token(engine);
  logprobs(engine);
  host_samples(engine);
  polar_stats s = stats_of(engine);
  CHECK(s.requests_accepted == s.requests_finished && s.waiting == 0 && s.running == 0);
  CHECK(s.health == POLAR_HEALTH_OK && s.kv_pages_free == s.kv_pages_total && s.steps > 0);
  polar_engine_free(engine);
  queue_full(argv[1]);
  return 0;
}
