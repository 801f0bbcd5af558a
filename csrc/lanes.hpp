// A vector of unsigned 16-bit words, as wide as the instruction set allows: AVX-512, AVX2, SSE2, or else 16 bytes.
// Internal linkage, see kernels.cpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.hpp"

namespace semimoe {
namespace {

using Word = std::uint16_t;

#if defined(SEMIMOE_AVX512)

using Words = __m512i;
inline Words broadcast(Word word) { return _mm512_set1_epi16(static_cast<short>(word)); }
inline Words minimum(Words a, Words b) { return _mm512_min_epu16(a, b); }
inline Words maximum(Words a, Words b) { return _mm512_max_epu16(a, b); }
inline Words add(Words a, Words b) { return _mm512_add_epi16(a, b); }
inline Words subtract(Words a, Words b) { return _mm512_sub_epi16(a, b); }
inline Words add_saturating(Words a, Words b) { return _mm512_adds_epu16(a, b); }
inline bool any_above(Words a, Words b) { return _mm512_cmpgt_epu16_mask(a, b) != 0; }

#elif defined(SEMIMOE_AVX2)

using Words = __m256i;
inline Words broadcast(Word word) { return _mm256_set1_epi16(static_cast<short>(word)); }
inline Words broadcast_pair(std::uint32_t pair) { return _mm256_set1_epi32(static_cast<int>(pair)); }
inline Words minimum(Words a, Words b) { return _mm256_min_epu16(a, b); }
inline Words maximum(Words a, Words b) { return _mm256_max_epu16(a, b); }
inline Words add(Words a, Words b) { return _mm256_add_epi16(a, b); }
inline Words subtract(Words a, Words b) { return _mm256_sub_epi16(a, b); }
inline Words add_saturating(Words a, Words b) { return _mm256_adds_epu16(a, b); }
inline bool any_above(Words a, Words b) {
  const Words excess = _mm256_subs_epu16(a, b);
  return !_mm256_testz_si256(excess, excess);
}

#elif defined(SEMIMOE_SSE2)

using Words = __m128i;
inline Words broadcast(Word word) { return _mm_set1_epi16(static_cast<short>(word)); }
inline Words broadcast_pair(std::uint32_t pair) { return _mm_set1_epi32(static_cast<int>(pair)); }
inline Words minimum(Words a, Words b) { return _mm_sub_epi16(a, _mm_subs_epu16(a, b)); }
inline Words maximum(Words a, Words b) { return _mm_add_epi16(b, _mm_subs_epu16(a, b)); }
inline Words add(Words a, Words b) { return _mm_add_epi16(a, b); }
inline Words subtract(Words a, Words b) { return _mm_sub_epi16(a, b); }
inline Words add_saturating(Words a, Words b) { return _mm_adds_epu16(a, b); }
inline bool any_above(Words a, Words b) {
  return _mm_movemask_epi8(_mm_cmpeq_epi16(_mm_subs_epu16(a, b), _mm_setzero_si128())) != 0xffff;
}

#else

using Words = Vector<Word, 16>;
inline Words broadcast(Word word) { return Words{} + word; }
inline Words broadcast_pair(std::uint32_t pair) { return broadcast(static_cast<Word>(pair)); }
inline Words minimum(Words a, Words b) { return select(a < b, a, b); }
inline Words maximum(Words a, Words b) { return select(a > b, a, b); }
inline Words add(Words a, Words b) { return a + b; }
inline Words subtract(Words a, Words b) { return a - b; }
inline Words add_saturating(Words a, Words b) { return a + minimum(b, ~a); }
inline bool any_above(Words a, Words b) {
  std::uint64_t halves[2];
  const auto above = a > b;
  std::memcpy(halves, &above, sizeof halves);
  return (halves[0] | halves[1]) != 0;
}

#endif

constexpr int kLanes = sizeof(Words) / sizeof(Word);

inline Words load(const Word* address) {
  Words words;
  std::memcpy(&words, address, sizeof words);
  return words;
}

inline void store(Word* address, Words words) { std::memcpy(address, &words, sizeof words); }

}  // namespace
}  // namespace semimoe
