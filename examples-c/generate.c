/* generate.c - text for a batch of prompts, dense and with Polar Sparsity.
 *
 *   generate [--model DIR] [--routers FILE] [--prompt TEXT]... [--density R] [--max-new N]
 *            [--context N] [--device auto|cpu|cuda]
 *
 * Without --model it runs the two small trained models in fixtures/. The way through the library is
 * in `open_session` (context, model, routers, engine) and `generate` (submit, step, events); the
 * rest is prompts, comparing and printing.
 */
#include <polar_sparsity.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PROMPTS = 64, MAX_EVENTS = 64, RUNS = 3, COMPARED = 32 };

/* The small models were trained on manuals: of Rust, Python, databases and a web server. */
static const char *const DEFAULT_PROMPTS[] = {
    "The borrow checker rejects this program because",
    "The function returns an iterator over the keys of the map. If the map is modified while",
    "This module",
    "A transaction is a group of one or more statements that",
    "The server reads its configuration file when it starts. The directive",
    "If the file does not exist, an exception is raised. Otherwise the file",
    "To create an index on a table, use the CREATE INDEX command. The",
    "A thread that holds the lock must release it before",
};

struct options {
  const char *model, *routers;
  const char *prompts[MAX_PROMPTS];
  uint32_t n_prompts, max_new, context;
  float density;
  polar_backend backend;
};

/* Everything that is loaded once. */
struct session {
  polar_context *context;
  polar_model *model;
  polar_routers *routers; /* NULL: dense only */
  polar_tokenizer *tokenizer;
  polar_engine *engine;
};

/* The prompts as tokens, one behind the other. */
struct prompts {
  uint32_t n;
  int32_t *tokens;
  uint32_t first[MAX_PROMPTS + 1]; /* prompt i is tokens first[i] .. first[i + 1] */
};

/* What came of one request. */
struct answer {
  polar_seq id;
  int32_t *tokens;
  uint32_t n_tokens;
  polar_finish_reason reason;
  polar_status status;
  float attn_density, mlp_density;
};

/* What a whole run cost, from the step on in which every request was decoding. */
struct cost {
  double seconds, kv_bytes;
  double tokens;
};

static void check(polar_status status, const polar_error *err) {
  if (!POLAR_IS_ERROR(status)) return;
  fprintf(stderr, "generate: %s: %s\n", polar_status_name(status), err->message);
  exit(1);
}

static void *allocate(size_t n, size_t size) {
  void *p = calloc(n > 0 ? n : 1, size);
  if (p == NULL) {
    fprintf(stderr, "generate: out of memory\n");
    exit(1);
  }
  return p;
}

/* ---- the way through the library ------------------------------------------------------------- */

static struct session open_session(const struct options *o) {
  polar_error err = POLAR_ERROR_INIT;
  struct session s = {NULL, NULL, NULL, NULL, NULL};
  polar_context_options context_options;
  polar_engine_options engine_options;

  polar_context_options_init(&context_options, sizeof context_options);
  context_options.backend = o->backend;
  check(polar_context_create(&context_options, &s.context, &err), &err);

  check(polar_model_load(s.context, o->model, strlen(o->model), NULL, NULL, NULL, &s.model, &err), &err);
  check(polar_tokenizer_load(s.context, o->model, strlen(o->model), &s.tokenizer, &err), &err);
  if (o->routers != NULL) {
    check(polar_routers_load(s.model, o->routers, strlen(o->routers), NULL, &s.routers, &err), &err);
  }

  polar_engine_options_init(&engine_options, sizeof engine_options);
  check(polar_engine_create(s.model, s.routers, &engine_options, &s.engine, &err), &err);
  return s;
}

static void close_session(struct session *s) {
  polar_engine_free(s->engine); /* any order is fine */
  polar_routers_free(s->routers);
  polar_tokenizer_free(s->tokenizer);
  polar_model_free(s->model);
  polar_context_free(s->context);
}

static polar_stats read_stats(const struct session *s) {
  polar_error err = POLAR_ERROR_INIT;
  polar_stats stats;
  stats.struct_size = sizeof stats;
  check(polar_engine_stats(s->engine, &stats, &err), &err);
  return stats;
}

/* Submits requests that were prepared for `prompts`, and steps until each is finished. Cancels
 * request `cancel` halfway, if there is such a one. */
