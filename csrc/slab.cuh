// A slab: 32 rows of a tile of columns, in the shared memory of one block.
//
// The slab's 32 pixels of a column are the bits of a word. A bit is an edge if it differs from the one before it, above
// or to the left. Counts of leading and trailing zeros give the distance to the nearest edge, and so to the nearest
// pixel of the opposite class in the column, gap(x'), or in the row, run(x). Then
//
//     d^2(x) = min(run(x)^2, min over x' of (x - x')^2 + gap(x')^2).
//
// Beyond the end of the pixel's run, gap(x') may belong to the wrong class. That is harmless: those pixels are at least
// as far away as run(x).
//
// The search goes outwards in 16-bit words, with two rows in a register and two columns per thread. On sm_90 and later,
// one instruction adds and takes the minimum for two candidates, and both columns use the same shared-memory reads.
// Sums fit into 16 bits for distances up to kReach; exact 32-bit code computes longer ones.
#pragma once

#include "cluster.cuh"
#include "distance_cuda.hpp"

namespace semimoe {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kReach = 180;
constexpr int kFar = kReach * kReach;
constexpr int kPairs = kSlabRows / 2;                // pairs of rows
constexpr int kColumns = kTileColumns + 2 * kReach;  // the tile and the halo of the search
constexpr int kGroups = (kColumns + 31) / 32;        // groups of 32 columns
constexpr int kStrides = kTileColumns / 64;          // steps of a warp along a pair of rows
constexpr int kNoEdge = 1 << 20;                     // distance from a word to an edge, if there is none

static_assert(kColumns > 32 * (kGroups - 1) && kGroups > 2 * kWarps);
static_assert((kReach + 1) * (kReach + 1) + kFar <= UINT16_MAX && kReach % 2 == 0);

struct Slab {
  std::uint32_t heights[kPairs][kColumns];  // min(gap, kReach)^2 of two rows, the upper one in the low half
  std::uint32_t edges[kSlabRows][kGroups];  // along the rows
  std::int32_t back[kSlabRows][kGroups];    // from the first column of the group to the last edge before it
  std::int32_t ahead[kSlabRows][kGroups];   // and to the first edge after the group
};

// Whether there is an edge. Without one, a distance is kNoEdge plus or minus the position in the word.
__device__ inline bool is_distance(int distance) { return distance < kNoEdge / 2; }

// Distance of bit i to the opposite class. edges: those of its word; back: distance from bit 0 to the last edge before
// the word; ahead: distance from bit 0 to the first edge after the word.
__device__ inline int distance_to_edge(std::uint32_t edges, int i, int back, int ahead) {
  const std::uint32_t before = edges & (UINT32_MAX >> (31 - i));  // bits 0 ... i
  const std::uint32_t after = (edges >> i) >> 1;                  // bits i + 1 ...
  const int left = before ? i - 30 + __clz(before) : i + back + 1;
  const int right = after ? __ffs(after) : ahead - i;
  return left < right ? left : right;
}

// An image as words of 32 rows, in global or shared memory.
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

// Called by all threads of a block; ends with a barrier. Fills the slab with the columns from first_column - kReach on.
// If gaps is not null, it also writes the gap of each pixel of the tile, row by row.
__device__ inline void fill(Slab& slab, const Columns& columns, int index, int first_column, int width, int rows,
                            Gap* gaps) {
  for (int c = threadIdx.x; c < 32 * kGroups; c += kThreads) {
    const int x = first_column - kReach + c;
    const int nearest = x < 0       ? 0
                        : x < width ? x
                                    : width - 1;  // columns outside the image repeat its border and so have no edge
    const std::uint32_t word = columns.word(index, nearest);
    const std::uint32_t across = word ^ columns.word(index, x > 0 && x < width ? x - 1 : nearest);
    for (int row = 0; row < kSlabRows; ++row) {
      const std::uint32_t edges = __ballot_sync(UINT32_MAX, across >> row & 1);
      if (threadIdx.x % 32 == static_cast<unsigned>(row)) slab.edges[row][c / 32] = edges;
    }
    if (c >= kColumns) continue;  // only in the last group, so that no ballot of this warp follows
    const std::uint32_t edges = columns.edges(index, nearest);
    const int back = columns.back(index, nearest), ahead = columns.ahead(index, nearest);
    const bool in_image = x == nearest;
    const bool in_tile = in_image && c >= kReach && c < kReach + kTileColumns;
    for (int row = 0; row < kSlabRows; row += 2) {
      const int upper = distance_to_edge(edges, row, back, ahead);
      const int lower = distance_to_edge(edges, row + 1, back, ahead);
      slab.heights[row / 2][c] = in_image ? height(upper) | height(lower) << 16 : kFar | kFar << 16;
      if (gaps && in_tile) {
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

// Distance from the pixel in column c of the slab to the end of its run, exact as long as the run ends within the slab.
__device__ inline int run_distance(const Slab& slab, int row, int c) {
  return distance_to_edge(slab.edges[row][c / 32], c % 32, slab.back[row][c / 32], slab.ahead[row][c / 32]);
}

__device__ inline std::int32_t low(std::uint32_t words) { return static_cast<std::int32_t>(words & 0xffff); }
__device__ inline std::int32_t high(std::uint32_t words) { return static_cast<std::int32_t>(words >> 16); }
__device__ inline std::uint32_t both(std::int32_t word) { return static_cast<std::uint32_t>(word) * 0x10001u; }

// Squared distances of the rows 2 pair and 2 pair + 1 (low and high half) and of the slab's columns c and c + 1 (x and
// y), c even. A result of at least kFar only says that the squared distance is at least kFar.
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
