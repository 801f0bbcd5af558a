// 2 x 2 max pooling of feature maps on the CPU, and the gradient of feature maps that also go elsewhere.
//
// The backward pass finds the largest values again, so no indices are kept, and writes the sum of both gradients at
// once.
#pragma once

#include <algorithm>

#include "batch_norm_kernels.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pooling_kernels.hpp"

namespace semimoe {

// Feature maps (batch, height, width, channels): height and width are even, channels a multiple of kMostLanes.
class PooledMaps {
 public:
  const Element element;
  const std::int64_t batch, channels, height, width;

  std::int64_t bytes() const { return batch * height * row_bytes(channels); }

  // Calls body(i, memory of the row pair i) for all row pairs, on threads.
  template <class Body>
  void each_row_pair(int threads, const Body& body) const {
    constexpr std::int64_t kTogether = 1 << 14;  // elements of the pairs that a thread takes at a time
    const std::int64_t pairs = batch * height / 2, size = 2 * width * channels;
    const std::int64_t together = std::max<std::int64_t>(kTogether / size, 1);
    Workers(threads, pairs * size).each((pairs + together - 1) / together, [&](std::int64_t i) {
      for (std::int64_t pair = i * together; pair < std::min(pairs, (i + 1) * together); ++pair) body(pair);
    });
  }

  // A row pair of memory with `stride` elements from pixel to pixel.
  RowPair rows(std::int64_t pair, const void* memory, std::int64_t stride) const {
    const char* upper = static_cast<const char*>(memory) + 2 * pair * row_bytes(stride);
    return {upper, upper + row_bytes(stride), stride};
  }

  std::int64_t row_bytes(std::int64_t stride) const { return width * stride * (element == kFloat32 ? 4 : 2); }
};

inline void max_pool(const PoolingKernels* kernels, const PooledMaps& maps, int threads, const void* x, void* pooled) {
  const std::int64_t channels = maps.channels;
  maps.each_row_pair(threads, [&](std::int64_t pair) {
    void* result = static_cast<char*>(pooled) + pair * maps.row_bytes(channels) / 2;
    kernels[maps.element].pool(maps.rows(pair, x, channels), maps.width / 2, channels, result);
  });
}

// dx = dy + the gradient of the pooling. dy: dy_stride elements from pixel to pixel.
inline void max_pool_backward(const PoolingKernels* kernels, const PooledMaps& maps, int threads, const void* x,
                              const void* grad_pooled, const void* dy, std::int64_t dy_stride, void* dx) {
  const std::int64_t channels = maps.channels, row = maps.row_bytes(channels);
  prefer_large_pages(dx, maps.bytes());
  maps.each_row_pair(threads, [&](std::int64_t pair) {
    char* upper = static_cast<char*>(dx) + 2 * pair * row;
    kernels[maps.element].differentiate(maps.rows(pair, x, channels), maps.rows(pair, dy, dy_stride),
                                        static_cast<const char*>(grad_pooled) + pair * row / 2, maps.width / 2,
                                        channels, upper, upper + row);
  });
}

}  // namespace semimoe
