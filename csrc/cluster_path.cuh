// The cluster path, see targets.cuh.
#pragma once

#include "targets.cuh"

namespace semimoe {

// What a block needs once its search has found distances of at least kReach; it replaces the heights of the slab.
struct Exact {
  alignas(16) std::int32_t squared[kSlabRows][kTileColumns];
  Gap gaps[kWarps][kTileColumns];
  std::uint16_t nearest[kWarps][chunks_of(kTileColumns) + 1];
  std::uint16_t next_edge[kWarps][chunks_of(kTileColumns) + 1];
};

struct ClusterMemory {
  Slab slab;
  alignas(16) std::uint32_t inside[kTileColumns];  // see Bits
  alignas(16) std::uint32_t touches[kTileColumns];
  std::uint32_t edges[kTileColumns];
  std::uint32_t ends[kTileColumns];  // before and after of the columns' lines
  Deepest deepest[kMostSlabs];       // by slab

  __device__ Exact& exact() { return reinterpret_cast<Exact&>(slab.heights); }
};
static_assert(sizeof(Exact) <= sizeof(Slab::heights));

#ifdef SEMIMOE_CLUSTERS

// The words of all slabs in this thread's column.
struct Column {
  std::uint32_t words[kMostSlabs];

  __device__ Column(ClusterMemory& memory, int slabs) {
#pragma unroll
    for (int slab = 0; slab < kMostSlabs; ++slab)
      words[slab] = slab < slabs ? *in_block(slab, &memory.edges[threadIdx.x]) : 0;
  }

  __device__ std::uint32_t any() const {
    std::uint32_t result = 0;
#pragma unroll
    for (int slab = 0; slab < kMostSlabs; ++slab) result |= words[slab];
    return result;
  }

  __device__ Line line(int own, std::uint32_t edges) const {
    Line line{edges, kNoEdge, kNoEdge};
#pragma unroll
    for (int slab = 0; slab < kMostSlabs; ++slab) {
      const std::uint32_t word = words[slab];
      if (word && slab < own) line.before = before_line(word, own - 1 - slab);
      if (word && slab > own) line.after = min(line.after, after_line(word, slab - own - 1));
    }
    return line;
  }
};

__device__ inline void fill(Slab& slab, const Place& place, const Line& column, std::uint32_t across) {
  const int x = threadIdx.x, warp = x / 32;
  if (x < place.columns)
    fill_column(slab, kReach + x, column);
  else
    fill_nothing(slab, kReach + x);
  if (x < 2 * kReach / kQuad) {  // the halo is outside the image
    const int c = kQuad * x < kReach ? kQuad * x : kTileColumns + kQuad * x;
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      *reinterpret_cast<Quad*>(&slab.heights[pair][c]) = {both(kFar), both(kFar), both(kFar), both(kFar)};
  }
  slab.across[kHaloGroups + warp][x % 32] = transposed(across);
  __syncthreads();
  fill_ends(slab, kHaloGroups, kHaloGroups + kTileGroups);
  __syncthreads();
}

// Called by all threads of a block, between barriers. Computes all squared distances of the slab without a limit.
__device__ inline void search_far(ClusterMemory& memory, const Place& place) {
  Exact& exact = memory.exact();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Gap* gaps = exact.gaps[warp];
  for (int row = warp; row < place.rows; row += kWarps) {
    for (int x = lane; x < place.columns; x += 32) {
      count_iteration();
      const Line column{memory.edges[x], low(memory.ends[x]), high(memory.ends[x])};
      gaps[x] = static_cast<Gap>(min(column.distance(row), kNoEdge));
    }
    __syncwarp();
    far_row(
        gaps, place.columns, {exact.nearest[warp], exact.next_edge[warp]},
        [&](int x) { return memory.slab.across[kHaloGroups + x / 32][row] >> x % 32 & 1; }, [](int) { return true; },
        [&](int x, std::int32_t squared) { exact.squared[row][x] = squared; });
    __syncwarp();
  }
}

// One cluster per image, one block per slab.
__device__ inline void cluster_targets(const Problem& problem, ClusterMemory& memory) {
  const Place place(problem, blockIdx.x);
  const Share share;
  const int x = threadIdx.x, slabs = problem.slabs();
  const Bits bits = read_labels(problem, place, memory.inside);
  memory.edges[x] = bits.edges;
  memory.touches[x] = bits.touches;
  if (x < kMostSlabs) memory.deepest[x] = {};
  cluster_sync();

  const Column column(memory, slabs);
  // Without an edge in any column, all rows are equal, so that this slab's tell whether the image is constant.
  const bool constant = !__syncthreads_or((column.any() | bits.across) != 0);
  Found found = {};
  bool far = false;
  Deepest deepest;
  if (!constant) {
    const Line line = column.line(place.slab, bits.edges);
    memory.ends[x] = halves(line.before, line.after);
    fill(memory.slab, place, line, bits.across);
    found = search(memory.slab, place);
    deepest = deepest_of(found, *reinterpret_cast<const Quad*>(&memory.inside[share.column]));
    far = __syncthreads_or(max(deepest.inside, deepest.outside) >= kFar);
  }
  const auto exact_at = [&](int step, int half) {
    return load(memory.exact().squared[2 * share.pair(step) + half] + share.column, kQuad, true);
  };
  const auto found_at = [&](int step, int half) { return found.squared(step, half); };
  if (far) {
    search_far(memory, place);
    __syncthreads();
    for (int row = 0; row < place.rows && x < place.columns; ++row)
      deepest.include(memory.exact().squared[row][x], bits.inside >> row & 1);
  }
  deepest = {static_cast<std::int32_t>(__reduce_max_sync(UINT32_MAX, deepest.inside)),
             static_cast<std::int32_t>(__reduce_max_sync(UINT32_MAX, deepest.outside))};
  if (x % 32 < slabs) {
    Deepest* there = in_block(x % 32, &memory.deepest[place.slab]);
    atomicMax(&there->inside, deepest.inside);
    atomicMax(&there->outside, deepest.outside);
  }
  cluster_sync();  // afterwards no block accesses another one's memory

  if (constant) {
    write_constant(problem, place, bits.inside != 0);
  } else if (!problem.sdf) {
    if (far)
      write_squared(problem, place, exact_at);
    else
      write_squared(problem, place, found_at);
  } else {
    Deepest overall;
    for (int slab = 0; slab < slabs; ++slab) overall.include(memory.deepest[slab]);
    constexpr int kLongest = kMostSlabs * kSlabRows - 1, kWidest = kTileColumns - 1;
    const Scale<kLongest * kLongest + kWidest * kWidest> scale(overall);
    const Quad foreground = *reinterpret_cast<const Quad*>(&memory.inside[share.column]);
    const auto touches = [&] { return *reinterpret_cast<const Quad*>(&memory.touches[share.column]); };
    if (far)
      write_targets(problem, place, scale, foreground, touches, exact_at);
    else
      write_targets(problem, place, scale, foreground, touches, found_at);
  }
}

#endif

}  // namespace semimoe
