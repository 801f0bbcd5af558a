// A vector of floats as wide as the instruction set allows, and its exponential function. Internal linkage, see
// kernels.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.hpp"

namespace semimoe {
namespace {

#if defined(SEMIMOE_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(SEMIMOE_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloatLanes = kVectorBytes / sizeof(float);

using Floats = Vector<float, kVectorBytes>;
using Integers = Vector<std::int32_t, kVectorBytes>;
using Bits = Vector<std::uint32_t, kVectorBytes>;

inline Floats load(const float* address) {
  Floats floats;
  std::memcpy(&floats, address, sizeof floats);
  return floats;
}

inline Integers load(const std::uint8_t* address) {
  std::int32_t numbers[kFloatLanes];
  for (int i = 0; i < kFloatLanes; ++i) numbers[i] = address[i];
  Integers integers;
  std::memcpy(&integers, numbers, sizeof integers);
  return integers;
}

inline void store(float* address, Floats floats) { std::memcpy(address, &floats, sizeof floats); }

// Like store, past the caches, to an address that is a multiple of kVectorBytes. end_streams makes the stores visible
// to other threads.
inline void stream(float* address, Floats floats) {
#if defined(SEMIMOE_AVX512)
  _mm512_stream_ps(address, floats);
#elif defined(SEMIMOE_AVX2)
  _mm256_stream_ps(address, floats);
#elif defined(SEMIMOE_SSE2)
  _mm_stream_ps(address, floats);
#else
  store(address, floats);
#endif
}

inline void end_streams() {
#if defined(SEMIMOE_AVX512) || defined(SEMIMOE_AVX2) || defined(SEMIMOE_SSE2)
  _mm_sfence();
#endif
}

inline Integers lane_numbers() {
  Integers numbers = {};
  for (int i = 0; i < kFloatLanes; ++i) numbers[i] = i;
  return numbers;
}

inline double total(Floats floats) {
  double sum = 0;
  for (int i = 0; i < kFloatLanes; ++i) sum += floats[i];
  return sum;
}

constexpr std::uint32_t kSign = 0x80000000u;

inline Floats minus_absolute(Floats x) { return (Floats)((Bits)x | kSign); }

inline Floats with_sign_of(Floats x, Floats magnitude) { return (Floats)((Bits)magnitude | ((Bits)x & kSign)); }

// 1 / x with a relative error below 2^-23, for x from 1 to 2^100. AVX-512 uses one Newton step, because a division
// would take longer than the rest of the loop.
inline Floats reciprocal(Floats x) {
#ifdef SEMIMOE_AVX512
  const Floats near = _mm512_maskz_rcp14_ps(0xffff, x);  // without the mask, GCC 12 warns
  return near + near * (1.0f - x * near);
#else
  return 1.0f / x;
#endif
}

// exp(x) for x <= 0 with a relative error below 2^-23; 0 if the result is below the least normal number, NaN if x is
// NaN.
//
// x = n ln 2 + r, |r| <= ln 2 / 2. ln 2 is split into two parts; the first one has so few bits that its product with n
// is exact (W. J. Cody and W. Waite, "Software Manual for the Elementary Functions", 1980). exp(r) is a minimax
// polynomial with relative error 3e-9, and n is added to the exponent. Adding 1.5 * 2^23 rounds to an integer and
// leaves it in the lowest bits; kRounder also adds the exponent's bias, 127.
inline Floats exp_of_negative(Floats x) {
  constexpr float kLeast = -87.3365447f;  // ln 2^-126
  constexpr float kPerLn2 = 1.44269504f, kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f, kRounder = 12582912.0f + 127;
  const Floats rounded = x * kPerLn2 + kRounder;
  const Floats n = rounded - kRounder;
  const Floats r = (x - n * kLn2) - n * kLn2Rest;
  Floats power = r * 0x1.6a2432p-10f + 0x1.1239e2p-7f;
  power = power * r + 0x1.5558f2p-5f;
  power = power * r + 0x1.555492p-3f;
  power = power * r + 0x1.fffffcp-2f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  return select(x < kLeast, Floats{}, power * (Floats)((Bits)rounded << 23));
}

}  // namespace
}  // namespace semimoe
