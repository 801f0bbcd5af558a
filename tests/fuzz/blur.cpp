// Compares the CPU's blur of every instruction set with the definition in double, see fuzz.hpp. Built with sanitizers:
// SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
#include "../../csrc/blur.hpp"

#include <cmath>
#include <limits>
#include <memory>

#include "fuzz.hpp"

namespace {

constexpr float kMost = 255;

struct Case {
  std::int64_t batch, channels, height, width, radius;
  std::vector<float> weights, images;  // (batch, radius + 1), (batch, channels, height, width)
};

Case draw_case(Random& random) {
  const bool large = between(random, 0, 9) == 0;  // enough pixels for threads
  const int least = large ? 110 : 1, most = large ? 140 : 90;
  const int height = between(random, least, most), width = between(random, least, most);
  const int radius = between(random, 0, std::min({height, width, 16}) - 1);
  Case drawn{between(random, 1, 3), large ? 4 : between(random, 1, 3), height, width, radius, {}, {}};
  std::uniform_real_distribution<float> share(0, 1);
  for (std::int64_t image = 0; image < drawn.batch; ++image) {
    float sum = 0;
    for (int d = 0; d <= radius; ++d) {
      drawn.weights.push_back(share(random) + 0.01f);
      sum += (d == 0 ? 1 : 2) * drawn.weights.back();
    }
    for (int d = 0; d <= radius; ++d) drawn.weights[image * (radius + 1) + d] /= sum;
  }
  const bool with_nan = between(random, 0, 4) == 0;
  for (std::int64_t i = 0; i < drawn.batch * drawn.channels * height * width; ++i)
    drawn.images.push_back(with_nan && between(random, 0, 999) == 0 ? std::numeric_limits<float>::quiet_NaN()
                                                                    : kMost * share(random));
  return drawn;
}

// Sums along `length` values that are `step` apart, of all lines of a plane.
std::vector<double> sums(const std::vector<double>& plane, const float* weights, std::int64_t radius,
                         std::int64_t length, std::int64_t step) {
  std::vector<double> result(plane.size());
  for (std::size_t i = 0; i < plane.size(); ++i) {
    const std::int64_t here = static_cast<std::int64_t>(i) / step % length;
    for (std::int64_t d = -radius; d <= radius; ++d) {
      const std::int64_t before_mirror = std::abs(here + d);
      const std::int64_t there = length - 1 - std::abs(length - 1 - before_mirror);
      result[i] += weights[std::abs(d)] * plane[i + (there - here) * step];
    }
  }
  return result;
}

std::vector<double> expected_images(const Case& drawn) {
  const std::int64_t pixels = drawn.height * drawn.width;
  std::vector<double> result;
  for (std::int64_t plane = 0; plane < drawn.batch * drawn.channels; ++plane) {
    const float* weights = &drawn.weights[plane / drawn.channels * (drawn.radius + 1)];
    const auto first = drawn.images.begin() + plane * pixels;
    const std::vector<double> columns = sums({first, first + pixels}, weights, drawn.radius, drawn.height, drawn.width);
    const std::vector<double> both = sums(columns, weights, drawn.radius, drawn.width, 1);
    result.insert(result.end(), both.begin(), both.end());
  }
  return result;
}

int check(std::uint64_t seed) {
  Random random(seed);
  const Case drawn = draw_case(random);
  const std::vector<double> expected = expected_images(drawn);
  // In both passes, radius + 3 roundings of at most kMost each.
  const double tolerance = 2 * static_cast<double>(drawn.radius + 3) * kMost * std::ldexp(1, -24);
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current, "seed %llu, %lld x %lld x %lld x %lld, radius %lld, threads %d, %s",
                  static_cast<unsigned long long>(seed), static_cast<long long>(drawn.batch),
                  static_cast<long long>(drawn.channels), static_cast<long long>(drawn.height),
                  static_cast<long long>(drawn.width), static_cast<long long>(drawn.radius), threads, kernels->name);
    const auto images = std::make_unique<float[]>(expected.size());  // memory of exactly their size
    std::copy(drawn.images.begin(), drawn.images.end(), images.get());
    semimoe::blur(*kernels->blur, threads, drawn.weights.data(), drawn.radius, drawn.batch, drawn.channels,
                  drawn.height, drawn.width, images.get());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (std::isnan(expected[i]) ? std::isnan(images[i]) : std::abs(images[i] - expected[i]) <= tolerance) continue;
      std::fprintf(stderr, "value %zu is %.9g, not %.9g\n", i, images[i], expected[i]);
      std::abort();
    }
  }
  return static_cast<int>(drawn.batch);
}

}  // namespace
