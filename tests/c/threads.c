/* 64 threads submit and cancel while one steps; a second stepper is told to go away. */
#include <pthread.h>
#include <stdatomic.h>

#include "check.h"

enum { THREADS = 64, ROUNDS = 12 };

static polar_engine *engine;
static atomic_int submitting = THREADS;
static atomic_int accepted, busy, stop;
static atomic_uchar finished[THREADS * ROUNDS];

static void *client(void *argument) {
  polar_error err = POLAR_ERROR_INIT;
  uint64_t me = (uint64_t)(uintptr_t)argument;
  for (uint64_t i = 0; i < ROUNDS; i++) {
    polar_request r = plain_request(1 + (uint32_t)((me + i) % 6));
    polar_seq id = 0;
    polar_status s;
    r.user_tag = me * ROUNDS + i;
    r.n_tokens = 1 + (uint32_t)(me % 8);
    while ((s = polar_engine_submit(engine, &r, 1, PROMPT, 8, &id, &err)) == POLAR_E_QUEUE_FULL) {
    }
    CHECK(s == POLAR_OK);
    atomic_fetch_add(&accepted, 1);
    if (i % 3 == 0) OK(polar_engine_cancel(engine, &id, 1, &err));
    stats_of(engine);
  }
  atomic_fetch_sub(&submitting, 1);
  return NULL;
}

/* Wants to step too: is refused, or gets its turn between two steps, with no room to take events. */
static void *intruder(void *unused) {
  polar_error err = POLAR_ERROR_INIT;
  size_t n = 0;
  (void)unused;
  while (!atomic_load(&stop)) {
    polar_status s = polar_engine_finish(engine, 0, NULL, 0, &n, NULL, 0, NULL, &err);
    CHECK(s == POLAR_E_BUSY || !POLAR_IS_ERROR(s));
    CHECK(n == 0);
    atomic_fetch_add(&busy, s == POLAR_E_BUSY);
  }
  return NULL;
}

/* The driver: must see each accepted request end exactly once. */
static void drive(void) {
  polar_error err = POLAR_ERROR_INIT;
  polar_event events[16];
  size_t n = 0;
  polar_status s;
  int last; /* whether everything was submitted before the step */
  do {
    last = atomic_load(&submitting) == 0;
    s = polar_engine_step(engine, FOREVER, events, 16, &n, NULL, 0, NULL, &err);
    if (s == POLAR_E_BUSY) continue; /* the intruder had its turn */
    CHECK(!POLAR_IS_ERROR(s));
    for (size_t i = 0; i < n; i++) {
      CHECK(events[i].user_tag < THREADS * ROUNDS);
      if (events[i].flags & POLAR_EVENT_FINISHED) {
        CHECK(atomic_fetch_add(&finished[events[i].user_tag], 1) == 0);
      }
    }
  } while (s != POLAR_IDLE || !last);
}

int main(int argc, char **argv) {
  pthread_t threads[THREADS], extra;
  polar_engine_options o = engine_options();
  CHECK(argc == 2);
  o.max_batch = 8, o.max_queue = 32;
  engine = new_engine(argv[1], &o);
  for (uintptr_t i = 0; i < THREADS; i++) {
    CHECK(pthread_create(&threads[i], NULL, client, (void *)i) == 0);
  }
  CHECK(pthread_create(&extra, NULL, intruder, NULL) == 0);
  drive();
  atomic_store(&stop, 1);
  for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
  pthread_join(extra, NULL);
  CHECK(atomic_load(&accepted) == THREADS * ROUNDS);
  for (int i = 0; i < THREADS * ROUNDS; i++) CHECK(atomic_load(&finished[i]) == 1);
  polar_stats s = stats_of(engine);
  CHECK(s.requests_accepted == THREADS * ROUNDS && s.requests_finished == THREADS * ROUNDS);
  CHECK(s.kv_pages_free == s.kv_pages_total);
  CHECK(atomic_load(&busy) > 0);
  polar_engine_free(engine);
  return 0;
}