static struct cost generate(const struct session *s, const struct prompts *prompts,
                            const polar_request *requests, struct answer *answers, uint32_t cancel) {
  polar_error err = POLAR_ERROR_INIT;
  polar_event events[MAX_EVENTS];
  polar_seq ids[MAX_PROMPTS];
  polar_status status;
  polar_stats begin, end;
  uint32_t started = 0;
  size_t n_events;
  struct cost cost;

  check(polar_engine_submit(s->engine, requests, prompts->n, prompts->tokens, prompts->first[prompts->n],
                            ids, &err), &err);
  for (uint32_t i = 0; i < prompts->n; i++) {
    answers[i].id = ids[i];
    answers[i].n_tokens = 0;
  }

  begin = read_stats(s);
  do {
    status = polar_engine_step(s->engine, UINT64_MAX, events, MAX_EVENTS, &n_events, NULL, 0, NULL, &err);
    check(status, &err);
    for (size_t i = 0; i < n_events; i++) {
      const polar_event *event = &events[i];
      struct answer *answer = &answers[event->user_tag];
      if (event->flags & POLAR_EVENT_TOKEN) {
        if (answer->n_tokens == 0 && ++started == prompts->n) begin = read_stats(s);
        answer->tokens[answer->n_tokens++] = event->token;
      }
      if (event->user_tag == cancel && answer->n_tokens == requests[cancel].max_new_tokens / 2) {
        check(polar_engine_cancel(s->engine, &answer->id, 1, &err), &err);
      }
      if (event->flags & POLAR_EVENT_FINISHED) {
        answer->reason = event->reason;
        answer->status = event->status;
        answer->attn_density = event->attn_density;
        answer->mlp_density = event->mlp_density;
      }
    }
  } while (status != POLAR_IDLE);

  end = read_stats(s);
  cost.seconds = (double)(end.step_ns_total - begin.step_ns_total) / 1e9;
  cost.kv_bytes = (double)(end.kv_bytes_read - begin.kv_bytes_read);
  cost.tokens = (double)(end.tokens_out - begin.tokens_out);
  return cost;
}

/* ---- prompts and requests -------------------------------------------------------------------- */

static struct prompts encode(const struct session *s, const char *const *texts, uint32_t n) {
  polar_error err = POLAR_ERROR_INIT;
  struct prompts p;
  size_t room = 0, used = 0;
  for (uint32_t i = 0; i < n; i++) room += strlen(texts[i]) + 8; /* no more tokens than bytes */
  p.n = n;
  p.tokens = allocate(room, sizeof *p.tokens);
  p.first[0] = 0;
  for (uint32_t i = 0; i < n; i++) {
    size_t got = 0;
    polar_status status = polar_tokenizer_encode(s->tokenizer, texts[i], strlen(texts[i]), 0,
                                                 p.tokens + used, room - used, &got, &err);
    check(status, &err);
    if (status == POLAR_TRUNCATED) {
      fprintf(stderr, "generate: prompt %u has more tokens than bytes\n", (unsigned)i);
      exit(1);
    }
    used += got;
    p.first[i + 1] = (uint32_t)used;
  }
  return p;
}

/* COMPARED prompts of `length` tokens each, from going round and round through `p`: decoding with much
 * to attend to is what sparsity is for. */
static struct prompts lengthen(const struct prompts *p, uint32_t length) {
  struct prompts out;
  uint32_t total = p->first[p->n];
  out.n = COMPARED;
  out.tokens = allocate((size_t)COMPARED * length, sizeof *out.tokens);
  for (uint32_t i = 0; i < out.n; i++) {
    uint32_t start = p->first[i % p->n] + i / p->n;
    out.first[i] = i * length;
    for (uint32_t t = 0; t < length; t++) out.tokens[out.first[i] + t] = p->tokens[(start + t) % total];
  }
  out.first[out.n] = out.n * length;
  return out;
}

static polar_request request_for(const struct prompts *p, uint32_t i, uint32_t max_new) {
  polar_request r;
  memset(&r, 0, sizeof r); /* zero is greedy, and the engine's defaults */
  r.user_tag = i;
  r.first_token = p->first[i];
  r.n_tokens = p->first[i + 1] - p->first[i];
  r.max_new_tokens = max_new;
  return r;
}

