// polar_sparsity.hpp - the C ABI of polar_sparsity.h for C++17. Header-only.
// SPDX-License-Identifier: MIT OR Apache-2.0
//
//   polar::context ctx;
//   polar::model model(ctx, "path/to/model");
//   polar::engine engine(model);
//   polar::batch batch;
//   batch.add(prompt_tokens, 64).user_tag = 7;
//   engine.submit(batch);
//   while (engine.step([](const polar_event& e) { ... })) {}
//
// Objects free themselves, in any order, and can be moved. Errors are polar::error. The thread rules
// are those of the C functions: any thread submits and cancels, one at a time steps.
#ifndef POLAR_SPARSITY_HPP
#define POLAR_SPARSITY_HPP

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "polar_sparsity.h"

namespace polar {

/// Timeout that waits for as long as it takes.
inline constexpr uint64_t forever = UINT64_MAX;

/// A failed call.
class error : public std::runtime_error {
 public:
  error(polar_status status, const polar_error& e)
      : std::runtime_error(std::string(polar_status_name(status)) + (e.message[0] ? ": " : "") + e.message),
        status_(status),
        os_code_(e.os_code),
        device_code_(e.device_code) {}

  polar_status status() const noexcept { return status_; }
  int32_t os_code() const noexcept { return os_code_; }
  int32_t device_code() const noexcept { return device_code_; }

 private:
  polar_status status_;
  int32_t os_code_;
  int32_t device_code_;
};

/// Calls `f(polar_error*)`; an error status becomes an exception. The one place that throws for the
/// library.
template <class F>
polar_status call(F&& f) {
  polar_error e = POLAR_ERROR_INIT;
  const polar_status status = std::forward<F>(f)(&e);
  if (POLAR_IS_ERROR(status)) throw error(status, e);
  return status;
}

/// An options struct that starts out with its defaults.
template <class T, void (*Init)(T*, size_t)>
struct with_defaults : T {
  with_defaults() noexcept : T() { Init(this, sizeof(T)); }
};
using context_options = with_defaults<polar_context_options, polar_context_options_init>;
using load_options = with_defaults<polar_load_options, polar_load_options_init>;
using engine_options = with_defaults<polar_engine_options, polar_engine_options_init>;

namespace detail {

template <class T, void (*Free)(T*)>
struct deleter {
  void operator()(T* p) const noexcept { Free(p); }
};
template <class T, void (*Free)(T*)>
using handle = std::unique_ptr<T, deleter<T, Free>>;

/// A struct whose size its reader wants to know.
template <class T>
T sized() {
  T value{};
  value.struct_size = static_cast<uint32_t>(sizeof(T));
  return value;
}

/// An exception must not cross a C frame: it is kept and thrown again on the other side.
struct progress {
  std::function<bool(uint64_t, uint64_t)> function;
  std::exception_ptr thrown;

  static int32_t trampoline(void* self, uint64_t done, uint64_t total) noexcept {
    auto& p = *static_cast<progress*>(self);
    try {
      return p.function(done, total) ? 0 : 1;
    } catch (...) {
      p.thrown = std::current_exception();
      return 1;
    }
  }
};

using log_function = std::function<void(polar_log_level, std::string_view)>;

inline void log_trampoline(void* self, polar_log_level level, const char* text, size_t len) noexcept {
  try {
    (*static_cast<log_function*>(self))(level, std::string_view(text, len));
  } catch (...) {  // there is nobody to tell
  }
}

}  // namespace detail

/// Devices, limits, log.
class context {
 public:
  explicit context(const polar_context_options& options = context_options()) {
    const bool same_release = polar_version() >> 8 == (POLAR_VERSION_MAJOR << 8 | POLAR_VERSION_MINOR);
    if (polar_abi_version() != POLAR_ABI_VERSION || (POLAR_ABI_VERSION == 0 && !same_release)) {
      throw error(POLAR_E_ABI, POLAR_ERROR_INIT);
    }
    polar_context* p = nullptr;
    call([&](polar_error* e) { return polar_context_create(&options, &p, e); });
    handle_.reset(p);
  }
  context(context&&) noexcept = default;
  context& operator=(context&& other) noexcept {
    unset_log();
    handle_ = std::move(other.handle_);
    log_ = std::move(other.log_);
    return *this;
  }
  ~context() { unset_log(); }

