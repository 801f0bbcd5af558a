// Parallel loops on plain threads that live as long as one call: no runtime library, nothing kept between calls, so it
// survives a fork (PyTorch's data loaders fork).
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace semimoe {

// Threads that share one loop after another. They are started once, because to start one, or to wake one that sleeps,
// takes as long as many rows; between two loops they look out for the next for a while before they sleep.
class Workers {
 public:
  // `threads` includes the caller's.
  explicit Workers(std::int64_t threads) {
    try {
      while (static_cast<std::int64_t>(helpers_.size()) + 1 < threads) helpers_.emplace_back([this] { serve(); });
    } catch (const std::exception&) {
      // A thread for which the system has no room (system_error, bad_alloc) costs speed, not the result.
    }
  }

  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  ~Workers() {
    open(nullptr);
    for (std::thread& helper : helpers_) helper.join();
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
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    };

    const bool shared = !helpers_.empty() && count > 1;
    if (shared) open(&loop);
    loop();
    if (shared) {
      close();
      wait_until([this] { return busy_ == 0; });
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  using Loop = const std::function<void()>*;

  // To every helper once; nothing ends them.
  void open(Loop loop) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
      is_open_ = true;
      ++opened_;
    }
    changed_.notify_all();
  }

  // Who has not come by now is not waited for.
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = false;
  }

  void serve() {
    for (std::uint64_t seen = 0;;) {
      wait_until([&] { return opened_ != seen; });
      Loop loop;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = opened_;
        if (!is_open_) continue;
        loop = loop_;
        if (loop == nullptr) return;
        ++busy_;
      }
      (*loop)();
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        --busy_;
      }
      changed_.notify_all();
    }
  }

  // `ready` reads atomics alone.
  template <class Ready>
  void wait_until(const Ready& ready) {
    constexpr int kLooks = 200;  // about as long as to fall asleep and to be woken
    for (int i = 0; i < kLooks; ++i) {
      if (ready()) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, ready);
  }

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<std::uint64_t> opened_{0};  // how many loops
  std::atomic<int> busy_{0};              // helpers in the loop
  Loop loop_ = nullptr;
  bool is_open_ = false;
};

}  // namespace semimoe
