// The general path, see targets.cuh.
#pragma once

#include "targets.cuh"

namespace semimoe {

// State of an image: the largest squared distances, and whether it has an edge.
struct State {
  Deepest deepest;
  std::int32_t varies;
};

// The planes of problem.words, one word for the slab's 32 pixels of a column: the members of Bits, and the ends of the
// columns' lines, halves(before, after).
enum Plane { kInside, kEdges, kAcross, kTouches, kEnds };

constexpr std::int32_t kUnknown = INT32_MAX;  // a squared distance that search_far will compute

// The words of one slab of an image.
struct Words {
  std::uint32_t* inside;  // of column 0
  std::int64_t plane;     // words of a plane

  __device__ Words(const Problem& problem, std::int64_t image, int slab)
      : inside(problem.words + (image * problem.slabs() + slab) * problem.width),
        plane(problem.batch * problem.slabs() * problem.width) {}

  __device__ std::uint32_t& at(Plane which, int x) const { return inside[which * plane + x]; }
  __device__ Line column(int x) const { return {at(kEdges, x), low(at(kEnds, x)), high(at(kEnds, x))}; }
  __device__ Quad quad(Plane which, int x, int width) const {
    Quad words;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) words.column[i] = x + i < width ? at(which, x + i) : 0;
    return words;
  }
};

__device__ inline State& state_of(const Problem& problem, std::int64_t image) {
  return reinterpret_cast<State*>(problem.state)[image];
}

__device__ inline void raise_to(std::int32_t* shared, std::int32_t value) {
  // The value only grows, so that a stale read costs at most a needless atomic operation.
  if (*static_cast<volatile std::int32_t*>(shared) < value) atomicMax(shared, value);
}

__device__ inline void raise_to(Deepest* shared, const Deepest& values) {
  raise_to(&shared->inside, values.inside);
  raise_to(&shared->outside, values.outside);
}

// One block per tile of a slab: the words, but for kEnds.
__device__ inline void read(const Problem& problem, std::uint32_t* inside) {
  const Place place(problem, blockIdx.x);
  const Bits bits = read_labels(problem, place, inside);
  const int x = place.first_column + threadIdx.x;
  if (x >= problem.width) return;
  const Words words(problem, place.image, place.slab);
  words.at(kInside, x) = bits.inside;
  words.at(kEdges, x) = bits.edges;
  words.at(kAcross, x) = bits.across;
  words.at(kTouches, x) = bits.touches;
  if (bits.edges | bits.across) raise_to(&state_of(problem, place.image).varies, 1);
}

// One thread per column of an image: kEnds. It visits the slabs downwards, then upwards.
__device__ inline void carry(const Problem& problem) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= problem.batch * problem.width) return;
  const std::int64_t image = column / problem.width;
  const int x = static_cast<int>(column % problem.width), slabs = problem.slabs();
  const auto next = [](int distance, std::uint32_t edges, int within) {
    return edges ? within : min(distance + 32, kNoEdge);
  };
  for (int slab = 0, before = kNoEdge; slab < slabs; ++slab) {
    count_iteration();
    const Words words(problem, image, slab);
    const std::uint32_t edges = words.at(kEdges, x);
    words.at(kEnds, x) = before;
    before = next(before, edges, before_line(edges, 0));
  }
  for (int slab = slabs - 1, after = kNoEdge; slab >= 0; --slab) {
    count_iteration();
    const Words words(problem, image, slab);
    const std::uint32_t edges = words.at(kEdges, x);
    words.at(kEnds, x) |= static_cast<std::uint32_t>(after) << 16;
    after = next(after, edges, after_line(edges, 0));
  }
}

__device__ inline void fill(Slab& slab, const Words& words, int first_column, int width) {
  for (int c = threadIdx.x; c < kColumns; c += kThreads) {
    const int x = first_column - kReach + c;
    if (x >= 0 && x < width)
      fill_column(slab, c, words.column(x));
    else
      fill_nothing(slab, c);
  }
  const int lane = threadIdx.x % 32;
  for (int group = threadIdx.x / 32; group < kGroups; group += kWarps) {
    const int x = first_column + 32 * (group - kHaloGroups) + lane;
    slab.across[group][lane] = transposed(x >= 0 && x < width ? words.at(kAcross, x) : 0);
  }
  __syncthreads();
  fill_ends(slab, 0, kGroups);
  __syncthreads();
}

struct TileMemory {
  Slab slab;
  std::uint32_t far;  // rows with a distance of at least kReach
};