  std::vector<polar_device_info> devices() const {
    uint32_t n = 0;
    call([&](polar_error* e) { return polar_device_count(get(), &n, e); });
    std::vector<polar_device_info> out(n, detail::sized<polar_device_info>());
    for (uint32_t i = 0; i < n; i++) {
      call([&](polar_error* e) { return polar_device_get(get(), i, &out[i], e); });
    }
    return out;
  }

  /// Sends each log line to `function`, on any thread, until the context goes. It must not call the
  /// library; what it throws is dropped.
  void on_log(std::function<void(polar_log_level, std::string_view)> function) {
    unset_log();
    auto kept = std::make_unique<detail::log_function>(std::move(function));
    call([&](polar_error* e) { return polar_log_set(get(), detail::log_trampoline, kept.get(), e); });
    log_ = std::move(kept);
  }

  /// Takes the kept log lines.
  std::string drain_log() {
    std::string out;
    char buffer[4096];
    size_t n = 0;
    do {
      call([&](polar_error* e) { return polar_log_drain(get(), buffer, sizeof buffer, &n, nullptr, e); });
      out.append(buffer, n);
    } while (n > 0);
    return out;
  }

  polar_context* get() const noexcept { return handle_.get(); }

 private:
  void unset_log() noexcept {
    if (!handle_ || !log_) return;
    const polar_status ignored = polar_log_set(get(), nullptr, nullptr, nullptr);
    static_cast<void>(ignored);
  }

  std::unique_ptr<detail::log_function> log_;
  detail::handle<polar_context, polar_context_free> handle_;
};

/// What a model and an engine would take on a device, before anything is loaded; `routers` is a path or
/// empty.
inline polar_estimate estimate(const context& ctx, std::string_view path, std::string_view routers = {},
                               const polar_load_options& load = load_options(),
                               const polar_engine_options& engine = engine_options()) {
  auto out = detail::sized<polar_estimate>();
  call([&](polar_error* e) {
    return polar_model_estimate(ctx.get(), path.data(), path.size(), routers.data(), routers.size(), &load,
                                &engine, &out, e);
  });
  return out;
}

/// Immutable weights.
class model {
 public:
  /// `progress(bytes done, bytes in all)` returns false to cancel; it may throw.
  model(const context& ctx, std::string_view path, const polar_load_options& options = load_options(),
        std::function<bool(uint64_t, uint64_t)> progress = nullptr) {
    polar_model* p = nullptr;
    detail::progress state{std::move(progress), nullptr};
    polar_error e = POLAR_ERROR_INIT;
    const polar_status status =
        polar_model_load(ctx.get(), path.data(), path.size(), &options,
                         state.function ? detail::progress::trampoline : nullptr, &state, &p, &e);
    if (state.thrown) std::rethrow_exception(state.thrown);
    if (POLAR_IS_ERROR(status)) throw error(status, e);
    handle_.reset(p);
  }

  polar_model_info info() const {
    auto out = detail::sized<polar_model_info>();
    call([&](polar_error* e) { return polar_model_get_info(get(), &out, e); });
    return out;
  }

  polar_model* get() const noexcept { return handle_.get(); }

 private:
  detail::handle<polar_model, polar_model_free> handle_;
};

/// Router weights made for one model.
class routers {
 public:
  routers(const model& m, std::string_view path, const polar_load_options& options = load_options()) {
    polar_routers* p = nullptr;
    call([&](polar_error* e) {
      return polar_routers_load(m.get(), path.data(), path.size(), &options, &p, e);
    });
    handle_.reset(p);
  }

  polar_routers* get() const noexcept { return handle_.get(); }

 private:
  detail::handle<polar_routers, polar_routers_free> handle_;
};

/// Text to tokens and back.
class tokenizer {
 public:
  tokenizer(const context& ctx, std::string_view path) {
    polar_tokenizer* p = nullptr;
    call([&](polar_error* e) { return polar_tokenizer_load(ctx.get(), path.data(), path.size(), &p, e); });
    handle_.reset(p);
  }

  std::vector<int32_t> encode(std::string_view text, polar_text_flags flags = 0) const {
    // A token rarely covers less than a byte, so the first call mostly suffices.
    std::vector<int32_t> out(text.size() + 8);
    size_t n = 0;
    while (call([&](polar_error* e) {
             return polar_tokenizer_encode(get(), text.data(), text.size(), flags, out.data(), out.size(), &n, e);
           }) == POLAR_TRUNCATED) {
      out.resize(n);
    }
    out.resize(n);
    return out;
  }

