// Parallel loops on the threads of the OpenMP library that PyTorch has loaded.
//
// Those threads poll for a while after each of PyTorch's loops. Threads of our own would share the processors with
// them, and two would take longer than one. The library is looked up, not linked, because a second copy of it would
// have threads of its own, too. A program without it, and a forked child, where its threads are missing, start new
// threads.
#pragma once

#if __has_include(<dlfcn.h>) && __has_include(<unistd.h>)
#include <dlfcn.h>
#include <unistd.h>
#define SEMIMOE_POSIX
#endif

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace semimoe {

#ifdef SEMIMOE_POSIX
inline const pid_t kLoadingProcess = getpid();  // a forked child has none of OpenMP's threads

// Calls run(argument) on that many threads of OpenMP at once, of which the caller is one, and waits for all. Returns
// false where there is no OpenMP to ask.
inline bool on_openmp_threads(std::int64_t threads, void (*run)(void*), void* argument) {
  // Of GNU's OpenMP, and for programs compiled by GCC of LLVM's and Intel's.
  using Parallel = void (*)(void (*run)(void*), void* argument, unsigned threads, unsigned flags);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel == nullptr || getpid() != kLoadingProcess) return false;
  parallel(run, argument, static_cast<unsigned>(threads), 0);
  return true;
}
#else
inline bool on_openmp_threads(std::int64_t, void (*)(void*), void*) { return false; }
#endif

// The same on new threads, if need be.
inline void on_threads(std::int64_t threads, void (*run)(void*), void* argument) {
  if (on_openmp_threads(threads, run, argument)) return;
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  try {
    while (static_cast<std::int64_t>(others.size()) + 1 < threads) others.emplace_back(run, argument);
  } catch (const std::exception&) {
    // The system starts no more threads (system_error, bad_alloc): there are fewer.
  }
  run(argument);
  for (std::thread& other : others) other.join();
}

// A thread with fewer elements, or pixels, takes longer to start than it saves.
constexpr std::int64_t kWorkOfThread = 1 << 15;

// Loops on a number of threads.
//
// A loop takes one or all: OpenMP ends those threads that a loop leaves out, and the next one would start them again.
class Workers {
 public:
  // most: the greatest number of threads; work: too little for two threads if less than twice work_of_thread.
  Workers(int most, std::int64_t work, std::int64_t work_of_thread = kWorkOfThread)
      : threads_(work < 2 * work_of_thread ? 1 : most) {}

  // Calls body(0) ... body(count - 1), each once, in any order. The first exception stops the loop; this rethrows it.
  template <class Body>
  void each(std::int64_t count, const Body& body) const {
    Loop<Body> loop{body, count};
    if (threads_ > 1 && count > 1)
      on_threads(threads_, [](void* argument) { static_cast<Loop<Body>*>(argument)->run(); }, &loop);
    else
      loop.run();
    if (loop.failure) std::rethrow_exception(loop.failure);
  }

 private:
  template <class Body>
  struct Loop {
    const Body& body;
    const std::int64_t count;
    std::atomic<std::int64_t> next{0};
    std::mutex mutex{};
    std::exception_ptr failure{};

    void run() {
      try {
        for (std::int64_t i = next++; i < count; i = next++) body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
        next = count;
      }
    }
  };

  std::int64_t threads_;
};

}  // namespace semimoe
