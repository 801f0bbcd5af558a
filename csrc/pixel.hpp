// The arithmetic of one pixel, shared by the CPU and the CUDA code. Functions are `static` as kernels.cpp requires.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#define SEMIMOE_HOST_DEVICE __host__ __device__
#else
#define SEMIMOE_HOST_DEVICE
#endif

namespace semimoe {

// A gap is the distance to the nearest pixel of the opposite class in the same column.
using Gap = std::uint16_t;
constexpr Gap kNoGap = UINT16_MAX;  // the column has only one class

// The squared distance of a pixel whose image has no pixel of the opposite class.
constexpr std::int32_t kNoDistance = -1;

// The largest squared distance inside and outside the foreground.
struct Deepest {
  std::int32_t inside = 0;
  std::int32_t outside = 0;

  SEMIMOE_HOST_DEVICE void include(const Deepest& other) {
    inside = inside > other.inside ? inside : other.inside;
    outside = outside > other.outside ? outside : other.outside;
  }

  SEMIMOE_HOST_DEVICE void include(std::int32_t squared, bool foreground) {
    include(foreground ? Deepest{squared, 0} : Deepest{0, squared});
  }
};

// Refuses sizes for which a squared distance, or a sum of the algorithms, may exceed 32 bits.
inline void check_size(std::int64_t batch, std::int64_t height, std::int64_t width) {
  constexpr std::int64_t kMaxSide = 46340;  // floor(sqrt(2^31))
  if (batch < 0 || height < 0 || width < 0) throw std::invalid_argument("a mask cannot have a negative size");
  const bool sides_fit = height <= kMaxSide && width <= kMaxSide;
  if (!sides_fit || (height - 1) * (height - 1) + (width - 1) * (width - 1) > INT32_MAX)
    throw std::invalid_argument(
        "a mask of " + std::to_string(height) + " x " + std::to_string(width) +
        " pixels is too large: squared distances fit into 32 bits up to a side or diagonal of " +
        std::to_string(kMaxSide) + " pixels; cut it into tiles");
}

// Correctly rounded float32 square root, also under nvcc's fast-math options, so that results are bitwise equal on
// every CPU and GPU.
SEMIMOE_HOST_DEVICE static inline float square_root(std::int32_t squared) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(static_cast<float>(squared));
#else
  return sqrtf(static_cast<float>(squared));
#endif
}

}  // namespace semimoe
