/* Prints every device of a context: `cpu|cuda usable|unusable name`. With an argument, asks for CUDA only;
 * a context that cannot be had is printed as its error. */
#include "check.h"

int main(int argc, char **argv) {
  polar_error err = POLAR_ERROR_INIT;
  polar_context_options o;
  polar_context *ctx = NULL;
  uint32_t n = 0;
  (void)argv;
  polar_context_options_init(&o, sizeof o);
  o.threads = 1;
  o.backend = argc > 1 ? POLAR_BACKEND_CUDA : POLAR_BACKEND_AUTO;
  polar_status status = polar_context_create(&o, &ctx, &err);
  if (POLAR_IS_ERROR(status)) {
    printf("%s: %s\n", polar_status_name(status), err.message);
    return 0;
  }
  OK(polar_device_count(ctx, &n, &err));
  for (uint32_t i = 0; i < n; i++) {
    polar_device_info d;
    memset(&d, 0, sizeof d);
    d.struct_size = sizeof d;
    OK(polar_device_get(ctx, i, &d, &err));
    printf("%s %s %s\n", d.backend == POLAR_BACKEND_CPU ? "cpu" : "cuda", d.usable ? "usable" : "unusable",
           d.name);
    if (!d.usable) {
      /* Whoever loads there hears the same sentence. */
      polar_load_options load;
      polar_model *model = NULL;
      polar_load_options_init(&load, sizeof load);
      load.device = i;
      status = polar_model_load(ctx, "/nowhere", 8, &load, NULL, NULL, &model, &err);
      CHECK(status == POLAR_E_UNSUPPORTED && strncmp(err.message, d.name, 90) == 0);
    }
  }
  polar_context_free(ctx);
  return 0;
}