  std::string decode(const std::vector<int32_t>& tokens, polar_text_flags flags = 0) const {
    return decode(tokens.data(), tokens.size(), flags);
  }

  std::string decode(const int32_t* tokens, size_t n_tokens, polar_text_flags flags = 0) const {
    std::string out(n_tokens * 8 + 1, '\0');
    size_t n = 0;
    while (call([&](polar_error* e) {
             return polar_tokenizer_decode(get(), tokens, n_tokens, flags, out.data(), out.size(), &n, e);
           }) == POLAR_TRUNCATED) {
      out.resize(n + 1);
    }
    out.resize(n);
    return out;
  }

  polar_tokenizer* get() const noexcept { return handle_.get(); }

 private:
  detail::handle<polar_tokenizer, polar_tokenizer_free> handle_;
};

/// Requests with their tokens, for one submit.
class batch {
 public:
  /// Adds a request; the reference, for the fields beside these, is good until the next `add`.
  polar_request& add(const std::vector<int32_t>& prompt, uint32_t max_new_tokens,
                     const std::vector<int32_t>& stop = {}) {
    polar_request r{};
    r.max_new_tokens = max_new_tokens;
    r.first_token = append(prompt);
    r.n_tokens = static_cast<uint32_t>(prompt.size());
    r.first_stop = append(stop);
    r.n_stop = static_cast<uint32_t>(stop.size());
    requests_.push_back(r);
    return requests_.back();
  }

  void clear() noexcept {
    requests_.clear();
    tokens_.clear();
  }

  const std::vector<polar_request>& requests() const noexcept { return requests_; }
  const std::vector<int32_t>& tokens() const noexcept { return tokens_; }

 private:
  uint32_t append(const std::vector<int32_t>& tokens) {
    const auto first = static_cast<uint32_t>(tokens_.size());
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    return first;
  }

  std::vector<polar_request> requests_;
  std::vector<int32_t> tokens_;
};

/// Scheduler, KV cache and one model.
class engine {
 public:
  explicit engine(const model& m, const polar_engine_options& options = engine_options())
      : engine(m, nullptr, options) {}
  engine(const model& m, const routers& r, const polar_engine_options& options = engine_options())
      : engine(m, r.get(), options) {}

  /// Queues all of the batch or throws; one id per request.
  std::vector<polar_seq> submit(const batch& b) {
    std::vector<polar_seq> ids(b.requests().size());
    call([&](polar_error* e) {
      return polar_engine_submit(get(), b.requests().data(), b.requests().size(), b.tokens().data(),
                                 b.tokens().size(), ids.data(), e);
    });
    return ids;
  }

  void cancel(polar_seq id) {
    call([&](polar_error* e) { return polar_engine_cancel(get(), &id, 1, e); });
  }
  void cancel(const std::vector<polar_seq>& ids) {
    call([&](polar_error* e) { return polar_engine_cancel(get(), ids.data(), ids.size(), e); });
  }

  /// Runs one step and calls `on_event(event)` or `on_event(event, alternatives)` for each event;
  /// `event.n_logprobs` counts the alternatives. The handler may submit, cancel and throw: events it
  /// has not seen come with the next call. False when there is nothing left to do.
  template <class F>
  bool step(F&& on_event, uint64_t timeout_ns = forever) {
    return collect(polar_engine_step, std::forward<F>(on_event), timeout_ns);
  }

  /// Starts a step without waiting for it.
  void begin() {
    call([&](polar_error* e) { return polar_engine_begin(get(), e); });
  }

  /// Like `step`, for the step that `begin` started. POLAR_PENDING: it still runs.
  template <class F>
  polar_status finish(F&& on_event, uint64_t timeout_ns = forever) {
    collect(polar_engine_finish, std::forward<F>(on_event), timeout_ns);
    return last_;
  }

  /// What the last step or finish returned.
  polar_status last_status() const noexcept { return last_; }

  /// Logits of a request whose host samples.
  std::vector<float> logits(polar_seq id) {
    std::vector<float> out;
    size_t n = 0;
    while (call([&](polar_error* e) {
             return polar_engine_logits(get(), id, out.data(), out.size(), &n, e);
           }) == POLAR_TRUNCATED) {
      out.resize(n);
    }
    return out;
  }

