// Compares the CPU's distance targets of every instruction set with the definition, see fuzz.hpp. Built with
// sanitizers: SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
#include "../../csrc/distance.hpp"

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "fuzz.hpp"

namespace {

// As in tests/ops/test_distance.py. The error of the expected values, in double, is negligible.
const double kSdfTolerance = std::ldexp(5, -24);

// ------------------------------------------------------------------------------------------------------- random cases

int draw_side(Random& random) {
  constexpr int kPrimes[] = {11, 13, 31, 61, 97, 127};
  switch (between(random, 0, 4)) {
    case 0:
      return 1;
    case 1:
      return between(random, 2, 8);
    case 2:
      return kPrimes[between(random, 0, 5)];
    case 3:
      return (1 << between(random, 3, 8)) + between(random, -1, 1);
    default:
      return between(random, 1, 100);
  }
}

// Height and width. Most are small. Some are large enough for distances beyond the search's reach, for several strips
// or for several threads. A few have up to the largest allowed height.
std::pair<int, int> draw_shape(Random& random) {
  const int kind = between(random, 0, 99);
  if (kind == 0) return {between(random, 1, 46340), between(random, 1, 3)};
  if (kind <= 4) return {between(random, 1, 3), between(random, 1, 2000)};
  if (kind <= 8) return {between(random, 1, 2000), between(random, 1, 3)};
  if (kind <= 12) return {between(random, 1, 100), between(random, 300, 700)};
  if (kind <= 16) return {between(random, 300, 700), between(random, 1, 100)};
  return {draw_side(random), draw_side(random)};
}

// Returns whether pixel (y, x) is foreground. It is called once for each pixel, in order.
using Picture = std::function<bool(int, int)>;

Picture draw_picture(Random& random, int height, int width) {
  const double rare = std::pow(std::uniform_real_distribution<double>()(random), 3);
  const auto happens = [&random, rare] { return std::bernoulli_distribution(rare)(random); };
  switch (between(random, 0, 5)) {
    case 0:  // noise
      return [=](int, int) { return happens(); };
    case 1:  // runs
      return [=, state = false](int, int) mutable { return state ^= happens(); };
    case 2: {  // discs; a radius of 0 gives single dots
      const int most = between(random, 0, 1) * (height + width) / 4;
      std::vector<std::array<int, 3>> discs(between(random, 1, 4));
      for (auto& disc : discs)
        disc = {between(random, 0, height - 1), between(random, 0, width - 1), between(random, 0, most)};
      return [=](int y, int x) {
        return std::any_of(discs.begin(), discs.end(), [=](const std::array<int, 3>& disc) {
          const std::int64_t dy = y - disc[0], dx = x - disc[1], radius = disc[2];
          return dy * dy + dx * dx <= radius * radius;
        });
      };
    }
    case 3: {  // a half plane
      const int down = between(random, -3, 3), right = between(random, -3, 3);
      const int y0 = between(random, 0, height - 1), x0 = between(random, 0, width - 1);
      return [=](int y, int x) { return down * (y - y0) + right * (x - x0) > 0; };
    }
    case 4: {  // stripes
      const int down = between(random, 0, 1), right = between(random, 0, 1), period = between(random, 1, 40);
      return [=](int y, int x) { return (down * y + right * x) / period % 2 == 1; };
    }
    default:
      return [](int, int) { return true; };
  }
}

struct Case {
  int batch;
  int height;
  int width;
  std::int32_t squared_ring_radius;
  int element_size;
  bool instances;
  std::vector<std::uint64_t> labels;

  std::uint64_t label(std::int64_t i) const { return instances ? labels[i] : labels[i] != 0; }

  // The labels in the type that the functions read. The memory has no spare bytes at the end.
  std::vector<char> bytes() const {
    std::vector<char> result(labels.size() * element_size);
    for (std::size_t i = 0; i < labels.size(); ++i) std::memcpy(&result[i * element_size], &labels[i], element_size);
    return result;
  }

  std::int64_t pixels() const { return static_cast<std::int64_t>(height) * width; }
};

// Labels of `size` bytes, among them neighbors of equal low or equal high bytes.
std::uint64_t draw_label(Random& random, int size, int most) {
  const std::uint64_t id = between(random, 1, most);
  return between(random, 0, 1) ? id << (8 * size - 8) : id;
}

Case draw_case(Random& random) {
  constexpr std::int32_t kRingRadii[] = {0, 1, 2, 4, 7, 100, 63503, 63504, INT32_MAX};
  const auto [height, width] = draw_shape(random);
  Case drawn{between(random, 0, 3),      height, width, kRingRadii[between(random, 0, 8)], 1 << between(random, 0, 3),
             between(random, 0, 1) == 1, {}};
  for (int image = 0; image < drawn.batch; ++image) {
    const Picture picture = draw_picture(random, height, width), division = draw_picture(random, height, width);
    const bool inverted = between(random, 0, 1);
    const int most = 1 << between(random, 0, 7);
    std::uint64_t one = draw_label(random, drawn.element_size, most),
                  other = draw_label(random, drawn.element_size, most);
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x) {
        if (between(random, 0, 200) == 0) std::swap(one, other), other = draw_label(random, drawn.element_size, most);
        const bool foreground = picture(y, x) != inverted, first = division(y, x);
        drawn.labels.push_back(!foreground ? 0 : first ? one : other);
      }
  }
  return drawn;
}

// ----------------------------------------------------------------------------------------------------- the definition

struct Targets {
  std::vector<std::int64_t> squared;
  std::vector<double> sdf;
  std::vector<int> boundary;
};

