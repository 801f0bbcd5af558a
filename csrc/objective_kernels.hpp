// The inner loops of the objective, on blocks of pixels. csrc/objective_kernels.cpp is compiled once for each
// instruction set, as csrc/kernels.cpp is, whose table points to the one here.
#pragma once

#include <cstdint>

namespace semimoe {

constexpr int kMostClasses = 255;  // a target is a byte, and one value has to belong to no class
constexpr int kMostLanes = 16;     // floats that any instruction set takes at once

// What is read and written holds a multiple of kMostLanes pixels; those from `pixels` on do not count.
struct DiceBlock {
  const float* logits;  // (classes, pixels), a class every `stride` floats
  std::int64_t stride;
  const std::uint8_t* target;
  int classes;
  int pixels;
};

struct ObjectiveKernels {
  // Of every class sum P T, and sum P^2 + T (squared) or sum P + T.
  void (*dice_sums)(const DiceBlock& block, bool squared, double* overlap, double* mass);

  // dL/dlogits for dL/dP = scale (alpha T + beta P), or with beta alone where not squared; a class every
  // `gradient_stride` floats.
  void (*dice_gradient)(const DiceBlock& block, bool squared, const float* alpha, const float* beta, float scale,
                        float* gradient, std::int64_t gradient_stride);

  // The sum of (tanh(raw) - sdf)^2, where pixels that do not count are 0, and scale times half its gradient.
  double (*tanh_error)(const float* raw, const float* sdf, int pixels);
  void (*tanh_gradient)(const float* raw, const float* sdf, int pixels, float scale, float* gradient);
};

}  // namespace semimoe
