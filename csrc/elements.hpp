// Vectors of floats from and to memory in float32, bfloat16 and float16. Internal linkage, see kernels.cpp.
#pragma once

#include "floats.hpp"

namespace semimoe {
namespace {

struct Bfloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

using Halves = Vector<std::uint16_t, kVectorBytes / 2>;

inline Bits load_halves(const void* address) {
  Halves halves;
  std::memcpy(&halves, address, sizeof halves);
  return convert<Bits>(halves);
}

inline void store_halves(void* address, Bits bits) {
  const Halves halves = convert<Halves>(bits);
  std::memcpy(address, &halves, sizeof halves);
}

constexpr std::uint32_t kInfinity = 0x7f800000u;  // the bits of a float32

inline Floats load(const Bfloat16* address) { return (Floats)(load_halves(address) << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
inline void store(Bfloat16* address, Floats x) {
  const Bits bits = (Bits)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  store_halves(address, select(x != x, bits | 0x400000u, rounded) >> 16);
}

// A product with 2^112 moves the exponent from the place of float16, so that subnormal numbers are exact too.
inline Floats load(const Float16* address) {
  const Bits half = load_halves(address), magnitude = (half & 0x7fffu) << 13;
  const Bits finite = (Bits)((Floats)magnitude * 0x1p112f);
  return (Floats)(select(magnitude >= 0x7c00u << 13, magnitude | kInfinity, finite) | (half & 0x8000u) << 16);
}

// Rounds to nearest, ties to even; a NaN stays one. Below 2^-14, adding 0.5 rounds to multiples of 2^-24, which float16
// has there. Otherwise the exponent is moved by 112 and the lowest 13 bits are rounded away.
inline void store(Float16* address, Floats x) {
  const Bits magnitude = (Bits)x & ~kSign;
  const Bits small = (Bits)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const Bits large = select(magnitude > kInfinity, Bits{} + 0x7e00u, Bits{} + 0x7c00u);
  const Bits half = select(magnitude < 0x38800000u, small, select(magnitude < 0x47800000u, normal, large));
  store_halves(address, half | ((Bits)x & kSign) >> 16);
}

// Half vectors are not worth streaming.
template <class T>
inline void stream(T* address, Floats x) {
  store(address, x);
}

}  // namespace
}  // namespace semimoe
