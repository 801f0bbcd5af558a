// A table of the inner loops of the objective, on blocks of pixels. csrc/objective_kernels.cpp is compiled once for
// each instruction set, like csrc/kernels.cpp, whose table points to this one.
#pragma once

#include <cstdint>

namespace semimoe {

constexpr int kMostClasses = 255;  // a target is a byte, and one value means no class
constexpr int kMostLanes = 16;     // the most floats in a vector of any instruction set

// All arrays hold a multiple of kMostLanes pixels; the kernels ignore those from `pixels` on.
struct DiceBlock {
  const float* logits;  // (classes, pixels); `stride` floats from class to class
  std::int64_t stride;
  const std::uint8_t* target;
  int classes;
  int pixels;
};

struct ObjectiveKernels {
  // For each class: overlap = sum P T, and mass = sum P^2 + T if squared, else sum P + T.
  void (*dice_sums)(const DiceBlock& block, bool squared, double* overlap, double* mass);

  // dL/dlogits for dL/dP = scale (alpha T + beta P) if squared, else scale (alpha T + beta); gradient_stride floats
  // from class to class.
  void (*dice_gradient)(const DiceBlock& block, bool squared, const float* alpha, const float* beta, float scale,
                        float* gradient, std::int64_t gradient_stride);

  // tanh_error: the sum of (tanh(raw) - sdf)^2; ignored pixels must be 0. tanh_gradient: scale / 2 times its gradient.
  double (*tanh_error)(const float* raw, const float* sdf, int pixels);
  void (*tanh_gradient)(const float* raw, const float* sdf, int pixels, float scale, float* gradient);
};

}  // namespace semimoe
