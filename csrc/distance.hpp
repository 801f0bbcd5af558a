// Exact Euclidean distance of every pixel to the nearest pixel of the opposite class, on the CPU.
//
// One pass over the columns and one over the rows serve foreground and background together. Let gap(y, x) be the
// distance to the nearest pixel of the opposite class in column x. A row falls into runs of equal class. Nothing beyond
// its run can be nearest to a pixel, because the run ends at pixels of the opposite class, so with [a, b) its run
//
//     d^2(x) = min over x' in [a - 1, b] of (x - x')^2 + f(x'),   f = gap^2 in the run, 0 at its two neighbours,
//
// the lower envelope of parabolas, found in linear time and in integers (A. Meijster, J. Roerdink, W. Hesselink, "A
// general algorithm for computing distance transforms in linear time", 2000).
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.hpp"
#include "pixel.hpp"

namespace semimoe {

// Below this many pixels a thread costs more to start than it saves.
constexpr std::int64_t kPixelsPerThread = 1 << 14;
constexpr int kStripColumns = 512;  // the strip's two rows of gaps stay in the nearest cache
constexpr int kStripRows = 16;

struct Image {
  const std::uint8_t* mask;  // (height, width), any non-zero value is foreground
  int height;
  int width;

  const std::uint8_t* row(int y) const { return mask + static_cast<std::ptrdiff_t>(y) * width; }
};

inline bool same_class(std::uint8_t a, std::uint8_t b) { return (a != 0) == (b != 0); }

// Gaps of the columns [begin, end): down the image, then up.
inline void column_gaps(const Image& image, int begin, int end, Gap* gaps) {
  const auto gap_row = [&](int y) { return gaps + static_cast<std::ptrdiff_t>(y) * image.width; };
  std::fill(gap_row(0) + begin, gap_row(0) + end, kNoGap);
  for (int y = 1; y < image.height; ++y) {
    const std::uint8_t *above = image.row(y - 1), *here = image.row(y);
    const Gap* gap_above = gap_row(y - 1);
    Gap* gap = gap_row(y);
    for (int x = begin; x < end; ++x) gap[x] = next_gap(gap_above[x], same_class(here[x], above[x]));
  }
  for (int y = image.height - 2; y >= 0; --y) {
    const std::uint8_t *below = image.row(y + 1), *here = image.row(y);
    const Gap* gap_below = gap_row(y + 1);
    Gap* gap = gap_row(y);
    for (int x = begin; x < end; ++x) gap[x] = std::min(gap[x], next_gap(gap_below[x], same_class(here[x], below[x])));
  }
}

// The lower envelope of the parabolas (x - centre)^2 + height, restricted to the pixels [begin, end) of one run.
class Envelope {
 public:
  explicit Envelope(int width) : pieces_(static_cast<std::size_t>(width) + 2) {}

  void start(int begin, int end) {
    begin_ = begin;
    end_ = end;
    count_ = 0;
  }

  // Centres come in increasing order.
  void add(int centre, std::int32_t height) {
    while (count_ > 0 && value(last(), last().from) > value({centre, height, 0}, last().from)) --count_;
    const int from = count_ == 0 ? begin_ : first_pixel_won(last(), centre, height);
    if (from < end_) pieces_[count_++] = {centre, height, from};
  }

  bool empty() const { return count_ == 0; }

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
    int centre;
    std::int32_t height;
    int from;  // the first pixel where this parabola is the lowest
  };

  const Piece& last() const { return pieces_[count_ - 1]; }

  static std::int32_t value(const Piece& piece, int x) {
    return (x - piece.centre) * (x - piece.centre) + piece.height;
  }

  // The parabola on the right is below the left one from the pixel after their crossing on. The crossing is not left
  // of left.from, hence not negative, and division rounds down.
  static int first_pixel_won(const Piece& left, int centre, std::int32_t height) {
    const std::int32_t rise = (centre * centre + height) - (left.centre * left.centre + left.height);
    return rise / (2 * (centre - left.centre)) + 1;
  }

  std::vector<Piece> pieces_;
  std::size_t count_ = 0;
  int begin_ = 0;
  int end_ = 0;
};

// Squared distances of one row from its gaps.
inline void row_distances(const std::uint8_t* mask, const Gap* gaps, int width, Envelope& envelope, std::int32_t* out) {
  for (int begin = 0, end; begin < width; begin = end) {
    end = begin + 1;
    while (end < width && same_class(mask[end], mask[begin])) ++end;
    envelope.start(begin, end);
    if (begin > 0) envelope.add(begin - 1, 0);
    for (int x = begin; x < end; ++x)
      if (gaps[x] != kNoGap) envelope.add(x, static_cast<std::int32_t>(gaps[x]) * gaps[x]);
    if (end < width) envelope.add(end, 0);
    if (envelope.empty())
      std::fill(out + begin, out + end, kNoDistance);  // only in a constant image, where the run is the row
    else
      envelope.evaluate(out);
  }
}

inline int count_strips(int length, int strip) { return (length + strip - 1) / strip; }

// Calls body(begin, end) for strips that cover [0, length).
template <class Body>
void for_each_strip(int length, int strip, int threads, const Body& body) {
  parallel_for(count_strips(length, strip), threads, [&](std::int64_t i) {
    const int begin = static_cast<int>(i) * strip;
    body(begin, std::min(begin + strip, length));
  });
}