// Appends the squared distances of an image. In every column of the row that is near enough to matter, it looks for the
// nearest pixel of another label than the pixel's, from the ends of the runs of equal labels in the column.
void append_squared(const Case& drawn, std::int64_t first, std::vector<std::int64_t>& squared) {
  constexpr std::int64_t kNowhere = 1 << 20;  // farther than any pixel of an image
  const std::int64_t height = drawn.height, width = drawn.width;
  const auto label = [&](std::int64_t y, std::int64_t x) { return drawn.label(first + y * width + x); };

  std::vector<std::int64_t> before(height * width), after(height * width);  // the run's neighbors, by pixel
  for (std::int64_t x = 0; x < width; ++x) {
    for (std::int64_t y = 0; y < height; ++y)
      before[y * width + x] = y == 0 ? -kNowhere : label(y, x) == label(y - 1, x) ? before[(y - 1) * width + x] : y - 1;
    for (std::int64_t y = height - 1; y >= 0; --y)
      after[y * width + x] = y == height - 1                  ? kNowhere
                             : label(y, x) == label(y + 1, x) ? after[(y + 1) * width + x]
                                                              : y + 1;
  }

  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x) {
      const std::uint64_t own = label(y, x);
      std::int64_t nearest = kNowhere * kNowhere;
      const auto visit = [&](std::int64_t there) {
        if (there < 0 || there >= width) return;
        const std::int64_t i = y * width + there, away = (x - there) * (x - there);
        const std::int64_t gap = label(y, there) != own ? 0 : std::min(y - before[i], after[i] - y);
        nearest = std::min(nearest, away + gap * gap);
      };
      for (std::int64_t away = 0; away < width && away * away < nearest; ++away) visit(x - away), visit(x + away);
      squared.push_back(nearest <= INT32_MAX ? nearest : -1);
    }
}

// Whether a pixel is foreground and a pixel above, below, left or right of it belongs to another instance.
bool touches(const Case& drawn, std::int64_t first, std::int64_t i) {
  const std::int64_t y = (i - first) / drawn.width, x = (i - first) % drawn.width;
  const std::uint64_t own = drawn.label(i);
  const auto other = [&](bool inside, std::int64_t there) {
    return inside && drawn.label(there) != 0 && drawn.label(there) != own;
  };
  return own != 0 && (other(y > 0, i - drawn.width) || other(y < drawn.height - 1, i + drawn.width) ||
                      other(x > 0, i - 1) || other(x < drawn.width - 1, i + 1));
}

Targets expected_targets(const Case& drawn) {
  Targets targets;
  for (int image = 0; image < drawn.batch; ++image) {
    const std::int64_t first = image * drawn.pixels();
    append_squared(drawn, first, targets.squared);
    std::int64_t largest[2] = {-1, -1};  // by class: background, foreground
    for (std::int64_t i = first; i < first + drawn.pixels(); ++i) {
      std::int64_t& most = largest[drawn.label(i) != 0];
      most = std::max(most, targets.squared[i]);
    }
    for (std::int64_t i = first; i < first + drawn.pixels(); ++i) {
      const bool foreground = drawn.label(i) != 0;
      const std::int64_t squared = targets.squared[i];
      const bool constant = squared == -1;
      const double share =
          constant ? 1 : std::sqrt(static_cast<double>(squared)) / std::sqrt(static_cast<double>(largest[foreground]));
      targets.sdf.push_back(!foreground ? -share : squared == 1 ? 0 : share);
      targets.boundary.push_back(foreground ? touches(drawn, first, i)
                                            : !constant && squared <= drawn.squared_ring_radius);
    }
  }
  return targets;
}

// --------------------------------------------------------------------------------------------------------- comparison

template <class Got, class Expected>
void compare(const char* what, const Case& drawn, const std::vector<Got>& got, const std::vector<Expected>& expected,
             double tolerance) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (std::abs(static_cast<double>(got[i]) - static_cast<double>(expected[i])) <= tolerance) continue;
    const std::int64_t pixel = i % drawn.pixels();
    std::fprintf(stderr, "%s is %.9g, not %.9g, at pixel (%d, %d) of image %d\n", what, static_cast<double>(got[i]),
                 static_cast<double>(expected[i]), static_cast<int>(pixel / drawn.width),
                 static_cast<int>(pixel % drawn.width), static_cast<int>(i / drawn.pixels()));
    std::abort();
  }
}

int check(std::uint64_t seed) {
  Random random(seed);
  const Case drawn = draw_case(random);
  const Targets expected = expected_targets(drawn);
  const std::vector<char> bytes = drawn.bytes();
  const semimoe::Labels labels{bytes.data(), drawn.element_size, drawn.instances,
                               drawn.batch,  drawn.height,       drawn.width};
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current,
                  "seed %llu, %d x %d x %d, %d bytes, instances %d, %s, threads %d, squared ring radius %d",
                  static_cast<unsigned long long>(seed), drawn.batch, drawn.height, drawn.width, drawn.element_size,
                  drawn.instances, kernels->name, threads, drawn.squared_ring_radius);
    const std::size_t count = drawn.labels.size();
    std::vector<std::int32_t> squared(count, 77);  // no correct result, so that an unwritten pixel fails
    std::vector<float> sdf(count, 77);
    std::vector<std::uint8_t> boundary(count, 77);
    semimoe::squared_distance(*kernels, labels, squared.data(), threads);
    compare("the squared distance", drawn, squared, expected.squared, 0);
    semimoe::distance_targets(*kernels, labels, drawn.squared_ring_radius, sdf.data(), boundary.data(), threads);
    compare("the signed distance", drawn, sdf, expected.sdf, kSdfTolerance);
    compare("the boundary", drawn, boundary, expected.boundary, 0);
  }
  return drawn.batch;
}

}  // namespace
