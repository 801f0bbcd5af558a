// Distances to the nearest pixel of another label along a line, which is a row or a column. Bit i of a word is an edge:
// it says whether pixel i has another label than the pixel before it. The distance of pixel i to an edge at pixel j is
// i - j + 1 for j <= i and j - i for j > i.
#pragma once

#include "labels.cuh"

namespace semimoe {

constexpr int kReach = 176;  // the longest distance of the search in slab.cuh
constexpr int kFar = kReach * kReach;
constexpr int kNoEdge = kNoGap;  // no distance is as long

__device__ inline int low(std::uint32_t words) { return static_cast<int>(words & 0xffff); }
__device__ inline int high(std::uint32_t words) { return static_cast<int>(words >> 16); }
__device__ inline std::uint32_t halves(std::uint32_t low, std::uint32_t high) { return low | high << 16; }
__device__ constexpr std::uint32_t both(int word) { return static_cast<std::uint32_t>(word) * 0x10001u; }

// 32 pixels of a line, and what is beyond them.
struct Line {
  std::uint32_t edges;
  int before;  // distance of the pixel before the first one to the edges before it, or kNoEdge
  int after;   // distance of the last pixel to the edges after it, or kNoEdge

  // Distance of pixel i to the edges before it, if `earlier` are the edges of the pixels up to i; i may be -1.
  __device__ int backward(std::uint32_t earlier, int i) const {
    return earlier ? i - 30 + __clz(earlier) : i + 1 + before;
  }

  // And to those after it, if `later` are the edges of the pixels from i + 1 on.
  __device__ int forward(std::uint32_t later, int i) const { return later ? __ffs(later) : 31 - i + after; }

  // At least kNoEdge if the line has no edge.
  __device__ int distance(int i) const {
    const int back = backward(edges & (UINT32_MAX >> (31 - i)), i), ahead = forward((edges >> i) >> 1, i);
    return back < ahead ? back : ahead;
  }
};

// Line::before and Line::after if the nearest edges are in `word`, with `words_between` words without edges between it
// and the line.
__device__ inline int before_line(std::uint32_t word, int words_between) {
  return 32 * words_between + __clz(word) + 1;
}
__device__ inline int after_line(std::uint32_t word, int words_between) { return 32 * words_between + __ffs(word); }

// The distances min(distance, kReach) of `Count` pixels to the nearest edge, of two lines at once, one in the low and
// one in the high halves. Bit i of each half of `edges` belongs to pixel i. before: distance of the pixel before the
// first one to the edges before it; after: distance of the last pixel to the edges after it.
template <int Count>
__device__ inline void line_distances(std::uint32_t edges, std::uint32_t before, std::uint32_t after,
                                      std::uint32_t (&found)[Count]) {
  std::uint32_t most[Count];
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    most[i] = both(kReach) - (edges >> i & both(1)) * (kReach - 1);
    found[i] = before = __viaddmin_u16x2(before, both(1), most[i]);
  }
#pragma unroll
  for (int i = Count - 1; i >= 0; --i) {
    found[i] = __vminu2(found[i], after);
    after = __viaddmin_u16x2(after, both(1), most[i]);
  }
}

// The squares of both halves.
__device__ inline std::uint32_t squares(std::uint32_t words) {
  const std::uint32_t lower = words & 0xffff, upper = words >> 16;
  return lower * lower + (words & 0xffff0000) * upper;
}

// Called by all lanes of a warp. Bit j of the result of lane i is bit i of lane j's word.
__device__ inline std::uint32_t transposed(std::uint32_t word) {
  const int lane = threadIdx.x % 32;
  std::uint32_t kept = 0x0000ffff;
#pragma unroll
  for (int step = 16; step > 0; step /= 2, kept ^= kept << step) {
    const std::uint32_t other = __shfl_xor_sync(UINT32_MAX, word, step);
    word = lane & step ? (word & ~kept) | (other & ~kept) >> step : (word & kept) | (other & kept) << step;
  }
  return word;
}

}  // namespace semimoe
