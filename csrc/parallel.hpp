// A parallel loop on plain threads: no runtime library, nothing kept between calls, so it survives a fork
// (PyTorch's data loaders fork).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace semimoe {

// Calls body(0) ... body(count - 1), each once, on up to `threads` threads including the caller's.
// The first exception stops the loop and reaches the caller.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&] {
    try {
      for (std::int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      next = count;
    }
  };

  std::vector<std::thread> helpers;
  const auto wanted = std::min<std::int64_t>(threads, count) - 1;
  try {
    while (static_cast<std::int64_t>(helpers.size()) < wanted) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // A thread for which the system has no room (system_error, bad_alloc) costs speed, not the result.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace semimoe
