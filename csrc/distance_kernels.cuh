// The kernels of csrc/distance.cu, as functions that every thread of a grid runs. There are two paths:
//
// - Cluster path: cluster_targets, on sm_90 and later, for images up to 256 x 256. A cluster computes an image, a block
// a
//   slab. Every block holds the bits of the whole image in shared memory. The squared distances stay in shared memory,
//   and the blocks exchange the largest ones. The mask is read once, the targets are written once.
// - General path, for all other images: pack, search_tiles, search_far, write_targets. search_far takes time in
// proportion
//   to the distance of a pixel; a single dot in a very large image is its worst case.
#pragma once

#include "slab.cuh"

namespace semimoe {

// State of an image: the largest squared distances, and which classes occur.
struct State {
  Deepest deepest;
  std::int32_t has_foreground;
  std::int32_t has_background;
};

constexpr std::int32_t kUnknown = INT32_MAX;  // a squared distance that search_far will compute

__device__ inline State& state_of(const Problem& problem, std::int64_t image) {
  return reinterpret_cast<State*>(problem.state)[image];
}

__device__ inline bool is_constant(const State& state) { return !state.has_foreground || !state.has_background; }

__device__ inline void raise_to(std::int32_t* shared, std::int32_t value) {
  // The value only grows, so that a stale read costs at most a needless atomic operation.
  if (*static_cast<volatile std::int32_t*>(shared) < value) atomicMax(shared, value);
}

__device__ inline void raise_to(Deepest* shared, const Deepest& values) {
  raise_to(&shared->inside, values.inside);
  raise_to(&shared->outside, values.outside);
}

template <class Element>
__device__ inline std::uint32_t pack_word(const Element* mask, int slab, int x, int height, int width) {
  std::uint32_t word = 0;
  for (int bit = 0; bit < kSlabRows; ++bit) {
    const int y = slab * kSlabRows + bit;
    const int nearest = y < height ? y : height - 1;  // rows below the image repeat its last row and so have no edge
    word |= static_cast<std::uint32_t>(mask[static_cast<std::int64_t>(nearest) * width + x] != 0) << bit;
  }
  return word;
}

// The classes of the slab's 32 pixels in column x, the top one in the lowest bit.
__device__ inline std::uint32_t pack_word(const Problem& problem, std::int64_t image, int slab, int x) {
  const auto pack = [&](auto zero) {
    const auto* mask = static_cast<const decltype(zero)*>(problem.mask) + image * problem.height * problem.width;
    return pack_word(mask, slab, x, problem.height, problem.width);
  };
  switch (problem.element_size) {
    case 1:
      return pack(std::uint8_t{});
    case 2:
      return pack(std::uint16_t{});
    case 4:
      return pack(std::uint32_t{});
    default:
      return pack(std::uint64_t{});
  }
}

__device__ inline Columns columns_of(const Problem& problem, std::int64_t image) {
  return {problem.bits + image * problem.slabs() * problem.width, problem.width, problem.slabs()};
}

// The slab and the tile that a block computes.
struct Place {
  std::int64_t image;
  int slab, tile, rows, first_column, columns;
  std::int64_t first_pixel;  // of the tile, in the batch

  __device__ Place(const Problem& problem, int block)
      : image(block / problem.tiles() / problem.slabs()),
        slab(block / problem.tiles() % problem.slabs()),
        tile(block % problem.tiles()),
        rows(min(kSlabRows, problem.height - slab * kSlabRows)),
        first_column(tile * kTileColumns),
        columns(min(kTileColumns, problem.width - first_column)),
        first_pixel((image * problem.height + slab * kSlabRows) * problem.width + first_column) {}
};

// ------------------------------------------------------------------------------------------------------- general path

// One thread per word.
__device__ inline void pack(const Problem& problem) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= problem.batch * problem.slabs() * problem.width) return;
  const std::int64_t image = i / problem.width / problem.slabs();
  const int slab = static_cast<int>(i / problem.width % problem.slabs());
  const std::uint32_t word = pack_word(problem, image, slab, static_cast<int>(i % problem.width));
  problem.bits[i] = word;
  State& state = state_of(problem, image);
  if (word != 0) raise_to(&state.has_foreground, 1);
  if (word != UINT32_MAX) raise_to(&state.has_background, 1);
}

