// csrc/distance.cu on the CPU, launchers and all, behind one function.
#include "../../csrc/distance.cu"

// Returns what went wrong, or null.
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
