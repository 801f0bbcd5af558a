// Compares the CPU's max pooling of every instruction set with its definition, see fuzz.hpp. Built with sanitizers:
// SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
#include "../../csrc/pooling.hpp"

#include <memory>

#include "elements.hpp"

namespace {

// Feature maps of few different values, so that many are equal, with a NaN here and there.
std::vector<float> draw(Random& random, std::int64_t size, bool with_nan) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < size; ++i)
    values.push_back(with_nan && between(random, 0, 9) == 0 ? std::nanf("") : value(between(random, -3, 3)));
  return values;
}

// Memory of exactly the size of `values`, which are `step` elements apart after every `run` of them.
std::unique_ptr<char[]> in_memory(semimoe::Element element, const std::vector<float>& values, std::int64_t run,
                                  std::int64_t step) {
  const std::int64_t size = static_cast<std::int64_t>(values.size());
  const std::int64_t bytes = (element == semimoe::kFloat32 ? 4 : 2) * ((size / run - 1) * step + run);
  auto memory = std::make_unique<char[]>(bytes);
  for (std::int64_t i = 0; i < size; ++i) write(element, memory.get(), i / run * step + i % run, values[i]);
  return memory;
}

void expect(const char* what, double got, double expected) {
  if (got == expected || (std::isnan(got) && std::isnan(expected))) return;
  std::fprintf(stderr, "%s is %.9g, not %.9g\n", what, got, expected);
  std::abort();
}

int check(std::uint64_t seed) {
  Random random(seed);
  const bool large = between(random, 0, 9) == 0;  // enough for threads
  const std::int64_t channels = 16 * between(random, 1, large ? 2 : 5), most = large ? 40 : 8;
  const semimoe::PooledMaps maps{static_cast<semimoe::Element>(between(random, 0, 2)), between(random, 1, 3), channels,
                                 2 * between(random, 1, most), 2 * between(random, 1, most)};
  const std::int64_t step = channels + 16 * between(random, 0, 3),
                     size = maps.batch * maps.height * maps.width * channels;
  const std::vector<float> x = draw(random, size, between(random, 0, 1) == 1), dy = draw(random, size, false),
                           grad = draw(random, size / 4, false);
  const auto x_memory = in_memory(maps.element, x, channels, channels),
             dy_memory = in_memory(maps.element, dy, channels, step),
             grad_memory = in_memory(maps.element, grad, channels, channels);
  std::vector<float> pooled(size / 4), dx = dy;
  for (std::int64_t i = 0; i < size / 4; ++i) {
    const std::int64_t channel = i % channels, column = i / channels % (maps.width / 2),
                       row = i / channels / (maps.width / 2);  // of all images
    std::int64_t best = -1;
    for (const std::int64_t pixel : {0, 1, 2, 3}) {
      const std::int64_t place = ((2 * row + pixel / 2) * maps.width + 2 * column + pixel % 2) * channels + channel;
      if (best < 0 || x[place] > x[best] || std::isnan(x[place])) best = place;
    }
    pooled[i] = x[best];
    dx[best] += grad[i];
  }
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current, "seed %llu, %lld x %lld (of %lld) x %lld x %lld, element %d, %s",
                  static_cast<unsigned long long>(seed), static_cast<long long>(maps.batch),
                  static_cast<long long>(channels), static_cast<long long>(step), static_cast<long long>(maps.height),
                  static_cast<long long>(maps.width), maps.element, kernels->name);
    const auto got = std::make_unique<char[]>(maps.bytes() / 4), got_dx = std::make_unique<char[]>(maps.bytes());
    semimoe::max_pool(kernels->pooling, maps, threads, x_memory.get(), got.get());
    semimoe::max_pool_backward(kernels->pooling, maps, threads, x_memory.get(), grad_memory.get(), dy_memory.get(),
                               step, got_dx.get());
    for (std::int64_t i = 0; i < size / 4; ++i) expect("a largest value", read(maps.element, got.get(), i), pooled[i]);
    for (std::int64_t i = 0; i < size; ++i) expect("a gradient", read(maps.element, got_dx.get(), i), dx[i]);
  }
  return static_cast<int>(maps.batch);
}

}  // namespace
