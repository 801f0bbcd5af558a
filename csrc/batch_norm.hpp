// relu(batch_norm(x)) with the statistics of each group of images, on the CPU, and its gradients.
//
// Forward reads x twice and writes y; backward reads x and dy twice and writes dx. y and dy may be channels of a
// concatenation. Sums are double, in an order that does not depend on the threads. The second pass goes backward,
// because the end of x may still be in the caches.
#pragma once

#include <cmath>

#include "feature_maps.hpp"
#include "memory.hpp"

namespace semimoe {

// Results of this size leave the caches before they are read. Written past them, they need not be loaded first, and x
// stays there for the second pass.
constexpr std::int64_t kStreamBytes = 1 << 23;

// ------------------------------------------------------------------------------------------------------------ forward

// Number, mean, and sum of squared differences from the mean.
struct Moments {
  double count, mean, squares;
};

// The moments of all numbers whose parts have the moments part(0) ... part(parts - 1) (T. F. Chan, G. H. Golub and
// R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
template <class Part>
Moments merged(std::int64_t parts, const Part& part) {
  if (parts == 1) return part(0);
  const double origin = part(0).mean;
  double count = 0, sum = 0, squares = 0;
  for (std::int64_t i = 0; i < parts; ++i) {
    const Moments one = part(i);
    count += one.count;
    sum += one.count * (one.mean - origin);
  }
  const double mean = origin + sum / count;
  for (std::int64_t i = 0; i < parts; ++i) {
    const Moments one = part(i);
    squares += one.squares + one.count * (one.mean - mean) * (one.mean - mean);
  }
  return {count, mean, squares};
}

// Writes the moments of each channel of a piece.
inline void piece_moments(const BatchNormKernels& kernels, const FeatureMaps& maps, const Piece& piece, const void* x,
                          Moments* result) {
  const std::int64_t columns = maps.columns, interleaved = maps.interleaved;
  std::vector<double> memory(4 * columns);
  double *mean = memory.data(), *squares = mean + columns, *last = squares + columns, *unused = last + columns;
  if (piece.rows > 0) kernels.moments(maps.at(piece, x), piece.rows, columns, mean, squares);
  if (piece.rest > 0) {
    PaddedRest rest(maps, piece, x);
    kernels.moments(rest.data(), 1, rest.columns(), last, unused);
  }
  const std::int64_t whole = piece.rows > 0 ? columns / interleaved : 0, lasts = piece.rest / interleaved;
  for (std::int64_t c = 0; c < interleaved; ++c)
    result[c] = merged(whole + lasts, [&](std::int64_t i) {
      const std::int64_t j = c + i * interleaved;
      if (i < whole) return Moments{static_cast<double>(piece.rows), mean[j], squares[j]};
      return Moments{1, last[j - whole * interleaved], 0};
    });
}

// z = weight (x - mean) / deviation + bias, with weight and bias by channel, mean and inverse deviation also by group.
struct Statistics {
  const float *weight, *bias, *mean, *inverse_deviation;

  std::vector<float> scale(const FeatureMaps& maps) const {
    std::vector<float> result(maps.groups * maps.channels);
    for (std::size_t i = 0; i < result.size(); ++i) result[i] = weight[i % maps.channels] * inverse_deviation[i];
    return result;
  }
};

// The normalization of a piece, slope and offset of its gradient: by column, in one piece of memory.
class PieceNormalization {
 public:
  PieceNormalization(const FeatureMaps& maps, const Piece& piece, const Statistics& statistics, const float* scale,
                     const float* slope = nullptr, const float* offset = nullptr)
      : columns_(maps.columns), memory_((slope == nullptr ? 3 : 5) * columns_) {
    maps.copy_by_column(piece, statistics.mean, false, memory_.data());
    maps.copy_by_column(piece, scale, false, &memory_[columns_]);
    maps.copy_by_column(piece, statistics.bias, true, &memory_[2 * columns_]);
    if (slope == nullptr) return;
    maps.copy_by_column(piece, slope, false, &memory_[3 * columns_]);
    maps.copy_by_column(piece, offset, false, &memory_[4 * columns_]);
  }

