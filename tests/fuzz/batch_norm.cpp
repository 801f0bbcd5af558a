// Compares the CPU's batch normalization of every instruction set with the definition in double, see fuzz.hpp. Built
// with sanitizers: SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
#include "../../csrc/batch_norm.hpp"

#include <memory>

#include "elements.hpp"

namespace {

constexpr double kEps = 1e-5;

void compare(const char* what, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance) return;
  std::fprintf(stderr, "%s is %.9g, not %.9g\n", what, got, expected);
  std::abort();
}

struct Case {
  semimoe::FeatureMaps maps;
  std::vector<float> x, dy;  // as they are in memory
  std::vector<float> weight, bias;

  std::int64_t at(std::int64_t image, std::int64_t channel, std::int64_t pixel) const {
    return maps.channels_last ? (image * maps.pixels + pixel) * maps.channels + channel
                              : (image * maps.channels + channel) * maps.pixels + pixel;
  }
};

Case draw_case(Random& random) {
  const int groups = between(random, 1, 3), images = between(random, 1, 2);
  const bool large = between(random, 0, 9) == 0;
  const bool joins = !large && between(random, 0, 1) == 1;  // y and dy are channels of a concatenation
  const int channels = large   ? between(random, 1, 3)
                       : joins ? 16 * between(random, 1, 9)
                               : (between(random, 0, 9) ? between(random, 1, 70) : 600);
  const int pixels = large ? between(random, 60000, 140000) / channels : between(random, 2, 300);
  const semimoe::FeatureMaps maps(static_cast<semimoe::Element>(between(random, 0, 2)),
                                  joins || between(random, 0, 1) == 1, groups * images, channels, pixels, groups,
                                  channels + (joins ? 16 * between(random, 1, 5) : 0));
  Case drawn{maps, {}, {}, {}, {}};
  for (std::int64_t i = 0; i < groups * images * std::int64_t{channels} * pixels; ++i) {
    drawn.x.push_back(value(between(random, -kMost, kMost)));
    drawn.dy.push_back(value(between(random, -kMost, kMost)));
  }
  for (int c = 0; c < channels; ++c) {
    drawn.weight.push_back(value(between(random, 4, 24)));
    drawn.bias.push_back(value(between(random, -12, 12)) + 0.01f);
  }
  return drawn;
}

// Statistics, result and gradients by their definition. Where rounding may decide the sign of z, dy becomes 0.
struct Expected {
  std::vector<double> mean, inverse, y, dx, grad_weight, grad_bias;

  explicit Expected(Case& drawn) : y(drawn.x.size()), dx(drawn.x.size()) {
    const semimoe::FeatureMaps& maps = drawn.maps;
    grad_weight.resize(maps.channels), grad_bias.resize(maps.channels);
    for (std::int64_t group = 0; group < maps.groups; ++group)
      for (std::int64_t c = 0; c < maps.channels; ++c) {
        const double n = static_cast<double>(maps.values), weight = drawn.weight[c], bias = drawn.bias[c];
        const auto for_each = [&](const auto& body) {
          for (std::int64_t image = group * maps.images; image < (group + 1) * maps.images; ++image)
            for (std::int64_t pixel = 0; pixel < maps.pixels; ++pixel) body(drawn.at(image, c, pixel));
        };
        double sum = 0, squares = 0, sum_dz = 0, product = 0;
        for_each([&](std::int64_t i) { sum += drawn.x[i]; });
        const double average = sum / n;
        for_each([&](std::int64_t i) { squares += (drawn.x[i] - average) * (drawn.x[i] - average); });
        const double scale = 1 / std::sqrt(squares / n + kEps);
        mean.push_back(average), inverse.push_back(scale);
        for_each([&](std::int64_t i) {
          const double xhat = (drawn.x[i] - average) * scale, z = weight * xhat + bias;
          if (std::abs(z) < 1e-4 * (1 + std::abs(xhat))) drawn.dy[i] = 0;
          y[i] = std::max(z, 0.0);
          sum_dz += z > 0 ? drawn.dy[i] : 0;
          product += z > 0 ? drawn.dy[i] * xhat : 0;
        });
        for_each([&](std::int64_t i) {
          const double xhat = (drawn.x[i] - average) * scale, dz = weight * xhat + bias > 0 ? drawn.dy[i] : 0;
          dx[i] = weight * scale * (dz - (sum_dz + xhat * product) / n);
        });
        grad_weight[c] += product, grad_bias[c] += sum_dz;
      }
  }
};