static void make_dense(polar_request *r) {
  r->attn_density = 1;
  r->mlp_mode = POLAR_MLP_DENSE;
}

static struct answer *new_answers(uint32_t n, uint32_t max_new) {
  struct answer *answers = allocate(n, sizeof *answers);
  for (uint32_t i = 0; i < n; i++) answers[i].tokens = allocate(max_new, sizeof *answers[i].tokens);
  return answers;
}

static void free_answers(struct answer *answers, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) free(answers[i].tokens);
  free(answers);
}

/* ---- printing -------------------------------------------------------------------------------- */

/* On one line, so that answers stay apart; without what would move the terminal's cursor. */
static void print_text(const char *text) {
  putchar('"');
  for (; *text != '\0'; text++) putchar((unsigned char)*text < ' ' || *text == 0x7f ? ' ' : *text);
  putchar('"');
}

static void print_answer(const struct session *s, const char *prompt, const struct answer *answer) {
  static const char *const REASONS[] = {"none", "stop", "length", "cancelled", "error"};
  polar_error err = POLAR_ERROR_INIT;
  size_t len = 0;
  polar_status status =
      polar_tokenizer_decode(s->tokenizer, answer->tokens, answer->n_tokens, 0, NULL, 0, &len, &err);
  check(status, &err);
  char *text = allocate(len + 1, 1);
  check(polar_tokenizer_decode(s->tokenizer, answer->tokens, answer->n_tokens, 0, text, len + 1, &len, &err),
        &err);
  printf("  ");
  print_text(prompt);
  printf("\n    ");
  print_text(text);
  printf("\n    %s after %u tokens; computed %.0f %% of heads, %.0f %% of neurons\n",
         answer->reason <= POLAR_FINISH_ERROR ? REASONS[answer->reason] : "?", (unsigned)answer->n_tokens,
         100 * (double)answer->attn_density, 100 * (double)answer->mlp_density);
  if (answer->reason == POLAR_FINISH_ERROR) printf("    %s\n", polar_status_name(answer->status));
  free(text);
}

static void print_model(const struct session *s, const char *path) {
  polar_error err = POLAR_ERROR_INIT;
  polar_model_info info;
  info.struct_size = sizeof info;
  check(polar_model_get_info(s->model, &info, &err), &err);
  printf("%s: %s, %u layers, %u heads in %u groups, %u neurons, %.1f MiB, on %s\n\n", path, info.family,
         (unsigned)info.num_layers, (unsigned)info.num_heads, (unsigned)info.num_kv_heads,
         (unsigned)info.ffn_size, (double)info.weight_bytes / (1 << 20), info.device_name);
}

/* ---- the two parts of the demo --------------------------------------------------------------- */

/* One batch with all kinds of requests in it: dense, sparse, one that is cancelled. */
static void show_batch(const struct session *s, const struct options *o, const struct prompts *prompts) {
  polar_request requests[MAX_PROMPTS];
  struct answer *answers = new_answers(prompts->n, o->max_new);
  uint32_t last = prompts->n - 1;
  for (uint32_t i = 0; i < prompts->n; i++) {
    requests[i] = request_for(prompts, i, o->max_new);
    if (s->routers == NULL || i % 2 == 0) {
      make_dense(&requests[i]);
    } else {
      requests[i].attn_density = o->density;
    }
  }
  generate(s, prompts, requests, answers, prompts->n > 1 ? last : UINT32_MAX);
  for (uint32_t i = 0; i < prompts->n; i++) print_answer(s, o->prompts[i], &answers[i]);
  printf("\n");
  free_answers(answers, prompts->n);
}

/* The same requests, all dense or all sparse. */
static void prepare(const struct options *o, const struct prompts *prompts, int dense,
                    polar_request *requests) {
  for (uint32_t i = 0; i < prompts->n; i++) {
    requests[i] = request_for(prompts, i, o->max_new);
    requests[i].flags = POLAR_REQUEST_IGNORE_EOS; /* equal lengths, to compare */
    requests[i].attn_density = o->density;
    if (dense) make_dense(&requests[i]);
  }
}

