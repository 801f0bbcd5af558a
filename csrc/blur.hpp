// Symmetric separable blur of images in place, mirrored at the borders, on the CPU.
//
// Each row of a plane is the sum of rows into a buffer, which stays in the L1 cache, and the sum of shifts of the
// buffer back into the plane. The rows above are blurred by then, so the last ones are kept as they were.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "blur_kernels.hpp"
#include "parallel.hpp"

namespace semimoe {

// The index that stands for i, which is outside 0 ... count - 1 by less than count: the border mirrors the inside.
inline std::int64_t mirrored(std::int64_t i, std::int64_t count) {
  return i < 0 ? -i : i < count ? i : 2 * (count - 1) - i;
}

// weights: at the distances 0 to radius, which is less than both sides.
inline void blur_plane(const BlurKernels& kernels, const float* weights, std::int64_t radius, std::int64_t height,
                       std::int64_t width, float* plane) {
  const std::int64_t most_kept = radius + 1;
  std::vector<float> kept(most_kept * width), buffer(width + 2 * radius);
  std::vector<const float*> rows(2 * radius + 1), shifts(2 * radius + 1);
  float* const middle = &buffer[radius];
  for (std::int64_t d = -radius; d <= radius; ++d) shifts[radius + d] = middle + d;
  for (std::int64_t y = 0; y < height; ++y) {
    float* const row = plane + y * width;
    for (std::int64_t d = -radius; d <= radius; ++d) {
      const std::int64_t source = mirrored(y + d, height);
      rows[radius + d] = source < y ? &kept[source % most_kept * width] : plane + source * width;
    }
    kernels.symmetric_sum(&rows[radius], weights, radius, width, middle);
    for (std::int64_t d = 1; d <= radius; ++d) middle[-d] = middle[d], middle[width - 1 + d] = middle[width - 1 - d];
    std::copy_n(row, width, &kept[y % most_kept * width]);
    kernels.symmetric_sum(&shifts[radius], weights, radius, width, row);
  }
}

// images: (batch, channels, height, width); weights: (batch, radius + 1).
inline void blur(const BlurKernels& kernels, int threads, const float* weights, std::int64_t radius, std::int64_t batch,
                 std::int64_t channels, std::int64_t height, std::int64_t width, float* images) {
  const std::int64_t pixels = height * width;
  Workers(threads, batch * channels * pixels).each(batch * channels, [&](std::int64_t plane) {
    blur_plane(kernels, weights + plane / channels * (radius + 1), radius, height, width, images + plane * pixels);
  });
}

}  // namespace semimoe