int check(std::uint64_t seed) {
  Random random(seed);
  Case drawn = draw_case(random);
  const Expected expected(drawn);
  const semimoe::FeatureMaps& maps = drawn.maps;
  const std::size_t size = drawn.x.size();
  // memory of exactly the size of the tensors
  const auto allocate = [](std::int64_t bytes) { return std::make_unique<char[]>(bytes); };
  const auto x = allocate(maps.bytes()), dy = allocate(maps.joined_bytes()), dx = allocate(maps.bytes());
  for (std::size_t i = 0; i < size; ++i) write(maps.element, x.get(), i, drawn.x[i]);
  for (std::size_t i = 0; i < size; ++i) write(maps.element, dy.get(), maps.joined_place(i), drawn.dy[i]);
  const double unit = std::ldexp(1, maps.element == semimoe::kFloat32    ? -24
                                    : maps.element == semimoe::kBfloat16 ? -8
                                                                         : -11);
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current, "seed %llu, %lld x %lld (of %lld) x %lld%s, %lld groups, element %d, %s",
                  static_cast<unsigned long long>(seed), static_cast<long long>(maps.batch),
                  static_cast<long long>(maps.channels), static_cast<long long>(maps.joined),
                  static_cast<long long>(maps.pixels), maps.channels_last ? " channels-last" : "",
                  static_cast<long long>(maps.groups), maps.element, kernels->name);
    std::vector<float> mean(maps.groups * maps.channels), inverse(mean.size()), grad_weight(maps.channels),
        grad_bias(maps.channels);
    const auto y = allocate(maps.joined_bytes()), again = allocate(maps.joined_bytes());  // filled with zeros
    semimoe::batch_norm_relu_forward(kernels->batch_norm, maps, threads, x.get(), drawn.weight.data(),
                                     drawn.bias.data(), kEps, mean.data(), inverse.data(), y.get());
    const semimoe::Statistics statistics{drawn.weight.data(), drawn.bias.data(), mean.data(), inverse.data()};
    semimoe::batch_norm_relu_backward(kernels->batch_norm, maps, threads, x.get(), dy.get(), statistics, dx.get(),
                                      grad_weight.data(), grad_bias.data());
    // The same statistics give the same bits again.
    semimoe::batch_norm_relu_eval(kernels->batch_norm, maps, threads, x.get(), statistics, again.get());
    compare("the evaluation with these statistics", std::memcmp(again.get(), y.get(), maps.joined_bytes()), 0, 0);
    // Float32 results of numbers up to 2.5; deviations may be as small as sqrt(eps), or as 1/16 of two numbers.
    for (std::size_t i = 0; i < mean.size(); ++i) {
      compare("a mean", mean[i], expected.mean[i], 1e-6);
      compare("an inverse deviation", inverse[i], expected.inverse[i], 1e-5 * expected.inverse[i]);
    }
    for (std::size_t i = 0; i < size; ++i) {
      const std::int64_t c = maps.channels_last ? i % maps.channels : i / maps.pixels % maps.channels;
      const std::int64_t image = i / maps.pixels / maps.channels;
      const double scale = drawn.weight[c] * expected.inverse[image / maps.images * maps.channels + c];
      compare("a result", read(maps.element, y.get(), maps.joined_place(i)), expected.y[i],
              unit * expected.y[i] + 2e-6 * (1 + 5 * scale));
      compare("a gradient", read(maps.element, dx.get(), i), expected.dx[i],
              unit * std::abs(expected.dx[i]) + std::max(2e-5 * scale, std::ldexp(1, -25)));
    }
    for (std::int64_t c = 0; c < maps.channels; ++c) {
      const double count = static_cast<double>(maps.values * maps.groups);
      compare("the gradient of a weight", grad_weight[c], expected.grad_weight[c], 1e-5 * (1 + count));
      compare("the gradient of a bias", grad_bias[c], expected.grad_bias[c], 1e-6 * (1 + count));
    }
  }
  return static_cast<int>(maps.batch);
}

}  // namespace
