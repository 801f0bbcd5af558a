// Parallel loops on std::thread. The threads end with the call, and no state remains between calls, so that a process
// may fork at any time (PyTorch's data loaders do).
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

// The calling thread and its helper threads, which run one loop after another together. To start or to wake a thread
// takes as long as many rows of pixels, so helpers start once, and they poll for the next loop before they sleep.
class Workers {
 public:
  // threads: the number of threads, with the calling one.
  explicit Workers(std::int64_t threads) {
    try {
      while (static_cast<std::int64_t>(helpers_.size()) + 1 < threads) helpers_.emplace_back([this] { serve(); });
    } catch (const std::exception&) {
      // If the system starts no more threads (system_error, bad_alloc), the loops run on fewer threads.
    }
  }

  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  ~Workers() {
    publish(nullptr);  // makes the helpers exit
    for (std::thread& helper : helpers_) helper.join();
  }

  // Calls body(0) ... body(count - 1), each once, in any order. The first exception stops the loop; this rethrows it.
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
    if (shared) publish(&loop);
    loop();
    if (shared) {
      close();
      wait_until([this] { return busy_ == 0; });
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  using Loop = const std::function<void()>*;

  // Offers a loop to every helper. nullptr makes the helpers exit.
  void publish(Loop loop) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
      is_open_ = true;
      ++published_;
    }
    changed_.notify_all();
  }

  // Helpers that arrive after this skip the loop.
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_open_ = false;
  }

  void serve() {
    for (std::uint64_t seen = 0;;) {
      wait_until([&] { return published_ != seen; });
      Loop loop;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = published_;
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

  // Polls, then sleeps. `ready` may only read atomics, because it is first called without the lock.
  template <class Ready>
  void wait_until(const Ready& ready) {
    constexpr int kPolls = 200;  // takes about as long as falling asleep and waking up
    for (int i = 0; i < kPolls; ++i) {
      if (ready()) return;
      std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, ready);
  }

  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<std::uint64_t> published_{0};  // number of published loops
  std::atomic<int> busy_{0};                 // number of helpers in the loop
  Loop loop_ = nullptr;
  bool is_open_ = false;
};

}  // namespace semimoe
