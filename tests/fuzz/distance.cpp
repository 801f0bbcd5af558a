// Tests the CPU's distance targets on random cases. Built with sanitizers: SEMIMOE_FUZZ in CMakeLists.txt, `make fuzz`.
//
//     fuzz_distance SECONDS SEED
//
// draws one random case per seed SEED, SEED + 1, ... and compares the result of every instruction set with the
// definition. A failure prints its seed; `fuzz_distance 0 SEED` repeats only that case.
#include "../../csrc/distance.hpp"

#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <utility>

// The sanitizers call abort() on an error, so that every failure prints its case.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

namespace {

// As in tests/ops/test_distance.py. The error of the expected values, in double, is negligible.
const double kSdfTolerance = std::ldexp(5, -24);

char current[200] = "before the first case";  // printed when a check fails

extern "C" void print_case(int) {
  std::fprintf(stderr, "\nfailed: %s\n", current);
  std::_Exit(1);
}

// ------------------------------------------------------------------------------------------------------- random cases

using Random = std::mt19937_64;

int between(Random& random, int first, int last) { return std::uniform_int_distribution<int>(first, last)(random); }

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
  std::vector<std::uint8_t> masks;  // constructed with its size, so that its memory has no spare bytes at the end

  std::int64_t pixels() const { return static_cast<std::int64_t>(height) * width; }
};

Case draw_case(Random& random) {
  constexpr std::int32_t kRingRadii[] = {0, 1, 2, 4, 7, 100, 63503, 63504, INT32_MAX};
  const auto [height, width] = draw_shape(random);
  Case drawn{between(random, 0, 3), height, width, kRingRadii[between(random, 0, 8)], {}};
  drawn.masks = std::vector<std::uint8_t>(drawn.batch * drawn.pixels());
  auto pixel = drawn.masks.begin();
  for (int image = 0; image < drawn.batch; ++image) {
    const Picture picture = draw_picture(random, height, width);
    const bool inverted = between(random, 0, 1);
    const auto [least, most] = std::array<std::pair<int, int>, 4>{
        {{1, 1}, {255, 255}, {1, 255}, {127, 128}}}[between(random, 0, 3)];  // range of foreground values
    for (int y = 0; y < height; ++y)
      for (int x = 0; x < width; ++x)
        *pixel++ = picture(y, x) != inverted ? static_cast<std::uint8_t>(between(random, least, most)) : 0;
  }
  return drawn;
}

// ----------------------------------------------------------------------------------------------------- the definition

struct Targets {
  std::vector<std::int64_t> squared;
  std::vector<double> sdf;
  std::vector<int> boundary;
};

// Appends the squared distances of an image, from the exact gaps of every column. For a pixel it visits all columns of
// the row that are near enough to matter.
void append_squared(const std::uint8_t* mask, int height, int width, std::vector<std::int64_t>& squared) {
  constexpr std::int64_t kNowhere = 1 << 20;  // farther than any pixel of an image
  const auto foreground = [&](std::int64_t y, std::int64_t x) { return mask[y * width + x] != 0; };

  const std::vector<std::int64_t> zeros(static_cast<std::int64_t>(height) * width);
  std::vector<std::int64_t> heights[2] = {zeros, zeros};  // by class: squared gaps, 0 at pixels of the other class
  for (std::int64_t x = 0; x < width; ++x) {
    std::vector<std::int64_t> gaps(height);
    std::int64_t above[2] = {-kNowhere, -kNowhere},
                 below[2] = {kNowhere, kNowhere};  // by class: the nearest row so far
    for (std::int64_t y = 0; y < height; ++y) {
      above[foreground(y, x)] = y;
      gaps[y] = y - above[!foreground(y, x)];
    }
    for (std::int64_t y = height - 1; y >= 0; --y) {
      below[foreground(y, x)] = y;
      const std::int64_t gap = std::min(gaps[y], below[!foreground(y, x)] - y);
      heights[foreground(y, x)][y * width + x] = gap * gap;
    }
  }

  for (std::int64_t y = 0; y < height; ++y)
    for (std::int64_t x = 0; x < width; ++x) {
      const std::int64_t* row = &heights[foreground(y, x)][y * width];
      std::int64_t nearest = row[x];
      for (std::int64_t away = 1; away < width && away * away < nearest; ++away) {
        if (x - away >= 0) nearest = std::min(nearest, away * away + row[x - away]);
        if (x + away < width) nearest = std::min(nearest, away * away + row[x + away]);
      }
      squared.push_back(nearest <= INT32_MAX ? nearest : -1);
    }
}

