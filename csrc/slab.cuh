// A slab: 32 rows of a tile of columns, in the shared memory of one block.
//
// gap(x') is the distance of a pixel to the nearest pixel of another label in its column, run(x) in its row. Then
//
//     d^2(x) = min(run(x)^2, min over x' of (x - x')^2 + gap(x')^2).
//
// Beyond the end of the pixel's run, gap(x') may lead to a pixel of the same label. That is harmless: those pixels are
// at least as far away as run(x).
//
// The search goes outwards in 16-bit words, with two rows in a register and four columns per thread, so that one
// 128-bit access to shared memory serves sixteen candidates. On sm_90 and later, one instruction adds and takes the
// minimum for two of them. Sums fit into 16 bits for distances up to kReach; far.cuh computes longer ones.
#pragma once

#include "lines.cuh"

namespace semimoe {

constexpr int kPairs = kSlabRows / 2;                // pairs of rows
constexpr int kColumns = kTileColumns + 2 * kReach;  // the tile and the halo of the search
constexpr int kTileGroups = kTileColumns / 32;       // groups of 32 columns
constexpr int kHaloGroups = (kReach + 31) / 32;
constexpr int kGroups = kTileGroups + 2 * kHaloGroups;
constexpr int kQuad = 4;  // columns of a thread

static_assert((kReach + 3) * (kReach + 3) + kFar <= UINT16_MAX && kReach % kQuad == 0);

struct alignas(16) Quad {
  std::uint32_t column[kQuad];
};

struct Slab {
  alignas(16) std::uint32_t heights[kPairs][kColumns];  // min(gap, kReach)^2 of two rows, the upper one in the low half
  std::uint32_t across[kGroups][kSlabRows];             // edges along the rows, from kHaloGroups before the tile on
  std::uint32_t ends[kTileGroups][kSlabRows];           // min(before, kReach) and min(after, kReach) of each Line
};

// Writes the heights of a column of the slab.
__device__ inline void fill_column(Slab& slab, int c, const Line& column) {
  constexpr int kHalf = kSlabRows / 2;
  const int middle_before = column.backward(column.edges & 0xffff, kHalf - 1);
  const int middle_after = column.forward(column.edges >> kHalf, kHalf - 1);
  const auto near = [](int distance) { return static_cast<std::uint32_t>(min(distance, kReach)); };
  std::uint32_t rows[kHalf];  // i and i + kHalf
  line_distances(column.edges, halves(near(column.before), near(middle_before)),
                 halves(near(middle_after), near(column.after)), rows);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) rows[i] = squares(rows[i]);
#pragma unroll
  for (int i = 0; i < kHalf; i += 2) {
    slab.heights[i / 2][c] = halves(rows[i] & 0xffff, rows[i + 1]);
    slab.heights[(i + kHalf) / 2][c] = rows[i] >> 16 | (rows[i + 1] & 0xffff0000);
  }
}

// Columns outside the image are too far away to win.
__device__ inline void fill_nothing(Slab& slab, int c) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) slab.heights[pair][c] = both(kFar);
}

// Called by all threads of a block, between barriers: the ends of all lines along the rows of the tile. The groups
// [first, last) of slab.across are in the image.
__device__ inline void fill_ends(Slab& slab, int first, int last) {
  static_assert(kThreads == kTileGroups * kSlabRows);
  const int row = threadIdx.x % kSlabRows, tile_group = threadIdx.x / kSlabRows, group = kHaloGroups + tile_group;
  int before = kReach, after = kReach;
  for (int g = group - 1; g >= max(first, group - kHaloGroups); --g) {
    count_iteration();
    if (const std::uint32_t word = slab.across[g][row]) {
      before = min(before, before_line(word, group - 1 - g));
      break;
    }
  }
  for (int g = group + 1; g < min(last, group + 1 + kHaloGroups); ++g) {
    count_iteration();
    if (const std::uint32_t word = slab.across[g][row]) {
      after = min(after, after_line(word, g - group - 1));
      break;
    }
  }
  slab.ends[tile_group][row] = halves(before, after);
}

// min(run, kReach)^2 of a pair of rows in the four columns of the tile from x on.
__device__ inline Quad run_squares(const Slab& slab, int pair, int x) {
  const int group = x / 32, bit = x % 32;
  std::uint32_t edges = 0, before = 0, after = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const std::uint32_t word = slab.across[kHaloGroups + group][2 * pair + half];
    const std::uint32_t ends = slab.ends[group][2 * pair + half];
    const Line row{word, low(ends), high(ends)};
    edges |= (word >> bit & 0xf) << 16 * half;
    before |= row.backward(word & ((1u << bit) - 1), bit - 1) << 16 * half;
    after |= row.forward(word >> bit >> kQuad, bit + kQuad - 1) << 16 * half;
  }
  Quad runs;
  line_distances(edges, before, after, runs.column);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) runs.column[i] = squares(runs.column[i]);
  return runs;
}

__device__ constexpr int square(int distance) { return distance * distance; }

// Squared distances of a pair of rows (in the low and the high halves) in the four columns of the tile from x on, x a
// multiple of 4. A result of at least kFar only says that the squared distance is at least kFar.
//
// The loop is unrolled completely where the sum and minimum is one instruction, so that its constants and offsets are
// part of the instructions.
__device__ inline Quad search(const Slab& slab, int pair, int x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kUnrolled = kReach / kQuad;
#else
  [[maybe_unused]] constexpr int kUnrolled = 1;
#endif
  const std::uint32_t* heights = slab.heights[pair] + kReach + x;
  const auto columns_at = [&](int offset) { return *reinterpret_cast<const Quad*>(heights + offset); };

  const Quad own = columns_at(0);
  Quad best = run_squares(slab, pair, x);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j)
      best.column[i] = __viaddmin_u16x2(own.column[j], both(square(i - j)), best.column[i]);
  }
#pragma unroll kUnrolled
  for (int k = kQuad; k <= kReach; k += kQuad) {
    const std::uint32_t nearest = both(square(k - 3));  // no candidate from here on is below it
    const std::uint32_t worst =
        __vmaxu2(__vmaxu2(best.column[0], best.column[1]), __vmaxu2(best.column[2], best.column[3]));
    if (__vmaxu2(worst, nearest) == nearest) break;
    count_iteration();
    const Quad left = columns_at(-k), right = columns_at(k);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        best.column[i] = __viaddmin_u16x2(left.column[j], both(square(k + i - j)), best.column[i]);
        best.column[i] = __viaddmin_u16x2(right.column[j], both(square(k + j - i)), best.column[i]);
      }
    }
  }
  return best;
}

}  // namespace semimoe