static void print_cost(const char *name, const struct cost *cost, const struct answer *answers, uint32_t n) {
  double heads = 0, neurons = 0;
  for (uint32_t i = 0; i < n; i++) {
    heads += (double)answers[i].attn_density / n;
    neurons += (double)answers[i].mlp_density / n;
  }
  printf("  %-6s %10.0f %14.1f %8.0f %% %8.0f %%\n", name, cost->seconds > 0 ? cost->tokens / cost->seconds : 0,
         cost->kv_bytes / (1 << 20), 100 * heads, 100 * neurons);
}

/* Share of tokens that are equal: place by place, and before two answers part for the first time. */
static void print_agreement(const struct answer *a, const struct answer *b, uint32_t n) {
  double tokens = 0, equal = 0, before = 0;
  for (uint32_t i = 0; i < n; i++) {
    int together = 1;
    uint32_t shorter = a[i].n_tokens < b[i].n_tokens ? a[i].n_tokens : b[i].n_tokens;
    tokens += a[i].n_tokens;
    for (uint32_t t = 0; t < shorter; t++) {
      int same = a[i].tokens[t] == b[i].tokens[t];
      together = together && same;
      equal += same;
      before += together;
    }
  }
  if (tokens == 0) return;
  printf("  Each writing on alone: the same token in %.0f %% of all places, in %.0f %% before they first differ.\n",
         100 * equal / tokens, 100 * before / tokens);
}

/* How often Polar chooses the token that dense chose after the same text. Here the host samples:
 * it looks at the logits, and answers with the dense token whatever they say. */
static void print_next_token_agreement(const struct session *s, const struct options *o,
                                       const struct prompts *prompts, const struct answer *dense) {
  polar_error err = POLAR_ERROR_INIT;
  polar_request requests[MAX_PROMPTS];
  polar_seq ids[MAX_PROMPTS];
  polar_event events[MAX_EVENTS];
  uint32_t at[MAX_PROMPTS] = {0}, finished = 0;
  double asked = 0, same = 0;
  size_t vocab_size = 0, n_events;

  prepare(o, prompts, 0, requests);
  for (uint32_t i = 0; i < prompts->n; i++) requests[i].flags |= POLAR_REQUEST_HOST_SAMPLES;
  check(polar_engine_submit(s->engine, requests, prompts->n, prompts->tokens, prompts->first[prompts->n],
                            ids, &err), &err);
  check(polar_engine_logits(s->engine, ids[0], NULL, 0, &vocab_size, &err), &err);
  float *logits = allocate(vocab_size, sizeof *logits);
  while (finished < prompts->n) {
    check(polar_engine_step(s->engine, UINT64_MAX, events, MAX_EVENTS, &n_events, NULL, 0, NULL, &err), &err);
    for (size_t i = 0; i < n_events; i++) {
      const polar_event *event = &events[i];
      finished += (event->flags & POLAR_EVENT_FINISHED) != 0;
      if (!(event->flags & POLAR_EVENT_LOGITS)) continue;
      uint32_t place = at[event->user_tag]++;
      int32_t wanted = dense[event->user_tag].tokens[place];
      size_t n, best = 0;
      check(polar_engine_logits(s->engine, event->seq, logits, vocab_size, &n, &err), &err);
      for (size_t t = 1; t < n; t++) best = logits[t] > logits[best] ? t : best;
      if (place > 0) asked++, same += (int32_t)best == wanted; /* the first comes from the prompt: dense */
      check(polar_engine_push_token(s->engine, event->seq, wanted, &err), &err);
    }
  }
  free(logits);
  if (asked > 0) printf("  After the same text: the same next token in %.0f %% of places.\n\n", 100 * same / asked);
}

static void compare(const struct session *s, const struct options *o, const struct prompts *prompts) {
  struct answer *answers[2];
  struct cost cost[2];
  polar_request requests[MAX_PROMPTS];
  printf("  %u requests, %u new tokens each\n", (unsigned)prompts->n, (unsigned)o->max_new);
  printf("  %-6s %10s %14s %10s %10s\n", "decode", "tokens/s", "KV read, MiB", "heads", "neurons");
  for (int polar = 0; polar < 2; polar++) {
    answers[polar] = new_answers(prompts->n, o->max_new);
    prepare(o, prompts, !polar, requests);
    for (int run = 0; run < RUNS; run++) { /* the fastest counts */
      struct cost c = generate(s, prompts, requests, answers[polar], UINT32_MAX);
      if (run == 0 || c.seconds < cost[polar].seconds) cost[polar] = c;
    }
    print_cost(polar ? "polar" : "dense", &cost[polar], answers[polar], prompts->n);
  }
  print_agreement(answers[0], answers[1], prompts->n);
  print_next_token_agreement(s, o, prompts, answers[0]);
  for (int polar = 0; polar < 2; polar++) free_answers(answers[polar], prompts->n);
}