Targets expected_targets(const Case& drawn) {
  Targets targets;
  for (int image = 0; image < drawn.batch; ++image) {
    const std::int64_t first = image * drawn.pixels();
    append_squared(&drawn.masks[first], drawn.height, drawn.width, targets.squared);
    std::int64_t largest[2] = {-1, -1};  // by class: background, foreground
    for (std::int64_t i = first; i < first + drawn.pixels(); ++i) {
      std::int64_t& most = largest[drawn.masks[i] != 0];
      most = std::max(most, targets.squared[i]);
    }
    for (std::int64_t i = first; i < first + drawn.pixels(); ++i) {
      const bool foreground = drawn.masks[i] != 0;
      const std::int64_t squared = targets.squared[i];
      const bool constant = squared == -1;
      const double share =
          constant ? 1 : std::sqrt(static_cast<double>(squared)) / std::sqrt(static_cast<double>(largest[foreground]));
      targets.sdf.push_back(!foreground ? -share : squared == 1 ? 0 : share);
      targets.boundary.push_back(!foreground && !constant && squared <= drawn.squared_ring_radius);
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
    std::fprintf(stderr, "%s is %.9g, not %.9g, at pixel (%d, %d) of mask %d\n", what, static_cast<double>(got[i]),
                 static_cast<double>(expected[i]), static_cast<int>(pixel / drawn.width),
                 static_cast<int>(pixel % drawn.width), static_cast<int>(i / drawn.pixels()));
    std::abort();
  }
}

// Checks the case of a seed and returns its number of masks.
int check(std::uint64_t seed) {
  Random random(seed);
  const Case drawn = draw_case(random);
  const Targets expected = expected_targets(drawn);
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) {
    const int threads = between(random, 1, 3);
    std::snprintf(current, sizeof current, "seed %llu, %d x %d x %d, %s, threads %d, squared ring radius %d",
                  static_cast<unsigned long long>(seed), drawn.batch, drawn.height, drawn.width, kernels->name, threads,
                  drawn.squared_ring_radius);
    const std::size_t count = drawn.masks.size();
    std::vector<std::int32_t> squared(count, 77);  // no correct result, so that an unwritten pixel fails
    std::vector<float> sdf(count, 77);
    std::vector<std::uint8_t> boundary(count, 77);
    semimoe::squared_distance(*kernels, drawn.masks.data(), drawn.batch, drawn.height, drawn.width, squared.data(),
                              threads);
    compare("the squared distance", drawn, squared, expected.squared, 0);
    semimoe::distance_targets(*kernels, drawn.masks.data(), drawn.batch, drawn.height, drawn.width,
                              drawn.squared_ring_radius, sdf.data(), boundary.data(), threads);
    compare("the signed distance", drawn, sdf, expected.sdf, kSdfTolerance);
    compare("the boundary", drawn, boundary, expected.boundary, 0);
  }
  return drawn.batch;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s SECONDS SEED\n", argv[0]);
    return 2;
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
  std::uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  std::signal(SIGABRT, print_case);
  std::int64_t masks = 0;
  do {
    masks += check(seed++);
  } while (std::chrono::steady_clock::now() < end);
  std::printf("%lld masks checked, with", static_cast<long long>(masks));
  for (const semimoe::Kernels* kernels : semimoe::supported_kernels()) std::printf(" %s", kernels->name);
  std::printf("\n");
}