  Normalization columns() const { return {memory_.data(), &memory_[columns_], &memory_[2 * columns_]}; }
  const float* slope() const { return &memory_[3 * columns_]; }
  const float* offset() const { return &memory_[4 * columns_]; }

 private:
  std::int64_t columns_;
  std::vector<float> memory_;
};

inline void normalize_all(const BatchNormKernels& kernels, const FeatureMaps& maps, const Workers& workers,
                          const void* x, const Statistics& statistics, void* y) {
  const std::vector<float> scale = statistics.scale(maps);
  prefer_large_pages(y, maps.joined_bytes());
  workers.each(maps.pieces, [&](std::int64_t number) {
    const Piece piece = maps.piece(maps.pieces - 1 - number);
    const PieceNormalization normalization(maps, piece, statistics, scale.data());
    if (piece.rows > 0)
      kernels.normalize(maps.at(piece, x), piece.rows, maps.columns, normalization.columns(), maps.joined_at(piece, y),
                        maps.spread(), maps.bytes() >= kStreamBytes);
    if (piece.rest > 0) {
      PaddedRest rest(maps, piece, x), result(maps, piece, nullptr, true);
      kernels.normalize(rest.data(), 1, rest.columns(), normalization.columns(), result.data(), result.spread(), false);
      result.write_to(y);
    }
  });
}

// With given mean and inverse deviation.
inline void batch_norm_relu_eval(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads, const void* x,
                                 const Statistics& statistics, void* y) {
  const Workers workers = maps.workers(threads);
  normalize_all(kernels[maps.element], maps, workers, x, statistics, y);
}

// With those of the feature maps themselves, which it writes; (groups, channels).
inline void batch_norm_relu_forward(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads,
                                    const void* x, const float* weight, const float* bias, double eps, float* mean,
                                    float* inverse_deviation, void* y) {
  const Workers workers = maps.workers(threads);
  std::vector<Moments> parts(maps.pieces * maps.interleaved);
  workers.each(maps.pieces, [&](std::int64_t number) {
    const Piece piece = maps.piece(number);
    piece_moments(kernels[maps.element], maps, piece, x, &parts[number * maps.interleaved]);
  });
  for (std::int64_t group = 0; group < maps.groups; ++group)
    for (std::int64_t c = 0; c < maps.channels; ++c) {
      const Moments all =
          merged(maps.pieces_with_channel(), [&](std::int64_t i) { return parts[maps.place(group, c, i)]; });
      mean[group * maps.channels + c] = static_cast<float>(all.mean);
      inverse_deviation[group * maps.channels + c] = static_cast<float>(1 / std::sqrt(all.squares / all.count + eps));
    }
  normalize_all(kernels[maps.element], maps, workers, x, {weight, bias, mean, inverse_deviation}, y);
}

// Moves running statistics (channels) toward mean and unbiased variance of each group in turn, (groups, channels).
// values: numbers of a channel in a group, at least 2.
inline void update_running(std::int64_t groups, std::int64_t channels, std::int64_t values, const float* mean,
                           const float* inverse_deviation, float momentum, double eps, float* running_mean,
                           float* running_var) {
  const double unbiased = static_cast<double>(values) / static_cast<double>(values - 1);
  const auto move = [momentum](float& running, float statistic) {
    running = momentum * statistic + (1 - momentum) * running;
  };
  for (std::int64_t group = 0; group < groups; ++group)
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t k = group * channels + c;
      const double inverse = inverse_deviation[k], variance = 1 / (inverse * inverse) - eps;
      move(running_mean[c], mean[k]);
      move(running_var[c], static_cast<float>(variance < 0 ? 0 : variance * unbiased));  // a NaN stays one
    }
}

// ----------------------------------------------------------------------------------------------------------- backward

// Sum of dz, and sum of dz (x - mean).
struct GradientSums {
  double sum = 0, product = 0;

  void add(const GradientSums& other) {
    sum += other.sum;
    product += other.product;
  }
};

