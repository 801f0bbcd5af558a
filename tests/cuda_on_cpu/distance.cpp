// csrc/distance.cu with its launchers, compiled for the CPU.
#include "../../csrc/distance.cu"

// Launches a problem; returns an error message, or null.
extern "C" const char* run(const semimoe::Problem* problem, int compute_capability_major, unsigned seed) try {
  emulated::compute_capability_major = compute_capability_major;
  emulated::seed = seed;
  semimoe::launch(*problem, nullptr);
  return nullptr;
} catch (const std::exception& error) {
  static std::string message;
  message = error.what();
  return message.c_str();
}

// Makes the first launch on a device fail to load its kernels, and returns the thread's stream capture mode, which was
// 0 before; -1 if the launch did not fail.
extern "C" int capture_mode_after_failure() {
  emulated::compute_capability_major = 7;
  emulated::kernels_load = false;
  semimoe::Problem problem{};
  problem.batch = problem.height = problem.width = 1;
  bool failed = false;
  try {
    semimoe::launch(problem, nullptr);
  } catch (const std::runtime_error&) {
    failed = true;
  }
  emulated::kernels_load = true;
  return failed ? emulated::capture_mode : -1;
}
