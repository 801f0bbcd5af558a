// csrc/distance.cu on the CPU, launchers and all, behind one function.
#include "../../csrc/distance.cu"

// Returns 0, or 1 where the threads of a kernel do not agree on their barriers.
extern "C" int run(const semimoe::Problem* problem, int compute_capability_major, unsigned seed) try {
  emulated::compute_capability_major = compute_capability_major;
  emulated::seed = seed;
  semimoe::launch(*problem, nullptr);
  return 0;
} catch (const std::exception&) {
  return 1;
}
