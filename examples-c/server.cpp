// server.cpp - the shape of a server: many threads submit, one steps, each client gets its stream.
//
//   server MODEL_DIR [ROUTERS_FILE]
//
// Reads prompts from standard input, one a line, and serves them all at once, as a network server
// would its connections. Continuous batching needs nothing more: submit whenever a request comes.
#include <polar_sparsity.hpp>

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

// Events of one request, from the stepping thread to the thread that serves the client.
class stream {
 public:
  void push(const polar_event& event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(event);
    ready_.notify_one();
  }

  polar_event pop() {
    std::unique_lock<std::mutex> lock(mutex_);
    ready_.wait(lock, [&] { return !events_.empty(); });
    const polar_event event = events_.front();
    events_.pop_front();
    return event;
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<polar_event> events_;
};

class server {
 public:
  explicit server(polar::engine engine) : engine_(std::move(engine)), stepper_([this] { run(); }) {}

  ~server() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    work_.notify_one();
    stepper_.join();
  }

  // Any thread. Calls `on_token` for each token, as it comes; returns the last event.
  template <class F>
  polar_event generate(const std::vector<int32_t>& prompt, uint32_t max_new, F&& on_token) {
    stream events;
    polar::batch batch;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const uint64_t tag = next_tag_++;
      streams_[tag] = &events;  // before submit: its first event may come at once
      batch.add(prompt, max_new).user_tag = tag;
      try {
        engine_.submit(batch);
      } catch (...) {
        streams_.erase(tag);
        throw;
      }
    }
    work_.notify_one();
    for (;;) {
      const polar_event event = events.pop();
      if (event.flags & POLAR_EVENT_TOKEN) on_token(event.token);
      if (event.flags & POLAR_EVENT_FINISHED) return event;
    }
  }

 private:
  // The one thread that steps.
  void run() {
    try {
      run_until_closed();
    } catch (const polar::error& e) {
      fail_all(e.status());  // the engine is of no more use
    }
  }

  // Sleeps while there is nothing to do.
  void run_until_closed() {
    for (;;) {
      const bool busy = engine_.step([this](const polar_event& event) { deliver(event); });
      std::unique_lock<std::mutex> lock(mutex_);
      if (busy) continue;
      work_.wait(lock, [this] { return closing_ || !streams_.empty(); });
      if (closing_ && streams_.empty()) return;
    }
  }

  void deliver(const polar_event& event) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(event.user_tag);
    if (found == streams_.end()) return;
    stream* const to = found->second;
    if (event.flags & POLAR_EVENT_FINISHED) streams_.erase(found);
    to->push(event);
  }

  void fail_all(polar_status status) {
    const std::lock_guard<std::mutex> lock(mutex_);
    polar_event event{};
    event.flags = POLAR_EVENT_FINISHED;
    event.reason = POLAR_FINISH_ERROR;
    event.status = status;
    for (const auto& [tag, to] : streams_) to->push(event);
    streams_.clear();
  }

  polar::engine engine_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::unordered_map<uint64_t, stream*> streams_;
  uint64_t next_tag_ = 0;
  bool closing_ = false;
  std::thread stepper_;  // last: it uses all of the above
};

polar::engine make_engine(const polar::model& model, const char* routers) {
  if (routers == nullptr) return polar::engine(model);
  polar::engine_options options;
  options.attn_density = 0.5F;
  return polar::engine(model, polar::routers(model, routers), options);
}

void serve(server& service, const polar::tokenizer& tokenizer, const std::string& prompt) {
  std::vector<int32_t> answer;
  const polar_event last =
      service.generate(tokenizer.encode(prompt), 48, [&](int32_t token) { answer.push_back(token); });
  const std::string text = prompt + " ->" + tokenizer.decode(answer) + "\n";
  std::printf("%s  (%u tokens, %.0f %% of heads)\n", text.c_str(), last.n_generated,
              100.0 * static_cast<double>(last.attn_density));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::fprintf(stderr, "usage: server MODEL_DIR [ROUTERS_FILE] < prompts\n");
    return 2;
  }
  try {
    const polar::context context;
    const polar::model model(context, argv[1]);
    const polar::tokenizer tokenizer(context, argv[1]);
    server service(make_engine(model, argc > 2 ? argv[2] : nullptr));
    std::vector<std::thread> clients;
    for (std::string line; std::getline(std::cin, line);) {
      if (line.empty()) continue;
      clients.emplace_back([&service, &tokenizer, line] {
        try {
          serve(service, tokenizer, line);
        } catch (const std::exception& e) {
          std::fprintf(stderr, "%s: %s\n", line.c_str(), e.what());
        }
      });
    }
    for (auto& client : clients) client.join();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "server: %s\n", e.what());
    return 1;
  }
  return 0;
}
