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

// -------------------------------------------------------------------------------------------------------------- marks

// The marks of a pixel whose neighbors are above, to the left, below and to the right; outside the image, `here`
// stands for them. Masks have two labels, foreground and background, so that these are the parities of their runs.
template <bool instances, class Label>
inline std::uint8_t mark(Label here, Label above, Label left, Label below, Label right) {
  if (!instances)
    return (here != 0) * (kForeground | kOdd) | ((here != 0) != (above != 0)) * kDiffersAbove |
           ((here != 0) != (left != 0)) * kDiffersLeft;
  const auto touches = [here](Label other) { return (here != other) & (other != 0); };
  const bool touching = (here != 0) & (touches(above) | touches(left) | touches(below) | touches(right));
  return (here != 0) * kForeground | (here != above) * kDiffersAbove | (here != left) * kDiffersLeft |
         touching * kTouches;
}

// Sets kOdd in every second run of a row, eight pixels at a time.
void mark_odd_runs(std::uint8_t* marks, int width) {
  constexpr std::uint64_t kOnes = 0x0101010101010101;  // one in every byte
  std::uint64_t odd = 0;                               // kOnes or 0: whether the run of the pixel before is odd
  int x = 0;
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  for (; x + 8 <= width; x += 8) {
    std::uint64_t word;
    std::memcpy(&word, marks + x, 8);
    // the product adds to each byte the bytes of the pixels before it, that is, it counts the ends of runs
    const std::uint64_t odds = ((word / kDiffersLeft & kOnes) * kOnes ^ odd) & kOnes;
    word |= odds * kOdd;
    std::memcpy(marks + x, &word, 8);
    odd = (odds >> 56) * kOnes;
  }
#endif
  for (; x < width; ++x) {
    odd ^= marks[x] / kDiffersLeft & 1;
    marks[x] |= (odd & 1) * kOdd;
  }
}

template <bool instances, class Label>
std::uint8_t mark_rows(const Label* labels, int height, int width, int begin, int end, std::uint8_t* __restrict marks) {
  std::uint8_t any = 0;
  for (int y = begin, next; y < end; y = next) {
    next = y == 0 || y == height - 1 ? y + 1 : end < height ? end : height - 1;  // rows with the same neighbors
    const std::int64_t first = y * std::int64_t{width}, last = next * std::int64_t{width};
    const Label *above = labels - (y > 0 ? width : 0), *below = labels + (y < height - 1 ? width : 0);
    const auto at = [&](std::int64_t i, std::int64_t left, std::int64_t right) {
      return mark<instances>(labels[i], above[i], labels[left], below[i], labels[right]);
    };
    // All rows at once, because vectors are long. The first and the last column have neighbors in other rows and
    // therefore come again.
    for (std::int64_t i = first + 1; i < last - 1; ++i) marks[i] = at(i, i - 1, i + 1);
    for (std::int64_t i = first; i < last; i += width) {
      const std::int64_t right = i + width - 1;
      marks[i] = at(i, i, width > 1 ? i + 1 : i);
      marks[right] = at(right, width > 1 ? right - 1 : right, right);
      if (instances) mark_odd_runs(marks + i, width);
    }
    for (std::int64_t i = first; i < last; ++i) any |= marks[i];
  }
  return any;
}

template <class Label>
std::uint8_t mark_rows(const void* labels, bool instances, int height, int width, int begin, int end,
                       std::uint8_t* marks) {
  const auto mark = instances ? mark_rows<true, Label> : mark_rows<false, Label>;
  return mark(static_cast<const Label*>(labels), height, width, begin, end, marks);
}

std::uint8_t mark_rows(const void* labels, int element_size, bool instances, int height, int width, int begin, int end,
                       std::uint8_t* marks) {
  const auto mark = element_size == 1   ? mark_rows<std::uint8_t>
                    : element_size == 2 ? mark_rows<std::uint16_t>
                    : element_size == 4 ? mark_rows<std::uint32_t>
                                        : mark_rows<std::uint64_t>;
  return mark(labels, instances, height, width, begin, end, marks);
}

// ------------------------------------------------------------------------------------------------------------ columns

