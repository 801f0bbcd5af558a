// See objective_kernels.hpp. Compiled once per instruction set, like kernels.cpp and under its rules: internal linkage,
// no function of the standard library.
#include "objective_kernels.hpp"

#include "floats.hpp"

namespace semimoe {
namespace SEMIMOE_SIMD {
namespace {

static_assert(kMostLanes % kFloatLanes == 0);

// --------------------------------------------------------------------------------------------------------------- dice

// kClasses: the number of classes at compile time, or 0 for any number. With two, everything stays in registers.
template <int kClasses>
using PerClass = Floats[kClasses == 0 ? kMostClasses : kClasses];

template <int kClasses>
inline int count_classes(const DiceBlock& block) {
  return kClasses == 0 ? block.classes : kClasses;
}

// P = softmax(logits) of the pixels at i. A NaN or inf among the logits of a pixel makes its P NaN, as in PyTorch.
template <int kClasses>
inline void softmax(const DiceBlock& block, int i, PerClass<kClasses>& p) {
  const int classes = count_classes<kClasses>(block);
  const auto logits = [&](int k) { return load(block.logits + k * block.stride + i); };
  Floats largest = logits(0);
  for (int k = 1; k < classes; ++k) largest = select(logits(k) > largest, logits(k), largest);
  if (kClasses == 2) {
    const Floats difference = logits(1) - logits(0), power = exp_of_negative(minus_absolute(difference));
    // 0 * inf is NaN: the difference alone would not show an infinite logit.
    const Floats likelier = reciprocal(1.0f + power) + 0.0f * largest, other = likelier * power;
    p[0] = select(difference > 0.0f, other, likelier);
    p[1] = select(difference > 0.0f, likelier, other);
    return;
  }
  Floats sum = {};
  for (int k = 0; k < classes; ++k) sum += p[k] = exp_of_negative(logits(k) - largest);
  const Floats factor = reciprocal(sum);
  for (int k = 0; k < classes; ++k) p[k] *= factor;
}

template <int kClasses, bool kSquared>
void sum_dice(const DiceBlock& block, double* overlap, double* mass) {
  const int classes = count_classes<kClasses>(block);
  PerClass<kClasses> p, overlaps, masses;
  for (int k = 0; k < classes; ++k) overlaps[k] = masses[k] = Floats{};
  const auto add = [&](int i, Integers counts) {
    softmax<kClasses>(block, i, p);
    const Integers target = select(counts, load(block.target + i), Integers{} - 1);
    for (int k = 0; k < classes; ++k) {
      overlaps[k] += select(target == k, p[k], Floats{});
      masses[k] += select(counts, kSquared ? p[k] * p[k] : p[k], Floats{});
      masses[k] += select(target == k, Floats{} + 1.0f, Floats{});
    }
  };
  const int whole = block.pixels / kFloatLanes * kFloatLanes;
  for (int i = 0; i < whole; i += kFloatLanes) add(i, Integers{} - 1);
  if (whole < block.pixels) add(whole, lane_numbers() < block.pixels - whole);
  for (int k = 0; k < classes; ++k) {
    overlap[k] = total(overlaps[k]);
    mass[k] = total(masses[k]);
  }
}

template <int kClasses, bool kSquared>
void differentiate_dice(const DiceBlock& block, const float* alpha, const float* beta, float scale, float* gradient,
                        std::int64_t gradient_stride) {
  const int classes = count_classes<kClasses>(block);
  PerClass<kClasses> p, g;
  for (int i = 0; i < block.pixels; i += kFloatLanes) {
    softmax<kClasses>(block, i, p);
    const Integers target = load(block.target + i);
    Floats mean = {};  // sum of P g
    for (int k = 0; k < classes; ++k) {
      const float a = scale * alpha[k], b = scale * beta[k];
      g[k] = select(target == k, Floats{} + a, Floats{}) + (kSquared ? b * p[k] : Floats{} + b);
      mean += p[k] * g[k];
    }
    for (int k = 0; k < classes; ++k) store(gradient + k * gradient_stride + i, p[k] * (g[k] - mean));
  }
}

void dice_sums(const DiceBlock& block, bool squared, double* overlap, double* mass) {
  const bool two = block.classes == 2;
  const auto sum =
      squared ? (two ? sum_dice<2, true> : sum_dice<0, true>) : (two ? sum_dice<2, false> : sum_dice<0, false>);
  sum(block, overlap, mass);
}

void dice_gradient(const DiceBlock& block, bool squared, const float* alpha, const float* beta, float scale,
                   float* gradient, std::int64_t gradient_stride) {
  const bool two = block.classes == 2;
  const auto differentiate = squared ? (two ? differentiate_dice<2, true> : differentiate_dice<0, true>)
                                     : (two ? differentiate_dice<2, false> : differentiate_dice<0, false>);
  differentiate(block, alpha, beta, scale, gradient, gradient_stride);
}

// --------------------------------------------------------------------------------------------------------------- tanh

struct Tanh {
  Floats value;
  Floats slope;  // the derivative, without cancellation at large |x|
};

inline Tanh tanh_of(Floats x) {
  const Floats e = exp_of_negative(2.0f * minus_absolute(x));
  const Floats share = reciprocal(1.0f + e);
  return {with_sign_of(x, (1.0f - e) * share), 4.0f * e * share * share};
}

double tanh_error(const float* raw, const float* sdf, int pixels) {
  Floats sum = {};
  for (int i = 0; i < pixels; i += kFloatLanes) {
    const Floats difference = tanh_of(load(raw + i)).value - load(sdf + i);
    sum += difference * difference;
  }
  return total(sum);
}

void tanh_gradient(const float* raw, const float* sdf, int pixels, float scale, float* gradient) {
  for (int i = 0; i < pixels; i += kFloatLanes) {
    const Tanh tanh = tanh_of(load(raw + i));
    store(gradient + i, scale * (tanh.value - load(sdf + i)) * tanh.slope);
  }
}

}  // namespace

extern const ObjectiveKernels objective_kernels;
const ObjectiveKernels objective_kernels = {dice_sums, dice_gradient, tanh_error, tanh_gradient};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
