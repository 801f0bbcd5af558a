// See kernels.hpp. This file is compiled once per instruction set; SEMIMOE_SIMD is the set's name.
//
// Everything here has internal linkage and calls no function of the standard library: of an inline function the linker
// keeps only one copy, which might use instructions that the processor lacks.
#include "kernels.hpp"

#include <cstring>

#include "lanes.hpp"
#include "pixel.hpp"

namespace semimoe {
namespace SEMIMOE_SIMD {
namespace {

constexpr int kSteps = 6;    // steps of the search between two checks for its end
constexpr int kReach = 252;  // the longest distance of the search
constexpr Word kFar = kReach * kReach;
constexpr int kSafeSteps = 42;  // up to this k, k^2 + kFar fits into a word; beyond, sums saturate
constexpr int kMargin = 256;    // words on both sides of a row, which the search may read

static_assert(kReach % kSteps == 0 && kReach * kReach <= UINT16_MAX && kReach <= UINT8_MAX && kReach < kMargin);
static_assert(kSafeSteps % kSteps == 0 && kSafeSteps * kSafeSteps + kFar <= UINT16_MAX);

inline int round_up(int width) { return (width + kLanes - 1) / kLanes * kLanes; }

// ------------------------------------------------------------------------------------------------------------ columns

// The gap of a pixel from the gap of its neighbor: one more in the same class, else 1.
template <class Gap, Gap kMost>
inline Gap next_gap(Gap gap, std::uint8_t neighbor, std::uint8_t here) {
  const Gap grown = static_cast<Gap>(gap + (gap != kMost));
  return (neighbor != 0) == (here != 0) ? grown : Gap{1};
}

void near_gaps(const std::uint8_t* mask, int height, int width, int begin, int end, std::uint8_t* gaps) {
  const std::int64_t stride = width;
  for (int x = begin; x < end; ++x) gaps[x] = kReach;
  for (int y = 1; y < height; ++y) {
    const std::uint8_t *here = mask + y * stride, *above = here - stride;
    std::uint8_t *gap = gaps + y * stride, *gap_above = gap - stride;
    for (int x = begin; x < end; ++x) gap[x] = next_gap<std::uint8_t, kReach>(gap_above[x], above[x], here[x]);
  }
  for (int y = height - 2; y >= 0; --y) {
    const std::uint8_t *here = mask + y * stride, *below = here + stride;
    std::uint8_t *gap = gaps + y * stride, *gap_below = gap + stride;
    for (int x = begin; x < end; ++x) {
      const std::uint8_t up = next_gap<std::uint8_t, kReach>(gap_below[x], below[x], here[x]);
      gap[x] = up < gap[x] ? up : gap[x];
    }
  }
}

// The gaps of one row at a time, to the nearest pixel of the opposite class in one direction.
class RowGaps {
 public:
  RowGaps(const std::uint8_t* mask, int width, int begin, int end)
      : mask_(mask + begin), width_(width), count_(end - begin) {
    for (int x = 0; x < count_; ++x) gaps_[x] = kNoGap;
  }

  // Moves to an adjacent row.
  void step(int from, int to) {
    const std::uint8_t *neighbor = mask_ + from * width_, *here = mask_ + to * width_;
    for (int x = 0; x < count_; ++x) gaps_[x] = next_gap<Gap, kNoGap>(gaps_[x], neighbor[x], here[x]);
  }

  // gaps[x] = min(gaps[x], gap of this row at x).
  void lower(Gap* gaps) const {
    for (int x = 0; x < count_; ++x) gaps[x] = gaps_[x] < gaps[x] ? gaps_[x] : gaps[x];
  }

