// The distance targets on a GPU, as three phases. In each, one thread computes one column or one pixel, in any order;
// a phase starts when the one before has ended everywhere. A compiler for the CPU can run them too, thread by thread.
#pragma once

#include <algorithm>

#include "pixel.hpp"

namespace semimoe {

// Pointers may be null where no phase that runs uses them.
struct Problem {
  const std::uint8_t* mask;  // (batch, height, width), any non-zero value is foreground
  std::int64_t batch;
  int height;
  int width;
  Gap* gaps;              // (batch, height, width)
  std::int32_t* squared;  // (batch, height, width)
  std::int32_t* deepest;  // (batch, 2): largest squared distance outside and inside
  std::int32_t squared_ring_radius;
  float* sdf;              // (batch, height, width)
  std::uint8_t* boundary;  // (batch, height, width)

  SEMIMOE_HOST_DEVICE std::int64_t columns() const { return batch * width; }
  SEMIMOE_HOST_DEVICE std::int64_t pixels() const { return columns() * height; }
};

SEMIMOE_HOST_DEVICE inline void raise_to(std::int32_t* shared, std::int32_t value) {
#ifdef __CUDA_ARCH__
  // It only ever grows, so a stale reading costs an atomic, not the result.
  if (*static_cast<volatile std::int32_t*>(shared) < value) atomicMax(shared, value);
#else
  *shared = std::max(*shared, value);
#endif
}

// Phase 1, for each column: gaps, down the image, then up.
SEMIMOE_HOST_DEVICE inline void column_phase(const Problem& problem, std::int64_t column) {
  const std::int64_t image = column / problem.width;
  const std::int64_t x = column % problem.width;
  if (problem.deepest && x == 0) problem.deepest[2 * image] = problem.deepest[2 * image + 1] = 0;

  const std::int64_t top = image * problem.height * problem.width + x;
  const std::int64_t step = problem.width;
  const std::int64_t bottom = top + (problem.height - 1) * step;
  problem.gaps[top] = kNoGap;
  for (std::int64_t i = top + step; i <= bottom; i += step)
    problem.gaps[i] = next_gap(problem.gaps[i - step], (problem.mask[i] != 0) == (problem.mask[i - step] != 0));
  for (std::int64_t i = bottom - step; i >= top; i -= step) {
    const Gap upward = next_gap(problem.gaps[i + step], (problem.mask[i] != 0) == (problem.mask[i + step] != 0));
    if (upward < problem.gaps[i]) problem.gaps[i] = upward;
  }
}

// Phase 2, for each pixel: search outwards in its row, until the horizontal distance alone is too long. The first pixel
// of the opposite class, whose own gap counts as 0, ends the search on both sides: nothing beyond can be nearer.
SEMIMOE_HOST_DEVICE inline void row_phase(const Problem& problem, std::int64_t pixel) {
  const int x = static_cast<int>(pixel % problem.width);
  const std::uint8_t* mask = problem.mask + (pixel - x);
  const Gap* gaps = problem.gaps + (pixel - x);
  const bool foreground = mask[x] != 0;

  std::int32_t best = gaps[x] == kNoGap ? INT32_MAX : static_cast<std::int32_t>(gaps[x]) * gaps[x];
  const int farthest = x > problem.width - 1 - x ? x : problem.width - 1 - x;
  for (int k = 1; k <= farthest && k * k < best; ++k) {
    for (const int other : {x - k, x + k}) {
      if (other < 0 || other >= problem.width) continue;
      const std::int32_t gap = (mask[other] != 0) == foreground ? gaps[other] : 0;
      if (gap == kNoGap) continue;
      const std::int32_t distance = k * k + gap * gap;
      if (distance < best) best = distance;
    }
  }
  problem.squared[pixel] = best == INT32_MAX ? kNoDistance : best;  // 2^31 - 1 is not a sum of two squares
  if (problem.deepest) {
    const std::int64_t image = pixel / problem.width / problem.height;
    raise_to(problem.deepest + 2 * image + foreground, problem.squared[pixel]);
  }
}

// Phase 3, for each pixel: signed distance and ring.
SEMIMOE_HOST_DEVICE inline void target_phase(const Problem& problem, std::int64_t pixel) {
  const bool foreground = problem.mask[pixel] != 0;
  const std::int32_t squared = problem.squared[pixel];
  const std::int32_t deepest = problem.deepest[2 * (pixel / problem.width / problem.height) + foreground];
  problem.sdf[pixel] = signed_distance(squared, foreground, sqrtf(static_cast<float>(deepest)));
  problem.boundary[pixel] = on_ring(squared, foreground, problem.squared_ring_radius);
}

}  // namespace semimoe
