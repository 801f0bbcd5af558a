// Squared distances along a row in linear time, whatever the distances.
//
// A row consists of runs of equal label. A run ends next to pixels of another label, so that the minimum for a pixel is
// never beyond these. With [a, b) the pixel's run,
//
//     d^2(x) = min over x' in [a - 1, b] of (x - x')^2 + f(x'),   f = gap^2 in the run, 0 at its two neighbors.
//
// This is the lower envelope of parabolas, computed in linear time and in integers (A. Meijster, J. Roerdink, W.
// Hesselink, "A general algorithm for computing distance transforms in linear time", 2000).
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.hpp"
#include "pixel.hpp"

namespace semimoe {

// The lower envelope of the parabolas (x - center)^2 + height, restricted to the pixels [begin, end) of one run.
class Envelope {
 public:
  explicit Envelope(int width) : pieces_(static_cast<std::size_t>(width) + 2) {}

  void start(int begin, int end) {
    begin_ = begin;
    end_ = end;
    count_ = 0;
  }

  // Call it with increasing centers.
  void add(int center, std::int32_t height) {
    while (count_ > 0 && value(last(), last().from) > value({center, height, 0}, last().from)) --count_;
    const int from = count_ == 0 ? begin_ : first_pixel_won(last(), center, height);
    if (from < end_) pieces_[count_++] = {center, height, from};
  }

  void evaluate(std::int32_t* out) const {
    int end = end_;
    for (std::size_t i = count_; i-- > 0;) {
      const Piece piece = pieces_[i];
      for (int x = piece.from; x < end; ++x) out[x] = value(piece, x);
      end = piece.from;
    }
  }

 private:
  struct Piece {
    int center;
    std::int32_t height;
    int from;  // the first pixel where this parabola is the lowest
  };

  const Piece& last() const { return pieces_[count_ - 1]; }

  static std::int32_t value(const Piece& piece, int x) {
    return (x - piece.center) * (x - piece.center) + piece.height;
  }

  // The right parabola is below the left one beyond their crossing. The crossing is at or right of left.from, so it is
  // not negative and integer division rounds it down.
  static int first_pixel_won(const Piece& left, int center, std::int32_t height) {
    const std::int32_t rise = (center * center + height) - (left.center * left.center + left.height);
    return rise / (2 * (center - left.center)) + 1;
  }

  std::vector<Piece> pieces_;
  std::size_t count_ = 0;
  int begin_ = 0;
  int end_ = 0;
};

// Recomputes the squared distances of every run that has one of at least `far`, and returns the row's largest ones. The
// image has several labels, so that every pixel has a distance.
inline Deepest finish_row(const std::uint8_t* marks, const Gap* gaps, int width, std::int32_t far, Envelope& envelope,
                          std::int32_t* squared) {
  Deepest deepest;
  for (int begin = 0, end; begin < width; begin = end) {
    end = begin + 1;
    while (end < width && !(marks[end] & kDiffersLeft)) ++end;
    const auto largest = [&] { return *std::max_element(squared + begin, squared + end); };
    if (largest() >= far) {
      envelope.start(begin, end);
      if (begin > 0) envelope.add(begin - 1, 0);
      for (int x = begin; x < end; ++x)
        if (gaps[x] != kNoGap) envelope.add(x, static_cast<std::int32_t>(gaps[x]) * gaps[x]);
      if (end < width) envelope.add(end, 0);
      envelope.evaluate(squared);
    }
    deepest.include(largest(), is_foreground(marks[begin]));
  }
  return deepest;
}

}  // namespace semimoe