// One block per tile of a slab: the squared distances below kFar, and `far`.
__device__ inline void search_tiles(const Problem& problem, TileMemory& memory) {
  const Place place(problem, blockIdx.x);
  State& state = state_of(problem, place.image);
  if (threadIdx.x == 0) memory.far = 0;
  if (!state.varies) {
    if (!problem.sdf) write_constant(problem, place, false);
    if (threadIdx.x == 0) problem.far[blockIdx.x] = 0;
    return;
  }
  const Words words(problem, place.image, place.slab);
  fill(memory.slab, words, place.first_column, problem.width);
  Found found = search(memory.slab, place);
  const Share share;
  const Quad inside = words.quad(kInside, place.first_column + share.column, problem.width);
  Deepest deepest = deepest_of(found, inside);
  if (max(deepest.inside, deepest.outside) >= kFar) {
    deepest = {};
    std::uint32_t far = 0;
#pragma unroll
    for (int step = 0; step < Share::kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 2 * share.pair(step) + half;
        const Four<std::int32_t> squared = found.squared(step, half);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          if (squared.of[i] >= kFar)
            far |= 1u << row;
          else
            deepest.include(squared.of[i], inside.column[i] >> row & 1);
        }
      }
    }
    atomicOr(&memory.far, far);
  }
  raise_to(&state.deepest, deepest);
  write_squared(problem, place, [&](int step, int half) {
    Four<std::int32_t> squared = found.squared(step, half);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) squared.of[i] = squared.of[i] < kFar ? squared.of[i] : kUnknown;
    return squared;
  });
  __syncthreads();
  if (threadIdx.x == 0) problem.far[blockIdx.x] = memory.far;
}

// Blocks of search_far for an image, with one row per warp, and the bytes of shared memory of each.
SEMIMOE_HOST_DEVICE inline int far_blocks(const Problem& problem) { return (problem.height + kWarps - 1) / kWarps; }
constexpr std::size_t far_memory(int width) { return 2 * sizeof(std::uint16_t) * kWarps * (chunks_of(width) + 1); }
static_assert(far_memory(46340) <= 48 << 10);

// One warp per row: computes the distances that search_tiles left out. memory: far_memory(width) bytes.
__device__ inline void search_far(const Problem& problem, std::uint16_t* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = problem.width;
  const std::int64_t image = blockIdx.x / far_blocks(problem);
  const int y = static_cast<int>(blockIdx.x % far_blocks(problem)) * kWarps + warp;
  if (y >= problem.height) return;
  const int slab = y / kSlabRows, row = y % kSlabRows;
  const std::uint32_t* far = problem.far + (image * problem.slabs() + slab) * problem.tiles();
  bool is_far = false;
  for (int tile = lane; tile < problem.tiles(); tile += 32) is_far |= far[tile] >> row & 1;
  if (!__any_sync(UINT32_MAX, is_far)) return;

  const Words words(problem, image, slab);
  const std::int64_t first_pixel = (image * problem.height + y) * width;
  Gap* gaps = problem.gaps + first_pixel;
  for (int x = lane; x < width; x += 32) {
    count_iteration();
    gaps[x] = static_cast<Gap>(min(words.column(x).distance(row), kNoEdge));
  }
  __syncwarp();
  std::int32_t* squared = problem.squared + first_pixel;
  Deepest deepest;
  const int entries = chunks_of(width) + 1;
  std::uint16_t* scratch = memory + 2 * warp * entries;
  far_row(
      gaps, width, {scratch, scratch + entries}, [&](int x) { return words.at(kAcross, x) >> row & 1; },
      [&](int x) { return squared[x] == kUnknown; },
      [&](int x, std::int32_t exact) {
        if (squared[x] != kUnknown) return;
        squared[x] = exact;
        deepest.include(exact, words.at(kInside, x) >> row & 1);
      });
  raise_to(&state_of(problem, image).deepest, deepest);
}

// One block per tile of a slab.
__device__ inline void write_targets(const Problem& problem) {
  const Place place(problem, blockIdx.x);
  const State& state = state_of(problem, place.image);
  const Words words(problem, place.image, place.slab);
  if (!state.varies) {
    write_constant(problem, place, words.at(kInside, 0) != 0);
    return;
  }
  const Share share;
  const int x = place.first_column + share.column, width = problem.width;
  const bool wide = is_wide(problem.squared, width);
  const auto squared_at = [&](int step, int half) {
    const std::int64_t row = 2 * share.pair(step) + half;
    return load(problem.squared + place.first_pixel + row * width + share.column, width - x, wide);
  };
  write_targets(
      problem, place, Scale<INT32_MAX>(state.deepest), words.quad(kInside, x, width),
      [&] { return words.quad(kTouches, x, width); }, squared_at);
}

}  // namespace semimoe