// The gap of a pixel from the gap of its neighbor: 1 if their labels differ, else one more.
template <class Gap, Gap kMost>
inline Gap next_gap(Gap gap, bool differs) {
  const Gap grown = static_cast<Gap>(gap + (gap != kMost));
  return differs ? Gap{1} : grown;
}

void near_gaps(const std::uint8_t* marks, int height, int width, int begin, int end, std::uint8_t* gaps) {
  const std::int64_t stride = width;
  for (int x = begin; x < end; ++x) gaps[x] = kReach;
  for (int y = 1; y < height; ++y) {
    const std::uint8_t* here = marks + y * stride;
    std::uint8_t *gap = gaps + y * stride, *gap_above = gap - stride;
    for (int x = begin; x < end; ++x) gap[x] = next_gap<std::uint8_t, kReach>(gap_above[x], here[x] & kDiffersAbove);
  }
  for (int y = height - 2; y >= 0; --y) {
    const std::uint8_t* below = marks + (y + 1) * stride;
    std::uint8_t *gap = gaps + y * stride, *gap_below = gap + stride;
    for (int x = begin; x < end; ++x) {
      const std::uint8_t up = next_gap<std::uint8_t, kReach>(gap_below[x], below[x] & kDiffersAbove);
      gap[x] = up < gap[x] ? up : gap[x];
    }
  }
}

// The gaps of one row at a time, to the nearest pixel of another label in one direction.
class RowGaps {
 public:
  RowGaps(const std::uint8_t* marks, int width, int begin, int end)
      : marks_(marks + begin), width_(width), count_(end - begin) {
    for (int x = 0; x < count_; ++x) gaps_[x] = kNoGap;
  }

  // Moves to an adjacent row.
  void step(int from, int to) {
    const std::uint8_t* lower = marks_ + (from > to ? from : to) * width_;
    for (int x = 0; x < count_; ++x) gaps_[x] = next_gap<Gap, kNoGap>(gaps_[x], lower[x] & kDiffersAbove);
  }

  // gaps[x] = min(gaps[x], gap of this row at x).
  void lower(Gap* gaps) const {
    for (int x = 0; x < count_; ++x) gaps[x] = gaps_[x] < gaps[x] ? gaps_[x] : gaps[x];
  }

 private:
  const std::uint8_t* marks_;
  std::int64_t width_;
  int count_;
  Gap gaps_[kStripColumns];
};

