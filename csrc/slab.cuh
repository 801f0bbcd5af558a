// A slab: 32 rows of a tile of columns, as one block of threads sees it in shared memory.
//
// A column's 32 pixels of a slab are the bits of a word. An edge is a bit that differs from the one before it, above or
// to the left; the distance to the nearest edge, found by counting leading and trailing zeros, is the distance to the
// nearest pixel of the opposite class in this column or row. Let gap(x') be that of the columns and run that of the
// row:
//
//     d^2(x) = min(run(x)^2, min over x' of (x - x')^2 + gap(x')^2).
//
// Beyond the end of its run a pixel sees gaps of the wrong class, but all that lies there is farther than run(x).
//
// The search goes outwards in 16-bit words, two rows in one register and two columns a thread: an addition and a
// minimum for two candidates is one instruction from sm_90 on, and what is read from shared memory serves both columns.
// Sums fit as long as no distance exceeds kReach; what is farther is left to exact 32-bit code.
#pragma once

#include "cluster.cuh"
#include "distance_cuda.hpp"

namespace semimoe {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kReach = 180;
constexpr int kFar = kReach * kReach;
constexpr int kPairs = kSlabRows / 2;                // of rows
constexpr int kColumns = kTileColumns + 2 * kReach;  // of the tile and of what the search sees beside it
constexpr int kGroups = (kColumns + 31) / 32;        // of 32 columns
constexpr int kStrides = kTileColumns / 64;          // in which a warp goes along a pair of rows
constexpr int kNoEdge = 1 << 20;                     // from a word to an edge that does not exist

static_assert(kColumns > 32 * (kGroups - 1) && kGroups > 2 * kWarps);
static_assert((kReach + 1) * (kReach + 1) + kFar <= UINT16_MAX && kReach % 2 == 0);

struct Slab {
  std::uint32_t heights[kPairs][kColumns];  // min(gap, kReach)^2 of two rows, the upper one in the low half
  std::uint32_t edges[kSlabRows][kGroups];  // along the rows
  std::int32_t back[kSlabRows][kGroups];    // from the first column of the group to the last edge before it
  std::int32_t ahead[kSlabRows][kGroups];   // and to the first edge after the group
};

// Whether a distance is one, or there is no edge: kNoEdge give or take the place in the word.
__device__ inline bool is_distance(int distance) { return distance < kNoEdge / 2; }

// Distance of bit i to the opposite class, given the edges of its word, how far the last edge before the word lies
// behind bit 0, and how far the first one after the word lies ahead of it.
__device__ inline int distance_to_edge(std::uint32_t edges, int i, int back, int ahead) {
  const std::uint32_t before = edges & (UINT32_MAX >> (31 - i));  // bits 0 ... i
  const std::uint32_t after = (edges >> i) >> 1;                  // bits i + 1 ...
  const int left = before ? i - 30 + __clz(before) : i + back + 1;
  const int right = after ? __ffs(after) : ahead - i;
  return left < right ? left : right;
}

// One image as words of 32 rows, in global or in shared memory.
struct Columns {
  const std::uint32_t* bits;  // (slabs, stride)
  int stride;
  int slabs;

  __device__ std::uint32_t word(int slab, int x) const { return bits[static_cast<std::int64_t>(slab) * stride + x]; }

  // The top row of the image has no edge.
  __device__ std::uint32_t edges(int slab, int x) const {
    const std::uint32_t here = word(slab, x);
    const std::uint32_t above = slab > 0 ? word(slab - 1, x) >> 31 : here & 1;
    return here ^ (here << 1 | above);
  }

  __device__ int back(int slab, int x) const {
    for (int s = slab - 1; s >= 0; --s)
      if (const std::uint32_t found = edges(s, x)) return 32 * (slab - s) - 31 + __clz(found);
    return kNoEdge;
  }

