/* The process around the library: fork, signals, output, dlopen, exit with everything alive. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

/* In a child each call is refused, free does nothing, and exit does not hang. */
static void forked(polar_engine *engine) {
  polar_error err = POLAR_ERROR_INIT;
  polar_event events[4];
  size_t n = 0;
  int status = 0;
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    polar_context *ctx = NULL;
    alarm(20);
    EXPECT(POLAR_E_UNSUPPORTED, polar_context_create(NULL, &ctx, &err));
    EXPECT(POLAR_E_UNSUPPORTED, polar_engine_step(engine, 0, events, 4, &n, NULL, 0, NULL, &err));
    CHECK(strcmp(polar_status_name(POLAR_OK), "POLAR_OK") == 0);
    polar_engine_free(engine);
    exit(42);
  }
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
  CHECK(step(engine, events, 4, &n) == POLAR_OK); /* the parent goes on */
}

static void signals(struct sigaction actions[NSIG], sigset_t *mask) {
  for (int i = 1; i < NSIG; i++) {
    memset(&actions[i], 0, sizeof actions[i]);
    sigaction(i, NULL, &actions[i]);
  }
  sigemptyset(mask);
  CHECK(sigprocmask(SIG_SETMASK, NULL, mask) == 0);
}

static void same_signals(const struct sigaction *before) {
  static struct sigaction now[NSIG];
  sigset_t mask;
  signals(now, &mask);
  for (int i = 1; i < NSIG; i++) CHECK(before[i].sa_handler == now[i].sa_handler);
}

/* A second copy beside the one we are linked to, closed and opened again. */
static void reopened(const char *library) {
  for (int i = 0; i < 3; i++) {
    void *so = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    CHECK(so != NULL);
    polar_status (*create)(const polar_context_options *, polar_context **, polar_error *);
    void (*release)(polar_context *);
    *(void **)&create = dlsym(so, "polar_context_create");
    *(void **)&release = dlsym(so, "polar_context_free");
    CHECK(create != NULL && release != NULL);
    polar_error err = POLAR_ERROR_INIT;
    polar_context *ctx = NULL;
    OK(create(NULL, &ctx, &err));
    release(ctx);
    CHECK(dlclose(so) == 0);
  }
}

int main(int argc, char **argv) {
  static struct sigaction before[NSIG];
  sigset_t mask;
  polar_error err = POLAR_ERROR_INIT;
  polar_event events[4];
  polar_model *model = NULL;
  size_t n = 0;
  CHECK(argc == 2);
  signals(before, &mask);
  /* What the library prints would land in this file. */
  char name[] = "/tmp/polar-output-XXXXXX";
  int output = mkstemp(name), out = dup(1), errors = dup(2);
  CHECK(output >= 0 && dup2(output, 1) == 1 && dup2(output, 2) == 2);

  polar_engine *engine = new_engine(argv[1], NULL);
  polar_request r = plain_request(10);
  submit(engine, &r);
  step(engine, events, 4, &n);
  polar_context *ctx = new_context();
  EXPECT(POLAR_E_IO, polar_model_load(ctx, "/nowhere", 8, NULL, NULL, NULL, &model, &err));
  const char *library = getenv("POLAR_TEST_LIBRARY");
  if (library != NULL) reopened(library);

  CHECK(dup2(out, 1) == 1 && dup2(errors, 2) == 2);
  CHECK(lseek(output, 0, SEEK_END) == 0); /* nothing was printed */
  unlink(name);
  same_signals(before);
  forked(engine);
  OK(polar_engine_begin(engine, &err));
  return 0; /* with an engine alive and a step in flight */
}
