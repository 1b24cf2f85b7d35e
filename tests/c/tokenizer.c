/* Text to tokens and back, through buffers of any size. argv[1]: a folder with tokenizer.json. */
#include "check.h"

static void round_trip(polar_tokenizer *t, const char *text) {
  polar_error err = POLAR_ERROR_INIT;
  int32_t tokens[256];
  char back[512];
  size_t n = 0, len = 0, again = 0;
  EXPECT(strlen(text) > 0 ? POLAR_TRUNCATED : POLAR_OK,
         polar_tokenizer_encode(t, text, strlen(text), POLAR_ENCODE_NO_SPECIAL, NULL, 0, &n, &err));
  CHECK(n <= 256);
  OK(polar_tokenizer_encode(t, text, strlen(text), POLAR_ENCODE_NO_SPECIAL, tokens, n, &again, &err));
  CHECK(again == n);
  EXPECT(POLAR_TRUNCATED, polar_tokenizer_decode(t, tokens, n, 0, NULL, 0, &len, &err));
  memset(back, 'x', sizeof back);
  EXPECT(POLAR_TRUNCATED, polar_tokenizer_decode(t, tokens, n, 0, back, len, &len, &err));
  CHECK(len == 0 || (back[0] == '\0' && back[1] == 'x')); /* no text, but terminated */
  OK(polar_tokenizer_decode(t, tokens, n, POLAR_DECODE_KEEP_SPECIAL, back, len + 1, &len, &err));
  CHECK(strlen(back) == len && strcmp(back, text) == 0);
}

static void refusals(polar_context *ctx, polar_tokenizer *t) {
  polar_error err = POLAR_ERROR_INIT;
  polar_tokenizer *other = NULL;
  int32_t token = -1;
  char text[16];
  size_t n = 0;
  EXPECT(POLAR_E_IO, polar_tokenizer_load(ctx, "/nowhere", 8, &other, &err));
  CHECK(other == NULL);
  EXPECT(POLAR_E_INVALID, polar_tokenizer_encode(t, "\xff", 1, 0, &token, 1, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_encode(t, NULL, 1, 0, &token, 1, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_encode(t, "x", 1, 2, &token, 1, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_encode(t, "x", 1, 0, NULL, 1, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_encode(t, "x", 1, 0, &token, 1, NULL, &err));
  EXPECT(POLAR_E_LIMIT, polar_tokenizer_encode(t, "x", SIZE_MAX, 0, &token, 1, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_decode(t, &token, 1, 0, text, sizeof text, &n, &err));
  token = INT32_MAX; /* outside the vocabulary */
  OK(polar_tokenizer_decode(t, &token, 1, 0, text, sizeof text, &n, &err));
  CHECK(n == 0 && text[0] == '\0');
  EXPECT(POLAR_E_INVALID, polar_tokenizer_decode(t, NULL, 1, 0, text, sizeof text, &n, &err));
  EXPECT(POLAR_E_INVALID, polar_tokenizer_decode(t, &token, 0, 4, text, sizeof text, &n, &err));
  EXPECT(POLAR_E_LIMIT, polar_tokenizer_decode(t, &token, SIZE_MAX, 0, text, sizeof text, &n, &err));
}

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  polar_tokenizer *t = NULL;
  CHECK(argc == 2);
  polar_context *ctx = new_context();
  OK(polar_tokenizer_load(ctx, argv[1], strlen(argv[1]), &t, &err));
  round_trip(t, "");
  round_trip(t, "The file");
  round_trip(t, "  two  spaces\n\tand a tab");
  round_trip(t, "\xc3\xa4\xc3\xb6\xc3\xbc \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x90\xbb\xe2\x80\x8d\xe2\x9d\x84");
  refusals(ctx, t);
  polar_context_free(ctx); /* the tokenizer lives on */
  round_trip(t, "after");
  polar_tokenizer_free(t);
  return 0;
}