// One block per tile of a slab.
__device__ inline void search_tiles(const Problem& problem, Slab& slab) {
  const Place place(problem, blockIdx.x);
  State& state = state_of(problem, place.image);
  if (is_constant(state)) {
    if (threadIdx.x == 0) problem.far[blockIdx.x] = 1;
    return;
  }
  const Columns columns = columns_of(problem, place.image);
  fill(slab, columns, place.slab, place.first_column, problem.width, place.rows,
       problem.gaps + place.first_pixel - place.first_column);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Deepest deepest;
  bool far = false;
  for (int pair = warp; 2 * pair < place.rows; pair += kWarps) {
    for (int x = 2 * lane; x < place.columns; x += 64) {
      const uint2 found = search(slab, pair, kReach + x);
      const auto keep = [&](int row, int column, std::int32_t squared) {
        if (row >= place.rows || column >= place.columns) return;
        far |= squared >= kFar;
        problem.squared[place.first_pixel + static_cast<std::int64_t>(row) * problem.width + column] =
            squared < kFar ? squared : kUnknown;
        const bool inside = columns.word(place.slab, place.first_column + column) >> row & 1;
        if (squared < kFar) deepest.include(squared, inside);
      };
      keep(2 * pair, x, low(found.x));
      keep(2 * pair, x + 1, low(found.y));
      keep(2 * pair + 1, x, high(found.x));
      keep(2 * pair + 1, x + 1, high(found.y));
    }
  }
  raise_to(&state.deepest, deepest);
  const bool any_far = __syncthreads_or(far);
  if (threadIdx.x == 0) problem.far[blockIdx.x] = any_far;
}

// Exact squared distance of one pixel of an image with both classes, without a limit.
__device__ inline std::int32_t far_distance(const Columns& columns, const Gap* gaps, int slab, int bit, int x,
                                            int width) {
  const auto inside = [&](int column) { return columns.word(slab, column) >> bit & 1; };
  const std::uint32_t own_class = inside(x);
  std::int32_t best = gaps[x] == kNoGap ? INT32_MAX : static_cast<std::int32_t>(gaps[x]) * gaps[x];
  for (int k = 1; k < width && k * k < best; ++k) {
    for (const int other : {x - k, x + k}) {
      if (other < 0 || other >= width) continue;
      const std::int32_t gap = inside(other) == own_class ? gaps[other] : 0;
      if (gap != kNoGap) best = min(best, k * k + gap * gap);
    }
  }
  return best;
}

// One block per tile of a slab: computes the distances that search_tiles left out.
__device__ inline void search_far(const Problem& problem) {
  if (!problem.far[blockIdx.x]) return;
  const Place place(problem, blockIdx.x);
  State& state = state_of(problem, place.image);
  const bool constant = is_constant(state);
  const Columns columns = columns_of(problem, place.image);
  for (int i = threadIdx.x; i < place.rows * kTileColumns; i += kThreads) {
    const int row = i / kTileColumns, x = i % kTileColumns;
    if (x >= place.columns) continue;
    const std::int64_t row_start = place.first_pixel - place.first_column + std::int64_t{row} * problem.width;
    std::int32_t& squared = problem.squared[row_start + place.first_column + x];
    if (constant) {
      squared = kNoDistance;
    } else if (squared == kUnknown) {
      squared = far_distance(columns, problem.gaps + row_start, place.slab, row, place.first_column + x, problem.width);
      const bool inside = columns.word(place.slab, place.first_column + x) >> row & 1;
      raise_to(inside ? &state.deepest.inside : &state.deepest.outside, squared);
    }
  }
}

