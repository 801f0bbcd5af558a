// Vectors of numbers, on which operators act lane by lane: the vector extension of GCC and Clang, with intrinsics of
// the instruction set, or for other compilers the same in standard C++. SEMIMOE_STANDARD_CXX takes that with GCC and
// Clang, too, for tests. Internal linkage, see kernels.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if (defined(__GNUC__) || defined(__clang__)) && !defined(SEMIMOE_STANDARD_CXX)
#define SEMIMOE_VECTOR_EXTENSION
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define SEMIMOE_AVX512
#include <immintrin.h>
#elif defined(__AVX2__)
#define SEMIMOE_AVX2
#include <immintrin.h>
#elif defined(__SSE2__)
#define SEMIMOE_SSE2
#include <emmintrin.h>
#endif
#endif

namespace semimoe {
namespace {

// A comparison gives signed integers of the same size, with all bits set where it is true. A cast to another vector
// keeps the bits.
#ifdef SEMIMOE_VECTOR_EXTENSION

template <class T, int kBytes>
using Vector [[gnu::vector_size(kBytes)]] = T;

// yes where all bits of the mask are set, no where none is.
template <class Mask, class V>
inline V select(Mask mask, V yes, V no) {
  return mask ? yes : no;
}

template <class To, class From>
inline To convert(From x) {
  return __builtin_convertvector(x, To);
}

// Asks for the memory at an address, which need not exist.
inline void prefetch(const void* address) { __builtin_prefetch(address); }

#else

template <class T, int kBytes>
struct Vector {
  static constexpr int kCount = kBytes / sizeof(T);
  using Lane = T;
  using Mask = Vector<std::conditional_t<sizeof(T) == 2, std::int16_t, std::int32_t>, kBytes>;

  T lanes[kCount];

  Vector() = default;
  Vector(T number) {
    for (T& lane : lanes) lane = number;
  }

  T& operator[](int i) { return lanes[i]; }
  const T& operator[](int i) const { return lanes[i]; }

  template <class To>
  explicit operator Vector<To, kBytes>() const {
    Vector<To, kBytes> result;
    std::memcpy(result.lanes, lanes, kBytes);
    return result;
  }

  template <class Result = Vector, class Operation>
  static Result lanewise(const Vector& a, const Vector& b, const Operation& operation) {
    Result result;
    for (int i = 0; i < kCount; ++i) result[i] = operation(a[i], b[i]);
    return result;
  }

#define SEMIMOE_ARITHMETIC(op)                                                            \
  friend Vector operator op(const Vector& a, const Vector& b) {                           \
    return lanewise(a, b, [](T left, T right) { return static_cast<T>(left op right); }); \
  }
#define SEMIMOE_COMPARISON(op)                                                                   \
  friend Mask operator op(const Vector& a, const Vector& b) {                                    \
    return Vector::lanewise<Mask>(a, b, [](T left, T right) { return left op right ? -1 : 0; }); \
  }
  SEMIMOE_ARITHMETIC(+)
  SEMIMOE_ARITHMETIC(-)
  SEMIMOE_ARITHMETIC(*)
  SEMIMOE_ARITHMETIC(/)
  SEMIMOE_ARITHMETIC(&)
  SEMIMOE_ARITHMETIC(|)
  SEMIMOE_ARITHMETIC(<<)
  SEMIMOE_ARITHMETIC(>>)
  SEMIMOE_COMPARISON(<)
  SEMIMOE_COMPARISON(>)
  SEMIMOE_COMPARISON(<=)
  SEMIMOE_COMPARISON(>=)
  SEMIMOE_COMPARISON(==)
  SEMIMOE_COMPARISON(!=)
#undef SEMIMOE_ARITHMETIC
#undef SEMIMOE_COMPARISON

  Vector& operator+=(const Vector& other) { return *this = *this + other; }
  Vector& operator*=(const Vector& other) { return *this = *this * other; }

  friend Vector operator~(const Vector& a) {
    return lanewise(a, a, [](T number, T) { return static_cast<T>(~number); });
  }
};

template <class Mask, class V>
inline V select(const Mask& mask, const V& yes, const V& no) {
  V result;
  for (int i = 0; i < V::kCount; ++i) result[i] = mask[i] ? yes[i] : no[i];
  return result;
}

template <class To, class From>
inline To convert(const From& x) {
  To result;
  for (int i = 0; i < To::kCount; ++i) result[i] = static_cast<typename To::Lane>(x[i]);
  return result;
}

inline void prefetch(const void*) {}

#endif

}  // namespace
}  // namespace semimoe
