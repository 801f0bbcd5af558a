// Squared distances of a row without a limit, by one warp, in time linear in the row whatever the distances.
//
// For equal parabolas, the column x' that minimizes (x - x')^2 + gap(x')^2 only grows with x. So the leftmost
// minimizing columns of two pixels bound those of all pixels between them. The warp finds them for every 32nd pixel, by
// bisection: the middle pixel first, then the middles of both halves with the columns that are left to each, and so on.
// A level visits all columns of the row about once, 32 at a time. Then the 32 pixels of a chunk, one per lane, visit
// the columns between the minimizing ones of both ends, all lanes the same column. Over the whole row, these are width
// + width / 32 columns, so that a pixel visits 33 on average.
//
// The depth in steps of the warp is at most width + width / 32 for the chunks and about width / 32 * log2(width / 32)
// for the bisection. All rows of the batch are computed in parallel.
#pragma once

#include "lines.cuh"

namespace semimoe {

constexpr int kChunk = 32;

SEMIMOE_HOST_DEVICE constexpr int chunks_of(int width) { return (width + kChunk - 1) / kChunk; }

// A warp's scratch memory for a row; both arrays have chunks_of(width) + 1 elements.
struct RowScratch {
  std::uint16_t* nearest;    // leftmost minimizing column of the first pixel of each chunk, and of the row's last pixel
  std::uint16_t* next_edge;  // first column at or after the chunk with an edge across, or kNoEdge
};

constexpr std::uint32_t kNoCandidate = UINT32_MAX;

// The squared distance of pixel x to the pixel that is gaps[i] above or below pixel i.
__device__ inline std::uint32_t candidate(const Gap* gaps, int i, int x) {
  const std::uint32_t gap = gaps[i], offset = static_cast<std::uint32_t>(x - i);
  return gap == kNoGap ? kNoCandidate : gap * gap + offset * offset;
}

// The leftmost column of [first, last] that minimizes the candidate for pixel x; first if no column has a gap.
__device__ inline int minimizing(const Gap* gaps, int x, int first, int last) {
  std::uint64_t best = std::uint64_t{kNoCandidate} << 32 | static_cast<std::uint32_t>(first);
  for (int i = first + static_cast<int>(threadIdx.x % 32); i <= last; i += 32) {
    count_iteration();
    const std::uint64_t found = std::uint64_t{candidate(gaps, i, x)} << 32 | static_cast<std::uint32_t>(i);
    best = found < best ? found : best;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const std::uint64_t other = __shfl_xor_sync(UINT32_MAX, best, distance);
    best = other < best ? other : best;
  }
  return static_cast<int>(best & UINT32_MAX);
}

// nearest, for all chunks, by bisection.
__device__ inline void bisect(const Gap* gaps, int width, std::uint16_t* nearest) {
  const int chunks = chunks_of(width);
  const auto find = [&](int chunk, int first, int last) {
    const int found = minimizing(gaps, min(chunk * kChunk, width - 1), first, last);
    if (threadIdx.x % 32 == 0) nearest[chunk] = static_cast<std::uint16_t>(found);
    __syncwarp();
  };
  find(0, 0, width - 1);
  find(chunks, nearest[0], width - 1);
  int half = 1;
  while (2 * half < chunks) half *= 2;
  for (; half > 0; half /= 2)
    for (int chunk = half; chunk < chunks; chunk += 2 * half)
      find(chunk, nearest[chunk - half], nearest[min(chunk + half, chunks)]);
}

// Called by all lanes of a warp, for a row of an image that is not constant. gaps: of the row, visible to the warp.
// is_edge(x): whether pixel x differs from the one to its left. keep(x, squared) is called for the pixels of all
// chunks that have one with wanted(x).
template <class IsEdge, class Wanted, class Keep>
__device__ inline void far_row(const Gap* gaps, int width, const RowScratch& scratch, const IsEdge& is_edge,
                               const Wanted& wanted, const Keep& keep) {
  const int lane = threadIdx.x % 32, chunks = chunks_of(width);
  const auto edges_of = [&](int chunk) {
    const int x = chunk * kChunk + lane;
    return __ballot_sync(UINT32_MAX, x < width && is_edge(x));
  };
  bisect(gaps, width, scratch.nearest);
  int next = kNoEdge;
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    count_iteration();
    if (lane == 0) scratch.next_edge[chunk + 1] = static_cast<std::uint16_t>(next);
    if (const std::uint32_t edges = edges_of(chunk)) next = chunk * kChunk + __ffs(edges) - 1;
  }
  __syncwarp();
  int last = -1;  // column of the last edge before the chunk
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int begin = chunk * kChunk, x = begin + lane;
    const std::uint32_t edges = edges_of(chunk);
    if (__any_sync(UINT32_MAX, x < width && wanted(x))) {
      const int after = scratch.next_edge[chunk + 1];
      const Line row{edges, last < 0 ? kNoEdge : begin - last, after == kNoEdge ? kNoEdge : after - begin - 31};
      const int run = row.distance(lane);
      std::uint32_t best = run < kNoEdge ? static_cast<std::uint32_t>(run * run) : kNoCandidate;
      for (int i = scratch.nearest[chunk]; i <= scratch.nearest[chunk + 1]; ++i) {
        count_iteration();
        best = min(best, candidate(gaps, i, x));
      }
      if (x < width) keep(x, static_cast<std::int32_t>(best));
    }
    if (edges) last = begin + 31 - __clz(edges);
  }
}

}  // namespace semimoe