// The largest distances of an image, which scale its signed distances.
struct Scale {
  float inside, outside;

  __device__ explicit Scale(const Deepest& deepest)
      : inside(square_root(deepest.inside)), outside(square_root(deepest.outside)) {}
};

__device__ inline void write_pixel(const Problem& problem, std::int64_t pixel, std::int32_t squared, bool foreground,
                                   const Scale& scale) {
  const float share = quotient(square_root(squared), foreground ? scale.inside : scale.outside);
  problem.sdf[pixel] = signed_distance(squared, foreground, share);
  problem.boundary[pixel] = on_ring(squared, foreground, problem.squared_ring_radius);
}

// One block per tile of a slab.
__device__ inline void write_targets(const Problem& problem) {
  const Place place(problem, blockIdx.x);
  const Scale scale(state_of(problem, place.image).deepest);
  const Columns columns = columns_of(problem, place.image);
  for (int x = threadIdx.x; x < place.columns; x += kThreads) {
    const std::uint32_t word = columns.word(place.slab, place.first_column + x);
    for (int row = 0; row < place.rows; ++row) {
      const std::int64_t pixel = place.first_pixel + std::int64_t{row} * problem.width + x;
      write_pixel(problem, pixel, problem.squared[pixel], word >> row & 1, scale);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- cluster path

struct ClusterMemory {
  Slab slab;
  std::uint32_t bits[kMostSlabs][kTileColumns];
  Deepest deepest[kMostSlabs];  // by slab
};

// The squared distances of a row. They overwrite the heights of its pair of rows: the upper row, then the lower one.
__device__ inline std::int32_t* squared_row(Slab& slab, int row) {
  return reinterpret_cast<std::int32_t*>(slab.heights[row / 2]) + row % 2 * kTileColumns;
}

// The squared gap in 32 bits. Without a gap, it is large, but sums with it do not overflow.
__device__ inline std::int32_t exact_height(const Columns& columns, int slab, int bit, int x) {
  const int gap = distance_to_edge(columns.edges(slab, x), bit, columns.back(slab, x), columns.ahead(slab, x));
  return is_distance(gap) ? gap * gap : 1 << 29;
}

// Exact squared distance of one pixel of an image with both classes; `best` is an upper bound.
__device__ inline std::int32_t exact_search(const std::int32_t* heights, int x, int width, std::int32_t best) {
  for (int k = 0; k < width && k * k < best; ++k) {
    if (x - k >= 0) best = min(best, heights[x - k] + k * k);
    if (x + k < width) best = min(best, heights[x + k] + k * k);
  }
  return best;
}

// Called by all lanes of a warp. Stores the squared distances of a row. found: the search's result for the pixels
// 64 stride + 2 lane + (0, 1). During an exact search, the memory of the pair's lower row holds exact heights.
__device__ inline void store_row(Slab& slab, const Columns& columns, int index, int row, int width,
                                 const uint2 (&found)[kStrides]) {
  const int lane = threadIdx.x % 32;
  std::int32_t squared[kStrides][2];
  bool far = false;
#pragma unroll
  for (int stride = 0; stride < kStrides; ++stride) {
    squared[stride][0] = row % 2 ? high(found[stride].x) : low(found[stride].x);
    squared[stride][1] = row % 2 ? high(found[stride].y) : low(found[stride].y);
    far |= max(squared[stride][0], squared[stride][1]) >= kFar;
  }
  if (__any_sync(UINT32_MAX, far)) {
    std::int32_t* heights = squared_row(slab, row | 1);
    __syncwarp();
    for (int x = lane; x < width; x += 32) heights[x] = exact_height(columns, index, row, x);
    __syncwarp();
#pragma unroll
    for (int stride = 0; stride < kStrides; ++stride) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int x = 64 * stride + 2 * lane + column;
        if (x >= width || squared[stride][column] < kFar) continue;
        const int run = run_distance(slab, row, kReach + x);
        squared[stride][column] = exact_search(heights, x, width, is_distance(run) ? run * run : INT32_MAX);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int stride = 0; stride < kStrides; ++stride)
    *reinterpret_cast<int2*>(squared_row(slab, row) + 64 * stride + 2 * lane) = {squared[stride][0],
                                                                                 squared[stride][1]};
}

__device__ inline void search_slab(Slab& slab, const Columns& columns, int index, int width, int rows) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int pair = warp; 2 * pair < rows; pair += kWarps) {
    uint2 found[kStrides] = {};
#pragma unroll
    for (int stride = 0; stride < kStrides; ++stride) {
      const int x = 64 * stride + 2 * lane;
      if (x < width) found[stride] = search(slab, pair, kReach + x);
    }
    __syncwarp();  // all lanes have read the heights of this pair
    store_row(slab, columns, index, 2 * pair, width, found);
    store_row(slab, columns, index, 2 * pair + 1, width, found);
  }
}

#ifdef SEMIMOE_CLUSTERS
// One cluster per image, one block per slab.
__device__ inline void cluster_targets(const Problem& problem, ClusterMemory& memory) {
  const Place place(problem, blockIdx.x);
  const int x = threadIdx.x, slabs = problem.slabs();
  const bool in_image = x < problem.width;
  const std::uint32_t own = in_image ? pack_word(problem, place.image, place.slab, x) : 0;
  if (x < slabs) memory.deepest[x] = {};
  cluster_sync();  // from here on, the other blocks' shared memory exists
  if (in_image)
    for (int other = 0; other < slabs; ++other) *in_block(other, &memory.bits[place.slab][x]) = own;
  cluster_sync();

  const Columns columns{&memory.bits[0][0], kTileColumns, slabs};
  bool background = false, foreground = false;
  for (int slab = 0; slab < slabs && in_image; ++slab) {
    background |= columns.word(slab, x) != UINT32_MAX;
    foreground |= columns.word(slab, x) != 0;
  }
  const bool constant = !__syncthreads_or(background) | !__syncthreads_or(foreground);
  if (!constant) {
    fill(memory.slab, columns, place.slab, 0, problem.width, place.rows, nullptr);
    search_slab(memory.slab, columns, place.slab, problem.width, place.rows);
  }
  __syncthreads();

  Deepest deepest;
  const auto squared_at = [&](int row) { return constant ? kNoDistance : squared_row(memory.slab, row)[x]; };
  for (int row = 0; row < place.rows && in_image; ++row) {
    const std::int32_t squared = squared_at(row);
    deepest.include(squared, own >> row & 1);
    if (!problem.sdf) problem.squared[place.first_pixel + std::int64_t{row} * problem.width + x] = squared;
  }
  if (!problem.sdf) return;  // in all blocks alike, and after their last access to each other's memory

  for (int distance = 16; distance > 0; distance /= 2)
    deepest.include({__shfl_xor_sync(UINT32_MAX, deepest.inside, distance),
                     __shfl_xor_sync(UINT32_MAX, deepest.outside, distance)});
  if (x % 32 < slabs) {
    Deepest* there = in_block(x % 32, &memory.deepest[place.slab]);
    atomicMax(&there->inside, deepest.inside);
    atomicMax(&there->outside, deepest.outside);
  }
  cluster_sync();
  Deepest overall;
  for (int slab = 0; slab < slabs; ++slab) overall.include(memory.deepest[slab]);
  const Scale scale(overall);
  for (int row = 0; row < place.rows && in_image; ++row)
    write_pixel(problem, place.first_pixel + std::int64_t{row} * problem.width + x, squared_at(row), own >> row & 1,
                scale);
}
#endif

}  // namespace semimoe