static void demo(const struct options *o) {
  struct session session = open_session(o);
  struct prompts prompts = encode(&session, o->prompts, o->n_prompts);
  print_model(&session, o->model);
  show_batch(&session, o, &prompts);
  if (session.routers != NULL && o->context == 0) compare(&session, o, &prompts);
  if (session.routers != NULL && o->context > 0) {
    struct prompts longer = lengthen(&prompts, o->context);
    compare(&session, o, &longer);
    free(longer.tokens);
  }
  free(prompts.tokens);
  close_session(&session);
}

/* ---- arguments ------------------------------------------------------------------------------- */

static void usage(void) {
  fprintf(stderr,
          "usage: generate [--model DIR] [--routers FILE] [--prompt TEXT]... [--density R]\n"
          "                [--max-new N] [--context N] [--device auto|cpu|cuda]\n\n"
          "  --model DIR     Hugging Face folder with tokenizer.json; without it: fixtures/\n"
          "  --routers FILE  its routers; without them everything is dense\n"
          "  --prompt TEXT   may be given %d times\n"
          "  --density R     share of attention heads, 0 = as the router file says; default 0.625\n"
          "  --max-new N     tokens per prompt; default 48\n"
          "  --context N     compare on prompts of N tokens, made of the given ones; 0 = as they are\n",
          (int)MAX_PROMPTS);
  exit(2);
}

static polar_backend backend_named(const char *name) {
  if (strcmp(name, "auto") == 0) return POLAR_BACKEND_AUTO;
  if (strcmp(name, "cpu") == 0) return POLAR_BACKEND_CPU;
  if (strcmp(name, "cuda") == 0) return POLAR_BACKEND_CUDA;
  usage();
  return POLAR_BACKEND_AUTO;
}

static struct options parse(int argc, char **argv) {
  struct options o;
  memset(&o, 0, sizeof o);
  o.max_new = 48;
  o.density = 0.625f;
  o.context = UINT32_MAX;
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *name = argv[i], *value = argv[i + 1];
    if (strcmp(name, "--model") == 0) {
      o.model = value;
    } else if (strcmp(name, "--routers") == 0) {
      o.routers = value;
    } else if (strcmp(name, "--prompt") == 0 && o.n_prompts < MAX_PROMPTS) {
      o.prompts[o.n_prompts++] = value;
    } else if (strcmp(name, "--density") == 0) {
      o.density = (float)atof(value);
    } else if (strcmp(name, "--max-new") == 0 && atoi(value) > 0) {
      o.max_new = (uint32_t)atoi(value);
    } else if (strcmp(name, "--context") == 0 && atoi(value) >= 0) {
      o.context = (uint32_t)atoi(value);
    } else if (strcmp(name, "--device") == 0) {
      o.backend = backend_named(value);
    } else {
      usage();
    }
  }
  if (argc % 2 == 0) usage();
  if (o.n_prompts == 0) {
    o.n_prompts = sizeof DEFAULT_PROMPTS / sizeof *DEFAULT_PROMPTS;
    memcpy(o.prompts, DEFAULT_PROMPTS, sizeof DEFAULT_PROMPTS);
  }
  return o;
}

int main(int argc, char **argv) {
  struct options o = parse(argc, argv);
  if (o.model != NULL) {
    if (o.context == UINT32_MAX) o.context = 0;
    demo(&o);
    return 0;
  }
  if (o.context == UINT32_MAX) o.context = 256;
  o.model = "fixtures/opt-tiny";
  o.routers = "fixtures/opt-tiny/routers.safetensors";
  demo(&o);
  o.model = "fixtures/llama-tiny";
  o.routers = "fixtures/llama-tiny/routers.safetensors";
  demo(&o);
  return 0;
}