void far_gaps(const std::uint8_t* marks, int height, int width, int begin, int end, const int* rows, int count,
              Gap* gaps) {
  const auto row = [&](int i) { return gaps + static_cast<std::int64_t>(i) * width; };
  for (int i = 0; i < count; ++i)
    for (int x = begin; x < end; ++x) row(i)[x] = kNoGap;
  RowGaps down(marks, width, begin, end), up(marks, width, begin, end);
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
#ifdef SEMIMOE_AVX512
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

// The heights of a row for its odd or its even runs: the squared gap in these runs, 0 in the others, kFar outside the
// row.
class Heights {
 public:
  static std::int64_t words(int width) { return 2 * kMargin + 2 * round_up(width); }

  Heights(int width, Word* memory) : heights_(memory + kMargin), above_(heights_ + round_up(width) + kMargin) {
    for (int x = -kMargin; x < 0; ++x) heights_[x] = kFar;
    for (int x = width; x < round_up(width) + kMargin; ++x) heights_[x] = kFar;
    for (int x = 0; x < round_up(width); ++x) above_[x] = 0;
  }

  Word* row() { return heights_; }

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

// Writes the heights of a row, and all ones in the foreground.
void prepare_row(const std::uint8_t* marks, const std::uint8_t* gaps, int width, Word* __restrict odd,
                 Word* __restrict even, Word* __restrict foreground) {
  for (int x = 0; x < width; ++x) {
    const Word height = static_cast<Word>(gaps[x] * gaps[x]);
    const Word is_odd = static_cast<Word>(-(marks[x] / kOdd & 1));
    odd[x] = height & is_odd;
    even[x] = height & static_cast<Word>(~is_odd);
    foreground[x] = static_cast<Word>(-(marks[x] / kForeground));
  }
}

std::int64_t row_scratch(int width) { return 2 * Heights::words(width) + 3 * round_up(width); }

void search_rows(const std::uint8_t* marks, const std::uint8_t* gaps, int rows, int width, Word* scratch,
                 std::int32_t* squared, Deepest* deepest) {
  Heights odd(width, scratch), even(width, scratch + Heights::words(width));
  Word* nearest = scratch + 2 * Heights::words(width);
  Word *wanted = nearest + round_up(width), *foreground = wanted + round_up(width);
  for (int x = 0; x < round_up(width); ++x) {
    wanted[x] = x < width ? UINT16_MAX : 0;
    foreground[x] = 0;
  }

  for (int y = 0; y < rows; ++y, marks += width, gaps += width, squared += width) {
    prepare_row(marks, gaps, width, odd.row(), even.row(), foreground);
    Words deepest_inside = broadcast(0), deepest_outside = broadcast(0);
    for (int x = 0; x < width; x += kLanes) {
      const Words in_row = load(wanted + x);
      const Words found = maximum(odd.nearest(x, in_row), even.nearest(x, in_row));  // one of them is 0
      const Words inside = minimum(found, load(foreground + x));
      deepest_inside = maximum(deepest_inside, inside);
      deepest_outside = maximum(deepest_outside, subtract(found, inside));
      store(nearest + x, found);
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
#if defined(__FMA__) && defined(SEMIMOE_VECTOR_EXTENSION)
  float result = a * reciprocal;
  for (int i = 0; i < 2; ++i) result = __builtin_fmaf(__builtin_fmaf(-result, b, a), reciprocal, result);
  return result;
#else
  return a / b;
#endif
}

// share: the distance divided by the image's largest of the same sign. Negative outside, 0 on the inner boundary.
inline float signed_distance(std::int32_t squared, bool foreground, float share) {
  const float magnitude = squared == kNoDistance ? 1.0f : foreground && squared == 1 ? 0.0f : share;
  return foreground ? magnitude : -magnitude;
}

// The ring is the mask's dilation by a disk, minus the mask.
inline std::uint8_t on_ring(std::int32_t squared, bool foreground, std::int32_t squared_ring_radius) {
  return !foreground & (squared != kNoDistance) & (squared <= squared_ring_radius);
}

void write_targets(const std::uint8_t* marks, std::int64_t count, const Deepest& deepest,
                   std::int32_t squared_ring_radius, void* squared_to_sdf, std::uint8_t* boundary) {
  const float inside = square_root(deepest.inside), outside = square_root(deepest.outside);
  const float per_inside = 1 / inside, per_outside = 1 / outside;
  char* memory = static_cast<char*>(squared_to_sdf);
  for (std::int64_t i = 0; i < count; ++i) {
    const bool foreground = is_foreground(marks[i]);
    std::int32_t squared;
    std::memcpy(&squared, memory + 4 * i, 4);
    const float share =
        quotient(square_root(squared), foreground ? inside : outside, foreground ? per_inside : per_outside);
    const float sdf = signed_distance(squared, foreground, share);
    boundary[i] = on_ring(squared, foreground, squared_ring_radius) | (marks[i] & kTouches);
    std::memcpy(memory + 4 * i, &sdf, 4);
  }
}

#define SEMIMOE_TEXT(name) #name
#define SEMIMOE_NAME(name) SEMIMOE_TEXT(name)

}  // namespace

extern const ObjectiveKernels objective_kernels;              // in objective_kernels.cpp
extern const BatchNormKernels batch_norm_kernels[kElements];  // in batch_norm_kernels.cpp
extern const BlurKernels blur_kernels;                        // in blur_kernels.cpp
extern const PoolingKernels pooling_kernels[kElements];       // in pooling_kernels.cpp
extern const Kernels kernels;
const Kernels kernels = {
    SEMIMOE_NAME(SEMIMOE_SIMD),
    kReach,
    row_scratch,
    mark_rows,
    near_gaps,
    far_gaps,
    search_rows,
    write_targets,
    &objective_kernels,
    batch_norm_kernels,
    &blur_kernels,
    pooling_kernels,
};

}  // namespace SEMIMOE_SIMD
}  // namespace semimoe