// Adds the sums of each channel of a piece.
inline void add_gradient_sums(const BatchNormKernels& kernels, const FeatureMaps& maps, const Piece& piece,
                              const void* x, const void* dy, const Normalization& normalization, GradientSums* result) {
  const std::int64_t columns = maps.columns, interleaved = maps.interleaved;
  std::vector<double> memory(2 * columns);
  double *sums = memory.data(), *products = sums + columns;
  const auto add = [&](std::int64_t end) {
    for (std::int64_t j = 0; j < end; j += interleaved)
      for (std::int64_t c = 0; c < interleaved; ++c) result[c].add({sums[j + c], products[j + c]});
  };
  if (piece.rows > 0) {
    kernels.gradient_sums(maps.at(piece, x), maps.joined_at(piece, dy), maps.spread(), piece.rows, columns,
                          normalization, sums, products);
    add(columns);
  }
  if (piece.rest > 0) {
    PaddedRest last(maps, piece, x), last_dy(maps, piece, dy, true);
    kernels.gradient_sums(last.data(), last_dy.data(), last_dy.spread(), 1, last.columns(), normalization, sums,
                          products);
    add(piece.rest);
  }
}

// dx = scale (dz - (sum dz + xhat sum dz xhat) / n), xhat = (x - mean) / deviation, with the sums of the group; the
// gradients of weight and bias are sum dz xhat and sum dz of all groups.
inline void batch_norm_relu_backward(const BatchNormKernels* kernels, const FeatureMaps& maps, int threads,
                                     const void* x, const void* dy, const Statistics& statistics, void* dx,
                                     float* grad_weight, float* grad_bias) {
  const BatchNormKernels& kernel = kernels[maps.element];
  const std::vector<float> scale = statistics.scale(maps);
  const Workers workers = maps.workers(threads);
  std::vector<GradientSums> parts(maps.pieces * maps.interleaved);
  workers.each(maps.pieces, [&](std::int64_t number) {
    const Piece piece = maps.piece(number);
    const PieceNormalization normalization(maps, piece, statistics, scale.data());
    add_gradient_sums(kernel, maps, piece, x, dy, normalization.columns(), &parts[number * maps.interleaved]);
  });

  std::vector<float> slope(maps.groups * maps.channels), offset(slope.size());
  std::vector<GradientSums> total(maps.channels);
  for (std::int64_t group = 0; group < maps.groups; ++group) {
    std::vector<GradientSums> all(maps.channels);
    for (std::int64_t i = 0; i < maps.pieces_with_channel(); ++i)
      for (std::int64_t c = 0; c < maps.channels; ++c) all[c].add(parts[maps.place(group, c, i)]);
    for (std::int64_t c = 0; c < maps.channels; ++c) {
      const std::int64_t k = group * maps.channels + c;
      const double inverse = statistics.inverse_deviation[k], share = -scale[k] / static_cast<double>(maps.values);
      slope[k] = static_cast<float>(share * inverse * inverse * all[c].product);
      offset[k] = static_cast<float>(share * all[c].sum);
      total[c].add({all[c].sum, inverse * all[c].product});
    }
  }
  for (std::int64_t c = 0; c < maps.channels; ++c) {
    grad_weight[c] = static_cast<float>(total[c].product);
    grad_bias[c] = static_cast<float>(total[c].sum);
  }

  prefer_large_pages(dx, maps.bytes());
  workers.each(maps.pieces, [&](std::int64_t number) {
    const Piece piece = maps.piece(maps.pieces - 1 - number);
    const PieceNormalization normalization(maps, piece, statistics, scale.data(), slope.data(), offset.data());
    if (piece.rows > 0)
      kernel.differentiate(maps.at(piece, x), maps.joined_at(piece, dy), maps.spread(), piece.rows, maps.columns,
                           normalization.columns(), normalization.slope(), normalization.offset(), maps.at(piece, dx),
                           maps.bytes() >= kStreamBytes);
    if (piece.rest > 0) {
      PaddedRest last(maps, piece, x), last_dy(maps, piece, dy, true);
      kernel.differentiate(last.data(), last_dy.data(), last_dy.spread(), 1, last.columns(), normalization.columns(),
                           normalization.slope(), normalization.offset(), last.data(), false);
      last.write_to(dx);
    }
  });
}

}  // namespace semimoe
