// Compares the CPU's objective of every instruction set with the definition in double, see fuzz.hpp. Built with
// sanitizers: SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
#include "../../csrc/objective.hpp"

#include <cmath>
#include <limits>
#include <memory>

#include "fuzz.hpp"

namespace {

// Errors of float32 probabilities and sums, as in tests/ops/test_objective_triton.py. The tolerance of a gradient is
// relative to the largest gradient. If all are tiny (for example, a single pixel with a certain class), they are
// differences of larger numbers, and kRounding times these is the tolerance.
constexpr double kTermTolerance = 2e-6, kGradientTolerance = 5e-6, kRounding = std::numeric_limits<float>::epsilon();

// A tensor in one of three layouts, in memory of exactly its size.
template <class T>
struct Tensor {
  std::unique_ptr<T[]> memory;
  semimoe::Planes<T> planes;

  Tensor(std::int64_t batch, std::int64_t channels, std::int64_t pixels, int layout)
      : memory(new T[batch * channels * pixels]), planes{memory.get(), channels * pixels, pixels, 1} {
    if (layout == 1) planes = {memory.get(), channels * pixels, 1, channels};  // channels last
    if (layout == 2) planes = {memory.get(), 1, batch, channels * batch};      // images last
  }

  semimoe::Planes<const T> input() const { return {memory.get(), planes.image, planes.channel, planes.pixel}; }
};

void compare(const char* what, double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance) return;
  std::fprintf(stderr, "%s is %.9g, not %.9g\n", what, got, expected);
  std::abort();
}

// A dice loss of one set of predictions and its gradient, in double.
struct Dice {
  int classes;
  bool squared;
  std::vector<double> p;         // (batch, classes, pixels)
  std::vector<double> gradient;  // of the loss with respect to the logits, shaped as p
  double loss = 0;
  double canceling = 0;  // the largest operand of the subtraction in a gradient

  Dice(const Tensor<float>& logits, const Tensor<std::uint8_t>& target, std::int64_t batch, int classes,
       std::int64_t pixels, bool squared)
      : classes(classes), squared(squared), p(batch * classes * pixels), gradient(p.size()) {
    const double smooth = squared ? 1 : 1e-8, count = static_cast<double>(batch) * classes;
    for (std::int64_t image = 0; image < batch; ++image) {
      const auto at = [&](int k, std::int64_t i) { return (image * classes + k) * pixels + i; };
      for (std::int64_t i = 0; i < pixels; ++i) {
        double sum = 0;
        for (int k = 0; k < classes; ++k) sum += p[at(k, i)] = std::exp(double{*logits.planes.at(image, k, i)});
        for (int k = 0; k < classes; ++k) p[at(k, i)] /= sum;
      }
      std::vector<double> alpha(classes), beta(classes);
      for (int k = 0; k < classes; ++k) {
        double overlap = 0, mass = 0;
        for (std::int64_t i = 0; i < pixels; ++i) {
          const double t = *target.planes.at(image, 0, i) == k, p_i = p[at(k, i)];
          overlap += p_i * t;
          mass += (squared ? p_i * p_i : p_i) + t;
        }
        const double ratio = (2 * overlap + smooth) / (mass + smooth);
        loss += (1 - ratio) / count;
        alpha[k] = -2 / (count * (mass + smooth));
        beta[k] = (squared ? 2 : 1) * ratio / (count * (mass + smooth));
      }
      for (std::int64_t i = 0; i < pixels; ++i) {
        const auto g = [&](int k) {
          return (*target.planes.at(image, 0, i) == k) * alpha[k] + beta[k] * (squared ? p[at(k, i)] : 1);
        };
        double mean = 0;
        for (int k = 0; k < classes; ++k) mean += p[at(k, i)] * g(k);
        for (int k = 0; k < classes; ++k) {
          gradient[at(k, i)] = p[at(k, i)] * (g(k) - mean);
          canceling = std::max(canceling, p[at(k, i)] * (std::abs(g(k)) + std::abs(mean)));
        }
      }
    }
  }
};

void compare_gradient(const char* what, const Tensor<float>& got, const std::vector<double>& expected,
                      std::int64_t batch, int channels, std::int64_t pixels, double scale, double canceling = 0) {
  double largest = 0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  for (std::int64_t image = 0; image < batch; ++image)
    for (int k = 0; k < channels; ++k)
      for (std::int64_t i = 0; i < pixels; ++i)
        compare(what, *got.planes.at(image, k, i), scale * expected[(image * channels + k) * pixels + i],
                std::abs(scale) * (kGradientTolerance * largest + kRounding * canceling));
}

struct Set {
  Tensor<float> mask, sdf, boundary;
};

struct Case {
  std::int64_t batch, pixels;
  int K, L;  // classes of mask and boundary
  std::vector<Set> logits;
  Tensor<std::uint8_t> mask, boundary;
  Tensor<float> sdf;
  std::vector<Set> gradients;  // random values, to be overwritten
};