  __device__ int ahead(int slab, int x) const {
    for (int s = slab + 1; s < slabs; ++s)
      if (const std::uint32_t found = edges(s, x)) return 32 * (s - slab) + __ffs(found) - 1;
    return kNoEdge;
  }
};

__device__ inline std::uint32_t height(int gap) {
  const int near = gap < kReach ? gap : kReach;
  return static_cast<std::uint32_t>(near * near);
}

// By all threads of a block: the slab's view of the columns from first_column - kReach on. Row by row, gaps (or null)
// receives the gap of each pixel of the tile. Ends with a barrier.
__device__ inline void fill(Slab& slab, const Columns& columns, int index, int first_column, int width, int rows,
                            Gap* gaps) {
  for (int c = threadIdx.x; c < 32 * kGroups; c += kThreads) {
    const int x = first_column - kReach + c;
    const int nearest = x < 0 ? 0 : x < width ? x : width - 1;  // beyond the image there is nothing, no edge either
    const std::uint32_t word = columns.word(index, nearest);
    const std::uint32_t across = word ^ columns.word(index, x > 0 && x < width ? x - 1 : nearest);
    for (int row = 0; row < kSlabRows; ++row) {
      const std::uint32_t edges = __ballot_sync(UINT32_MAX, across >> row & 1);
      if (threadIdx.x % 32 == static_cast<unsigned>(row)) slab.edges[row][c / 32] = edges;
    }
    if (c >= kColumns) continue;  // in the last group alone: no later ballot of this warp
    const std::uint32_t edges = columns.edges(index, nearest);
    const int back = columns.back(index, nearest), ahead = columns.ahead(index, nearest);
    const bool in_the_image = x == nearest;
    const bool in_the_tile = in_the_image && c >= kReach && c < kReach + kTileColumns;
    for (int row = 0; row < kSlabRows; row += 2) {
      const int upper = distance_to_edge(edges, row, back, ahead);
      const int lower = distance_to_edge(edges, row + 1, back, ahead);
      slab.heights[row / 2][c] = in_the_image ? height(upper) | height(lower) << 16 : kFar | kFar << 16;
      if (gaps && in_the_tile) {
        Gap* gap = gaps + static_cast<std::int64_t>(row) * width + x;
        if (row < rows) gap[0] = upper < kNoGap ? upper : kNoGap;
        if (row + 1 < rows) gap[width] = lower < kNoGap ? lower : kNoGap;
      }
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kSlabRows * kGroups; item += kThreads) {
    const int row = item / kGroups, group = item % kGroups;
    int before = group - 1, after = group + 1;
    while (before >= 0 && slab.edges[row][before] == 0) --before;
    while (after < kGroups && slab.edges[row][after] == 0) ++after;
    slab.back[row][group] = before < 0 ? kNoEdge : 32 * (group - before) - 31 + __clz(slab.edges[row][before]);
    slab.ahead[row][group] = after == kGroups ? kNoEdge : 32 * (after - group) + __ffs(slab.edges[row][after]) - 1;
  }
  __syncthreads();
}

// Distance to the end of its run of a pixel, by its column in the slab's view; exact up to the edge of the view.
__device__ inline int run_distance(const Slab& slab, int row, int c) {
  return distance_to_edge(slab.edges[row][c / 32], c % 32, slab.back[row][c / 32], slab.ahead[row][c / 32]);
}

__device__ inline std::int32_t low(std::uint32_t words) { return static_cast<std::int32_t>(words & 0xffff); }
__device__ inline std::int32_t high(std::uint32_t words) { return static_cast<std::int32_t>(words >> 16); }
__device__ inline std::uint32_t both(std::int32_t word) { return static_cast<std::uint32_t>(word) * 0x10001u; }

// Squared distances of the rows 2 pair, 2 pair + 1 (low, high) and the columns c, c + 1 of the view (x, y), c even.
// kFar or more means: kFar or more.
__device__ inline uint2 search(const Slab& slab, int pair, int c) {
  const std::uint32_t* heights = slab.heights[pair] + c;
  const auto columns_at = [&](int offset) { return *reinterpret_cast<const uint2*>(heights + offset); };
  const auto run = [&](int column) {
    return height(run_distance(slab, 2 * pair, column)) | height(run_distance(slab, 2 * pair + 1, column)) << 16;
  };

  const uint2 own = columns_at(0);
  uint2 best = {__vminu2(own.x, run(c)), __vminu2(own.y, run(c + 1))};
  best.x = __viaddmin_u16x2(own.y, both(1), best.x);
  best.y = __viaddmin_u16x2(own.x, both(1), best.y);
  for (int k = 2;; k += 2) {
    const std::uint32_t worst = __vmaxu2(best.x, best.y);
    if ((k - 1) * (k - 1) >= max(low(worst), high(worst))) return best;
    const uint2 left = columns_at(-k), right = columns_at(k);
    const std::uint32_t nearer = both((k - 1) * (k - 1)), here = both(k * k), farther = both((k + 1) * (k + 1));
    best.x = __viaddmin_u16x2(left.x, here, best.x);
    best.x = __viaddmin_u16x2(left.y, nearer, best.x);
    best.x = __viaddmin_u16x2(right.x, here, best.x);
    best.x = __viaddmin_u16x2(right.y, farther, best.x);
    best.y = __viaddmin_u16x2(left.x, farther, best.y);
    best.y = __viaddmin_u16x2(left.y, here, best.y);
    best.y = __viaddmin_u16x2(right.x, nearer, best.y);
    best.y = __viaddmin_u16x2(right.y, here, best.y);
  }
}

}  // namespace semimoe