 private:
  const std::uint8_t* mask_;
  std::int64_t width_;
  int count_;
  Gap gaps_[kStripColumns];
};

void far_gaps(const std::uint8_t* mask, int height, int width, int begin, int end, const int* rows, int count,
              Gap* gaps) {
  const auto row = [&](int i) { return gaps + static_cast<std::int64_t>(i) * width; };
  for (int i = 0; i < count; ++i)
    for (int x = begin; x < end; ++x) row(i)[x] = kNoGap;
  RowGaps down(mask, width, begin, end), up(mask, width, begin, end);
  for (int i = 0, y = 0; i < count; ++i) {
    for (; y < rows[i]; ++y) down.step(y, y + 1);
    down.lower(row(i) + begin);
  }
  for (int i = count - 1, y = height - 1; i >= 0; --i) {
    for (; y > rows[i]; --y) up.step(y, y - 1);
    up.lower(row(i) + begin);
  }
}

// --------------------------------------------------------------------------------------------------------------- rows

inline Word largest(Words words) {
  Word lanes[kLanes], result = 0;
  store(lanes, words);
  for (int i = 0; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// The square of k in every lane. Without AVX-512 a load from a table is faster than a broadcast of a 16-bit register;
// the table holds each square twice, because 32-bit loads broadcast in one instruction.
#ifdef __AVX512BW__
inline Words square(int k) { return broadcast(static_cast<Word>(k * k)); }
#else
struct Squares {
  std::uint32_t pairs[kReach + kSteps] = {};
  constexpr Squares() {
    for (std::uint32_t k = 0; k < kReach + kSteps; ++k) pairs[k] = (k * k & UINT16_MAX) * 0x10001;
  }
};
constexpr Squares kSquares;
inline Words square(int k) { return broadcast_pair(kSquares.pairs[k]); }
#endif

// Returns min(nearest, min over k in [first, last] of k^2 + heights[x +- k]) for the lanes x at `heights`. Ends early
// once k^2 is not below any lane's minimum.
template <Words (*plus)(Words, Words)>
inline Words search(const Word* heights, int first, int last, Words nearest) {
  for (int k = first; k <= last && any_above(nearest, square(k)); k += kSteps) {
    Words candidates[kSteps];
    for (int i = 0; i < kSteps; ++i) {
      const Words height = minimum(load(heights - k - i), load(heights + k + i));
      candidates[i] = plus(height, square(k + i));
    }
    for (int i = 0; i < kSteps; i += 2) nearest = minimum(nearest, minimum(candidates[i], candidates[i + 1]));
  }
  return nearest;
}

// The heights of a row for one class: the squared gap at pixels of this class, 0 at pixels of the other class, kFar
// outside the row.
class Heights {
 public:
  static std::int64_t words(int width) { return 2 * kMargin + 2 * round_up(width); }

  Heights(int width, Word* memory) : heights_(memory + kMargin), above_(heights_ + round_up(width) + kMargin) {
    for (int x = -kMargin; x < 0; ++x) heights_[x] = kFar;
    for (int x = width; x < round_up(width) + kMargin; ++x) heights_[x] = kFar;
    for (int x = 0; x < round_up(width); ++x) above_[x] = 0;
  }

  Word& operator[](int x) { return heights_[x]; }

  // Squared distances of the lanes at x. `wanted` is all ones in the row and 0 beyond its end, where the result is 0.
  Words nearest(int x, Words wanted) {
    // If all lanes were too far in the row above, these are too far or nearly so: skip the search. kFar only means that
    // envelope.hpp computes the exact distance.
    if (!any_above(broadcast(kFar), load(above_ + x))) return broadcast(kFar);
    const Words start = minimum(load(heights_ + x), wanted);
    const Words near = search<add>(heights_ + x, 1, kSafeSteps, start);
    const Words found = search<add_saturating>(heights_ + x, kSafeSteps + 1, kReach, near);
    store(above_ + x, found);
    return found;
  }

 private:
  Word* heights_;
  Word* above_;  // squared distances of the row above
};

std::int64_t row_scratch(int width) { return 2 * Heights::words(width) + 2 * round_up(width); }

void search_rows(const std::uint8_t* mask, const std::uint8_t* gaps, int rows, int width, Word* scratch,
                 std::int32_t* squared, Deepest* deepest) {
  Heights inside(width, scratch), outside(width, scratch + Heights::words(width));
  Word* nearest = scratch + 2 * Heights::words(width);
  Word* wanted = nearest + round_up(width);
  for (int x = 0; x < round_up(width); ++x) wanted[x] = x < width ? UINT16_MAX : 0;

  for (int y = 0; y < rows; ++y, mask += width, gaps += width, squared += width) {
    for (int x = 0; x < width; ++x) {
      const Word height = static_cast<Word>(gaps[x] * gaps[x]);
      inside[x] = mask[x] ? height : Word{0};
      outside[x] = mask[x] ? Word{0} : height;
    }
    Words deepest_inside = broadcast(0), deepest_outside = broadcast(0);
    for (int x = 0; x < width; x += kLanes) {
      const Words in = inside.nearest(x, load(wanted + x));
      const Words out = outside.nearest(x, load(wanted + x));
      deepest_inside = maximum(deepest_inside, in);
      deepest_outside = maximum(deepest_outside, out);
      store(nearest + x, maximum(in, out));  // one of them is 0
    }
    for (int x = 0; x < width; ++x) squared[x] = nearest[x];
    deepest[y] = {largest(deepest_inside), largest(deepest_outside)};
  }
}

// ------------------------------------------------------------------------------------------------------------ targets

// a / b, correctly rounded, given 1 / b; faster than a division. A fused multiply-add computes the remainder exactly.
// The first correction finds one of the two floats next to the quotient; the second rounds it correctly (P. Markstein,
// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990).
inline float quotient(float a, float b, [[maybe_unused]] float reciprocal) {
#ifdef __FMA__
  float result = a * reciprocal;
  for (int i = 0; i < 2; ++i) result = __builtin_fmaf(__builtin_fmaf(-result, b, a), reciprocal, result);
  return result;
#else
  return a / b;
#endif
}

void write_targets(const std::uint8_t* mask, std::int64_t count, const Deepest& deepest,
                   std::int32_t squared_ring_radius, void* squared_to_sdf, std::uint8_t* boundary) {
  const float inside = square_root(deepest.inside), outside = square_root(deepest.outside);
  const float per_inside = 1 / inside, per_outside = 1 / outside;
  char* memory = static_cast<char*>(squared_to_sdf);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool foreground = mask[i] != 0;
    std::int32_t squared;
    std::memcpy(&squared, memory + 4 * i, 4);
    const float share =
        quotient(square_root(squared), foreground ? inside : outside, foreground ? per_inside : per_outside);
    const float sdf = signed_distance(squared, foreground, share);
    boundary[i] = on_ring(squared, foreground, squared_ring_radius);
    std::memcpy(memory + 4 * i, &sdf, 4);
  }
}

#define SEMIMOE_TEXT(name) #name
#define SEMIMOE_NAME(name) SEMIMOE_TEXT(name)

}  // namespace

extern const ObjectiveKernels objective_kernels;  // in objective_kernels.cpp
extern const Kernels kernels;
const Kernels kernels = {
    SEMIMOE_NAME(SEMIMOE_SIMD), kReach, row_scratch, near_gaps, far_gaps, search_rows, write_targets,
    &objective_kernels,
};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