Case draw_case(Random& random) {
  const int batch = between(random, 1, 3), sets = between(random, 1, 3);
  const int K = between(random, 1, 5), L = between(random, 0, 9) ? 2 : between(random, 1, 255);
  const std::int64_t pixels =
      between(random, 0, 1) ? between(random, 1, 70) : 1024 * between(random, 0, 3) + between(random, 1, 1024);
  std::normal_distribution<float> normal(0, 3);
  const auto draw = [&](int channels) {
    Tensor<float> tensor(batch, channels, pixels, between(random, 0, 2));
    for (std::int64_t i = 0; i < batch * channels * pixels; ++i) tensor.memory[i] = normal(random);
    return tensor;
  };
  const auto draw_classes = [&](int classes) {
    Tensor<std::uint8_t> tensor(batch, 1, pixels, between(random, 0, 2));
    for (std::int64_t i = 0; i < batch * pixels; ++i)
      tensor.memory[i] = static_cast<std::uint8_t>(between(random, 0, 9) ? between(random, 0, classes - 1) : 255);
    return tensor;
  };
  const auto draw_sets = [&] {
    std::vector<Set> drawn;
    for (int set = 0; set < sets; ++set) drawn.push_back({draw(K), draw(1), draw(L)});
    return drawn;
  };
  return {batch, pixels, K, L, draw_sets(), draw_classes(K), draw_classes(L), draw(1), draw_sets()};
}

// Terms and gradients by their definition.
struct Expected {
  struct Gradients {
    std::vector<double> mask, sdf, boundary;
    double mask_canceling, boundary_canceling;
  };

  double terms[3] = {};
  std::vector<Gradients> gradients;  // by set

  explicit Expected(const Case& drawn) {
    const auto& [batch, pixels, K, L, logits, mask, boundary, sdf, unused] = drawn;
    for (const Set& predicted : logits) {
      const Dice squared(predicted.mask, mask, batch, K, pixels, true);
      const Dice soft(predicted.boundary, boundary, batch, L, pixels, false);
      std::vector<double> sdf_gradient;
      for (std::int64_t image = 0; image < batch; ++image)
        for (std::int64_t i = 0; i < pixels; ++i) {
          const double tanh = std::tanh(double{*predicted.sdf.planes.at(image, 0, i)});
          const double difference = tanh - *sdf.planes.at(image, 0, i), count = static_cast<double>(batch) * pixels;
          terms[1] += difference * difference / count;
          sdf_gradient.push_back(2 * difference * (1 - tanh * tanh) / count);
        }
      terms[0] += squared.loss;
      terms[2] += soft.loss;
      gradients.push_back({squared.gradient, sdf_gradient, soft.gradient, squared.canceling, soft.canceling});
    }
  }
};

int check(std::uint64_t seed) {
  Random random(seed);
  const Case drawn = draw_case(random);
  const Expected expected(drawn);
  const auto& [batch, pixels, K, L, logits, mask, boundary, sdf, gradients] = drawn;
  const float grad_output[] = {1, -2, 0.5};
  semimoe::Objective objective{batch, pixels, K, L, {}, mask.input(), sdf.input(), boundary.input()};
  std::vector<semimoe::Prediction<float>> outputs;
  for (std::size_t set = 0; set < logits.size(); ++set) {
    objective.sets.push_back({logits[set].mask.input(), logits[set].sdf.input(), logits[set].boundary.input()});
    outputs.push_back({gradients[set].mask.planes, gradients[set].sdf.planes, gradients[set].boundary.planes});
  }
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current, "seed %llu, %lld images of %lld pixels, %zu sets, %d and %d classes, %s",
                  static_cast<unsigned long long>(seed), static_cast<long long>(batch), static_cast<long long>(pixels),
                  logits.size(), K, L, kernels->name);
    float terms[3];
    std::vector<float> alpha(batch * objective.columns()), beta(alpha.size());
    semimoe::objective_terms(*kernels->objective, objective, threads, terms, alpha.data(), beta.data());
    for (int i = 0; i < 3; ++i)
      compare("a term", terms[i], expected.terms[i], kTermTolerance * std::max(1.0, expected.terms[i]));
    semimoe::objective_gradients(*kernels->objective, objective, threads, alpha.data(), beta.data(), grad_output,
                                 outputs);
    for (std::size_t set = 0; set < logits.size(); ++set) {
      const Expected::Gradients& wanted = expected.gradients[set];
      compare_gradient("a gradient of the mask", gradients[set].mask, wanted.mask, batch, K, pixels, grad_output[0],
                       wanted.mask_canceling);
      compare_gradient("a gradient of the sdf", gradients[set].sdf, wanted.sdf, batch, 1, pixels, grad_output[1]);
      compare_gradient("a gradient of the boundary", gradients[set].boundary, wanted.boundary, batch, L, pixels,
                       grad_output[2], wanted.boundary_canceling);
    }
  }
  return static_cast<int>(batch);
}

}  // namespace
