// See pooling_kernels.hpp. Compiled once per instruction set, like kernels.cpp and under its rules: internal linkage,
// no function of the standard library.
#include "pooling_kernels.hpp"

#include "batch_norm_kernels.hpp"
#include "elements.hpp"

namespace semimoe {
namespace SEMIMOE_SIMD {
namespace {

// 2 x 2 pixels of a row pair: upper left, upper right, lower left, lower right.
template <class T>
struct Window {
  const T* pixels[4];
  std::int64_t stride;

  explicit Window(const RowPair& rows) : stride(rows.stride) {
    const T *upper = static_cast<const T*>(rows.upper), *lower = static_cast<const T*>(rows.lower);
    pixels[0] = upper, pixels[1] = upper + stride, pixels[2] = lower, pixels[3] = lower + stride;
  }

  // Loads a vector of channels of pixel i, and asks for the ones `kAhead` pixels after it; with narrow vectors the
  // processor alone does not read far enough ahead.
  Floats at(int i, std::int64_t channel) const {
    constexpr int kAhead = 8;
    prefetch(pixels[i] + channel + kAhead * stride);
    return load(pixels[i] + channel);
  }

  void advance() {
    for (const T*& pixel : pixels) pixel += 2 * stride;
  }
};

// The largest of four values, and which one it is: all bits of wins[i] are set if value i + 1 is larger than those
// before.
struct Largest {
  Floats value;
  Integers wins[3];

  template <class T>
  Largest(const Window<T>& x, std::int64_t channel) : value(x.at(0, channel)) {
    for (int i = 0; i < 3; ++i) {
      const Floats next = x.at(i + 1, channel);
      wins[i] = (next > value) | (next != next);
      value = select(wins[i], next, value);
    }
  }
};

template <class T>
void pool(const RowPair& rows, std::int64_t pixels, std::int64_t channels, void* pooled) {
  T* result = static_cast<T*>(pooled);
  for (Window<T> x(rows); pixels > 0; --pixels, x.advance())
    for (std::int64_t c = 0; c < channels; c += kFloatLanes, result += kFloatLanes) store(result, Largest(x, c).value);
}

// x where all bits are set, else 0: without a comparison of the bits, which GCC adds to a selection.
inline Floats where(Integers bits, Floats x) { return (Floats)((Integers)x & bits); }

template <class T>
void differentiate(const RowPair& rows, const RowPair& grad_rows, const void* grad_pooled, std::int64_t pixels,
                   std::int64_t channels, void* dx_upper, void* dx_lower) {
  const T* grad = static_cast<const T*>(grad_pooled);
  T *upper = static_cast<T*>(dx_upper), *lower = static_cast<T*>(dx_lower);
  Window<T> x(rows), dy(grad_rows);
  for (; pixels > 0; --pixels, x.advance(), dy.advance(), upper += 2 * channels, lower += 2 * channels)
    for (std::int64_t c = 0; c < channels; c += kFloatLanes, grad += kFloatLanes) {
      const auto [second, third, fourth] = Largest(x, c).wins;
      const Floats g = load(grad);
      store(upper + c, dy.at(0, c) + where(~(second | third | fourth), g));
      store(upper + channels + c, dy.at(1, c) + where(second & ~(third | fourth), g));
      store(lower + c, dy.at(2, c) + where(third & ~fourth, g));
      store(lower + channels + c, dy.at(3, c) + where(fourth, g));
    }
}

template <class T>
constexpr PoolingKernels kKernels = {pool<T>, differentiate<T>};

}  // namespace

extern const PoolingKernels pooling_kernels[kElements];
const PoolingKernels pooling_kernels[kElements] = {kKernels<float>, kKernels<Bfloat16>, kKernels<Float16>};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