  void push_token(polar_seq id, int32_t token) {
    call([&](polar_error* e) { return polar_engine_push_token(get(), id, token, e); });
  }

  polar_stats stats() const {
    auto out = detail::sized<polar_stats>();
    call([&](polar_error* e) { return polar_engine_stats(get(), &out, e); });
    return out;
  }

  polar_engine* get() const noexcept { return handle_.get(); }

 private:
  engine(const model& m, polar_routers* r, const polar_engine_options& options)
      : events_(options.max_batch > 0 ? options.max_batch : 32), alternatives_(events_.size() * POLAR_MAX_LOGPROBS) {
    polar_engine* p = nullptr;
    call([&](polar_error* e) { return polar_engine_create(m.get(), r, &options, &p, e); });
    handle_.reset(p);
  }

  template <class Step, class F>
  bool collect(Step run, F&& on_event, uint64_t timeout_ns) {
    if (next_ < n_) {  // the handler threw in the call before
      deliver(on_event);
      return true;
    }
    next_ = n_ = 0;
    size_t n_alternatives = 0;
    polar_error e = POLAR_ERROR_INIT;
    last_ = run(get(), timeout_ns, events_.data(), events_.size(), &n_, alternatives_.data(),
                alternatives_.size(), &n_alternatives, &e);
    deliver(on_event);  // also when the step failed
    if (POLAR_IS_ERROR(last_)) throw error(last_, e);
    return last_ != POLAR_IDLE;
  }

  template <class F>
  void deliver(F& on_event) {
    while (next_ < n_) {
      const polar_event& event = events_[next_++];
      if constexpr (std::is_invocable_v<F&, const polar_event&, const polar_logprob*>) {
        on_event(event, static_cast<const polar_logprob*>(alternatives_.data() + event.first_logprob));
      } else {
        on_event(event);
      }
    }
  }

  std::vector<polar_event> events_;
  std::vector<polar_logprob> alternatives_;
  size_t next_ = 0;
  size_t n_ = 0;
  polar_status last_ = POLAR_OK;
  detail::handle<polar_engine, polar_engine_free> handle_;
};

/// The kernels in the CUDA context that is current on this thread, for hosts that own weights, KV pages
/// and stream. Calls are asynchronous on `stream` (a CUstream or cudaStream_t) and may be captured into
/// a graph. Fill the structs by name; `op<polar_op_attention>()` is an empty one.
class op_library {
 public:
  op_library() {
    polar_op_library* p = nullptr;
    call([&](polar_error* e) { return polar_op_library_create(&p, e); });
    handle_.reset(p);
  }

  /// Bytes of workspace.
  uint64_t workspace(const polar_op_attention& o) const { return ask(polar_op_attention_workspace, o); }
  uint64_t workspace(const polar_op_head_selection& o) const { return ask(polar_op_head_selection_workspace, o); }
  uint64_t workspace(const polar_op_neuron_selection& o) const { return ask(polar_op_neuron_selection_workspace, o); }
  uint64_t workspace(const polar_op_mlp& o) const { return ask(polar_op_mlp_workspace, o); }

  /// Once per step, before the attention of its layers.
  void plan(const polar_op_attention& o, void* stream) const { start(polar_op_attention_plan, o, stream); }
  void run(const polar_op_attention& o, void* stream) const { start(polar_op_attention_run, o, stream); }
  void run(const polar_op_head_selection& o, void* stream) const { start(polar_op_head_selection_run, o, stream); }
  void run(const polar_op_neuron_selection& o, void* stream) const { start(polar_op_neuron_selection_run, o, stream); }
  void run(const polar_op_mlp& o, void* stream) const { start(polar_op_mlp_run, o, stream); }

  polar_op_library* get() const noexcept { return handle_.get(); }

 private:
  template <class Op, class Function>
  uint64_t ask(Function function, const Op& o) const {
    uint64_t bytes = 0;
    call([&](polar_error* e) { return function(get(), &o, &bytes, e); });
    return bytes;
  }
  template <class Op, class Function>
  void start(Function function, const Op& o, void* stream) const {
    call([&](polar_error* e) { return function(get(), &o, stream, e); });
  }

  detail::handle<polar_op_library, polar_op_library_free> handle_;
};

/// An operator's struct with its size set and everything else 0.
template <class Op>
Op op() {
  return detail::sized<Op>();
}

}  // namespace polar

#endif  // POLAR_SPARSITY_HPP