inline void squared_distance(const Image& image, Gap* gaps, std::int32_t* out, int threads) {
  for_each_strip(image.width, kStripColumns, threads,
                 [&](int begin, int end) { column_gaps(image, begin, end, gaps); });
  for_each_strip(image.height, kStripRows, threads, [&](int begin, int end) {
    Envelope envelope(image.width);
    for (int y = begin; y < end; ++y) {
      const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(y) * image.width;
      row_distances(image.row(y), gaps + row, image.width, envelope, out + row);
    }
  });
}

// The largest squared distance inside and outside the foreground.
struct Deepest {
  std::int32_t inside = 0;
  std::int32_t outside = 0;

  void include(const Deepest& other) {
    inside = std::max(inside, other.inside);
    outside = std::max(outside, other.outside);
  }
};

inline Deepest deepest(const std::uint8_t* mask, const std::int32_t* squared, std::ptrdiff_t count) {
  std::int32_t inside = 0, outside = 0;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    inside = std::max(inside, mask[i] ? squared[i] : 0);
    outside = std::max(outside, mask[i] ? 0 : squared[i]);
  }
  return {inside, outside};
}

inline void write_targets(const std::uint8_t* mask, const std::int32_t* squared, std::ptrdiff_t count,
                          const Deepest& overall, std::int32_t squared_ring_radius, float* sdf,
                          std::uint8_t* boundary) {
  const float inside = std::sqrt(static_cast<float>(overall.inside));
  const float outside = std::sqrt(static_cast<float>(overall.outside));
  for (std::ptrdiff_t i = 0; i < count; ++i)
    sdf[i] = signed_distance(squared[i], mask[i] != 0, mask[i] ? inside : outside);
  for (std::ptrdiff_t i = 0; i < count; ++i) boundary[i] = on_ring(squared[i], mask[i] != 0, squared_ring_radius);
}

inline void distance_targets(const Image& image, Gap* gaps, std::int32_t* squared, std::int32_t squared_ring_radius,
                             float* sdf, std::uint8_t* boundary, int threads) {
  squared_distance(image, gaps, squared, threads);

  const auto for_each_block = [&](const auto& body) {  // body(strip, first pixel, number of pixels)
    for_each_strip(image.height, kStripRows, threads, [&](int begin, int end) {
      const std::ptrdiff_t width = image.width;
      body(begin / kStripRows, begin * width, (end - begin) * width);
    });
  };
  std::vector<Deepest> of_strip(count_strips(image.height, kStripRows));
  for_each_block([&](int strip, std::ptrdiff_t first, std::ptrdiff_t count) {
    of_strip[strip] = deepest(image.mask + first, squared + first, count);
  });
  Deepest overall;
  for (const Deepest& strip : of_strip) overall.include(strip);
  for_each_block([&](int, std::ptrdiff_t first, std::ptrdiff_t count) {
    write_targets(image.mask + first, squared + first, count, overall, squared_ring_radius, sdf + first,
                  boundary + first);
  });
}

// Calls body(image, first pixel, gaps, threads) for every image of a batch; gaps is scratch for one image.
template <class Body>
void for_each_image(const std::uint8_t* masks, std::int64_t batch, std::int64_t height, std::int64_t width, int threads,
                    const Body& body) {
  check_size(batch, height, width);
  const std::int64_t pixels = height * width;
  if (batch * pixels == 0) return;
  // Whole images first, they need no meeting point; threads left over share the image.
  const auto useful = [](std::int64_t threads_wanted, std::int64_t work) {
    return static_cast<int>(
        std::clamp<std::int64_t>(work / kPixelsPerThread, 1, std::max<std::int64_t>(threads_wanted, 1)));
  };
  const int across = useful(std::min<std::int64_t>(threads, batch), batch * pixels);
  const int within = useful(threads / across, pixels);
  parallel_for(batch, across, [&](std::int64_t i) {
    const std::unique_ptr<Gap[]> gaps(new Gap[pixels]);
    body(Image{masks + i * pixels, static_cast<int>(height), static_cast<int>(width)}, i * pixels, gaps.get(), within);
  });
}

// masks (batch, height, width) -> out int32, same shape.
inline void squared_distance(const std::uint8_t* masks, std::int64_t batch, std::int64_t height, std::int64_t width,
                             std::int32_t* out, int threads) {
  for_each_image(masks, batch, height, width, threads,
                 [&](const Image& image, std::int64_t first, Gap* gaps, int image_threads) {
                   squared_distance(image, gaps, out + first, image_threads);
                 });
}

// masks (batch, height, width) -> sdf float32 and boundary uint8, same shape.
inline void distance_targets(const std::uint8_t* masks, std::int64_t batch, std::int64_t height, std::int64_t width,
                             std::int32_t squared_ring_radius, float* sdf, std::uint8_t* boundary, int threads) {
  for_each_image(
      masks, batch, height, width, threads, [&](const Image& image, std::int64_t first, Gap* gaps, int image_threads) {
        const std::unique_ptr<std::int32_t[]> squared(new std::int32_t[height * width]);
        distance_targets(image, gaps, squared.get(), squared_ring_radius, sdf + first, boundary + first, image_threads);
      });
}

}  // namespace semimoe
