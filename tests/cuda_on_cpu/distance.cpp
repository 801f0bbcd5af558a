// csrc/distance.cu with its launchers, compiled for the CPU.
#include "../../csrc/distance.cu"

#include <random>

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

// The trips of inner loops of all threads since the last call.
extern "C" std::uint64_t take_iterations() { return std::exchange(emulated::iterations, 0); }

// The first float in [first, last) for which some estimate of 1 / sqrt(x) that the hardware may return leads to a wrong
// root; 0 if there is none. It tests every `step`-th float.
extern "C" float wrong_root(float first, float last, int step) {
  const double most = std::exp2(-22.9);
  std::uint32_t bits;
  for (std::memcpy(&bits, &first, 4);; bits += step) {
    float x;
    std::memcpy(&x, &bits, 4);
    if (x >= last) return 0;
    const double exact = 1 / std::sqrt(static_cast<double>(x));
    float estimate = static_cast<float>(exact * (1 - most));
    for (; estimate <= exact * (1 + most); estimate = std::nextafter(estimate, 2.0f))
      if (semimoe::root(x, estimate) != std::sqrt(x)) return x;
  }
}

static bool is_right_ratio(float a, float b) { return semimoe::ratio(a, b, 1 / b) == a / b; }

// The number of wrong quotients of the roots of two squared distances of an image with sides up to `side`.
extern "C" std::int64_t wrong_ratios(int side) {
  std::vector<bool> occurs(2 * (side - 1) * (side - 1) + 1);
  for (int x = 0; x < side; ++x)
    for (int y = 0; y < side; ++y) occurs[x * x + y * y] = true;
  std::vector<float> roots;
  for (std::size_t squared = 1; squared < occurs.size(); ++squared)
    if (occurs[squared]) roots.push_back(std::sqrt(static_cast<float>(squared)));
  std::int64_t wrong = 0;
  for (std::size_t b = 0; b < roots.size(); ++b)
    for (std::size_t a = 0; a <= b; ++a) wrong += !is_right_ratio(roots[a], roots[b]);
  return wrong;
}

// The same for random squared distances of up to 31 bits.
extern "C" std::int64_t wrong_random_ratios(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::int64_t wrong = 0;
  for (int i = 0; i < count; ++i) {
    const unsigned largest = std::max(1u, static_cast<unsigned>(random() >> (1 + random() % 24)));
    const unsigned squared = 1 + random() % largest;
    wrong += !is_right_ratio(std::sqrt(static_cast<float>(squared)), std::sqrt(static_cast<float>(largest)));
  }
  return wrong;
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
