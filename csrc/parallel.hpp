// Parallel loops on plain threads that live as long as one call: no runtime library, and no thread that the next call
// counts on, so it survives a fork (PyTorch's data loaders fork).
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace semimoe {

// Threads that share one loop after another. They are started once, because to start one, or to wake one that sleeps,
// takes as long as many rows: between two loops they look out for the next for a while before they sleep, and they end
// by themselves, not waited for. What they touch after the last loop is `State`, which the last of them frees.
class Workers {
 public:
  // `threads` includes the caller's.
  explicit Workers(std::int64_t threads) : state_(std::make_shared<State>()) {
    try {
      for (; helpers_ + 1 < threads; ++helpers_) std::thread([state = state_] { state->serve(); }).detach();
    } catch (const std::exception&) {
      // A thread for which the system has no room (system_error, bad_alloc) costs speed, not the result.
    }
  }

  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  ~Workers() {
    state_->change([this] { state_->ended = true; });
  }

  // Calls body(0) ... body(count - 1), each once. The first exception stops the loop and reaches the caller.
  template <class Body>
  void each(std::int64_t count, const Body& body) {
    std::atomic<std::int64_t> next{0};
    std::exception_ptr failure;
    const std::function<void()> loop = [&] {
      try {
        for (std::int64_t i = next++; i < count; i = next++) body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(state_->mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    };

    const bool shared = helpers_ > 0 && count > 1;
    if (shared) state_->change([&] { state_->loop = &loop; });
    loop();
    if (shared) {
      state_->change([this] { state_->loop = nullptr; });  // who has not come by now is not waited for
      state_->wait_until([this] { return state_->busy == 0; });
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::atomic<std::uint64_t> changes{0};
    std::atomic<int> busy{0};                     // helpers in the loop
    const std::function<void()>* loop = nullptr;  // open to helpers
    bool ended = false;

    void serve() {
      for (std::uint64_t seen = 0;;) {
        wait_until([&] { return changes != seen; });
        const std::function<void()>* open;
        {
          const std::lock_guard<std::mutex> lock(mutex);
          if (ended) return;
          seen = changes;
          open = loop;
          if (open == nullptr) continue;
          ++busy;
        }
        (*open)();
        change([this] { --busy; });
      }
    }

    template <class Action>
    void change(const Action& action) {
      {
        const std::lock_guard<std::mutex> lock(mutex);
        action();
        ++changes;
      }
      changed.notify_all();
    }

    // `ready` reads atomics alone.
    template <class Ready>
    void wait_until(const Ready& ready) {
      constexpr int kLooks = 200;  // about as long as to fall asleep and to be woken
      for (int i = 0; i < kLooks; ++i) {
        if (ready()) return;
        std::this_thread::yield();
      }
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, ready);
    }
  };

  std::shared_ptr<State> state_;
  std::int64_t helpers_ = 0;
};

}  // namespace semimoe
