// Numbers that every element type of feature maps holds exactly, and NaN, to and from memory.
#pragma once

#include <cmath>
#include <cstring>

#include "../../csrc/batch_norm_kernels.hpp"
#include "fuzz.hpp"

namespace {

// Small integers divided by 16 are exact in every element type.
constexpr int kMost = 40;

float value(int sixteenths) { return static_cast<float>(sixteenths) / 16; }

// The bits of value(sixteenths) in an element type: of a float32 rounded down, or its exponent moved for float16.
void write(semimoe::Element element, void* memory, std::int64_t i, float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const std::uint32_t moved = std::isnan(x)    ? 0x7e00u
                              : bits << 1 == 0 ? 0
                                               : ((bits & 0x7fffffffu) - (112u << 23)) >> 13;
  const std::uint16_t half =
      static_cast<std::uint16_t>(element == semimoe::kBfloat16 ? bits >> 16 : (bits >> 31 << 15) | moved);
  if (element == semimoe::kFloat32)
    static_cast<float*>(memory)[i] = x;
  else
    static_cast<std::uint16_t*>(memory)[i] = half;
}

double read(semimoe::Element element, const void* memory, std::int64_t i) {
  if (element == semimoe::kFloat32) return static_cast<const float*>(memory)[i];
  const std::uint32_t half = static_cast<const std::uint16_t*>(memory)[i];
  if (element == semimoe::kBfloat16) {
    const std::uint32_t bits = half << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = static_cast<int>(half >> 10 & 31), fraction = static_cast<int>(half & 1023);
  if (exponent == 31) return fraction == 0 ? HUGE_VAL : std::nan("");
  const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}

}  // namespace
