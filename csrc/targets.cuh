// Which pixels of a tile a thread searches, their largest distances, and the writing of the targets. csrc/distance.cu
// has two paths, which share this, and both take time linear in the pixels for every mask:
//
// - cluster_path.cuh, on sm_90 and later, for images up to 256 x 256. A cluster computes an image, a block a slab. The
//   blocks exchange the edges along the columns and the largest distances. The squared distances stay in registers. The
//   labels are read once, the targets are written once.
// - general_path.cuh, for all other images, in five kernels: read, carry, search_tiles, search_far, write_targets.
#pragma once

#include "far.cuh"
#include "rounding.cuh"
#include "slab.cuh"

namespace semimoe {

// Four neighbors in a row.
template <class Value>
struct alignas(sizeof(Value) * kQuad) Four {
  Value of[kQuad];
};

// The pixels of a thread: in the four columns from `column` of the tile on, the rows of the pairs pair(0), pair(1), ...
// A warp has 32 columns, so that its distances are similar.
struct Share {
  static constexpr int kLanes = 32 / kQuad;      // of a warp, along a row
  static constexpr int kPairStep = 32 / kLanes;  // pairs of rows that a warp visits at once
  static constexpr int kSteps = kPairs / kPairStep;

  int column, first_pair;

  __device__ Share()
      : column(static_cast<int>(threadIdx.x / 32 * 32 + threadIdx.x % kLanes * kQuad)),
        first_pair(static_cast<int>(threadIdx.x % 32 / kLanes)) {}

  __device__ int pair(int step) const { return first_pair + step * kPairStep; }
};

// The squared distances of a thread's pixels, as search returns them.
struct Found {
  Quad steps[Share::kSteps];

  // Of row 2 pair(step) + half.
  __device__ Four<std::int32_t> squared(int step, int half) const {
    Four<std::int32_t> row;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const std::uint32_t words = steps[step].column[i];
      row.of[i] = half ? high(words) : low(words);
    }
    return row;
  }
};

// Searches the slab. Pixels outside the image get a squared distance of 0. The loop is not unrolled, because its body
// is long; so the results move through the registers.
__device__ inline Found search(const Slab& slab, const Place& place) {
  const Share share;
  const int columns = place.columns - share.column;
  Found found = {};
#pragma unroll 1
  for (int step = 0; step < Share::kSteps; ++step) {
    const int rows = place.rows - 2 * share.pair(step);
    Quad quad = {};
    if (rows > 0 && columns > 0) quad = search(slab, share.pair(step), share.column);
    if (rows < 2 || columns < kQuad) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        quad.column[i] = i < columns ? quad.column[i] & (rows == 1 ? 0xffff : UINT32_MAX) : 0;
    }
#pragma unroll
    for (int i = 0; i + 1 < Share::kSteps; ++i) found.steps[i] = found.steps[i + 1];
    found.steps[Share::kSteps - 1] = quad;
  }
  return found;
}

// The largest squared distances of a thread's pixels. foreground: the words of its four columns.
__device__ inline Deepest deepest_of(const Found& found, const Quad& foreground) {
  const Share share;
  std::uint32_t inside = 0, outside = 0;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const std::uint32_t word = foreground.column[i] >> 2 * share.first_pair;
#pragma unroll
    for (int step = 0; step < Share::kSteps; ++step) {
      const std::uint32_t rows = word >> 2 * Share::kPairStep * step;
      const std::uint32_t mask = ((rows & 1) | (rows & 2) << 15) * 0xffff, words = found.steps[step].column[i];
      inside = __vmaxu2(inside, words & mask);
      outside = __vmaxu2(outside, words & ~mask);
    }
  }
  return {max(low(inside), high(inside)), max(low(outside), high(outside))};
}

// Whether quads of a result are accessed at once.
template <class Value>
__device__ inline bool is_wide(const Value* result, int width) {
  return width % kQuad == 0 && reinterpret_cast<std::uintptr_t>(result) % sizeof(Four<Value>) == 0;
}

template <class Value>
__device__ inline void store(Value* row, const Four<Value>& values, int columns, bool wide) {
  if (wide) {
    *reinterpret_cast<Four<Value>*>(row) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (i < columns) row[i] = values.of[i];
}

template <class Value>
__device__ inline Four<Value> load(const Value* row, int columns, bool wide) {
  if (wide) return *reinterpret_cast<const Four<Value>*>(row);
  Four<Value> values;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) values.of[i] = i < columns ? row[i] : Value{1};
  return values;
}

// Writes the pixels of a thread. squared_at(step, half): squared distances of row 2 pair(step) + half.
template <class SquaredAt>
__device__ inline void write_squared(const Problem& problem, const Place& place, const SquaredAt& squared_at) {
  const Share share;
  const bool wide = is_wide(problem.squared, problem.width);
  const int columns = place.columns - share.column;
  if (columns <= 0) return;
#pragma unroll
  for (int step = 0; step < Share::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * share.pair(step) + half;
      if (row >= place.rows) continue;
      const std::int64_t first = place.first_pixel + std::int64_t{row} * problem.width + share.column;
      store(problem.squared + first, squared_at(step, half), columns, wide);
    }
  }
}

// The same for the targets of an image that is not constant. foreground: the words of the thread's columns; touches():
// those of the pixels that touch another instance.
template <class Scale, class Touches, class SquaredAt>
__device__ inline void write_targets(const Problem& problem, const Place& place, const Scale& scale, Quad foreground,
                                     const Touches& touches, const SquaredAt& squared_at) {
  const Share share;
  const bool wide = is_wide(problem.sdf, problem.width) && is_wide(problem.boundary, problem.width);
  const int columns = place.columns - share.column, shift = 2 * share.first_pair;
  if (columns <= 0) return;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) foreground.column[i] >>= shift;
#pragma unroll
  for (int step = 0; step < Share::kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 2 * share.pair(step) + half, bit = 2 * Share::kPairStep * step + half;
      if (row >= place.rows) continue;
      const Four<std::int32_t> squared = squared_at(step, half);
      Four<float> sdf;
      Four<std::uint8_t> boundary;
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const bool inside = foreground.column[i] >> bit & 1;
        sdf.of[i] = scale.sdf(squared.of[i], inside);
        boundary.of[i] = !inside & (squared.of[i] <= problem.squared_ring_radius);
      }
      if (problem.instances) {
        const Quad words = touches();
#pragma unroll
        for (int i = 0; i < kQuad; ++i) boundary.of[i] |= words.column[i] >> row & 1;
      }
      const std::int64_t first = place.first_pixel + std::int64_t{row} * problem.width + share.column;
      store(problem.sdf + first, sdf, columns, wide);
      store(problem.boundary + first, boundary, columns, wide);
    }
  }
}

// Writes the targets of a tile of a constant image; the words of its pixels are all ones or all zeros.
__device__ inline void write_constant(const Problem& problem, const Place& place, bool foreground) {
  for (int row = 0; row < place.rows && static_cast<int>(threadIdx.x) < place.columns; ++row) {
    const std::int64_t pixel = place.first_pixel + std::int64_t{row} * problem.width + threadIdx.x;
    if (problem.sdf) {
      problem.sdf[pixel] = foreground ? 1.0f : -1.0f;
      problem.boundary[pixel] = 0;
    } else {
      problem.squared[pixel] = kNoDistance;
    }
  }
}

}  // namespace semimoe
