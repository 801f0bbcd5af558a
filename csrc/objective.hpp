// The three objectives of S sets of predictions against one set of targets, on the CPU, and their gradients: the
// algorithm of kernels/objective.py, where the formulas stand.
//
// One pass over logits and targets each way, in blocks of pixels that stay in the nearest cache. Sums of a block are
// float32 in each lane, all others double, added in an order that does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "objective_kernels.hpp"
#include "parallel.hpp"

namespace semimoe {

constexpr int kBlockPixels = 1024;
constexpr std::int64_t kObjectivePixelsPerThread = 1 << 17;  // of all sets; fewer are not worth a thread

// A tensor (images, channels, pixels); strides in elements.
template <class T>
struct Planes {
  T* data;
  std::int64_t image, channel, pixel;

  T* at(std::int64_t in_image, std::int64_t in_channel, std::int64_t in_pixel) const {
    return data + in_image * image + in_channel * channel + in_pixel * pixel;
  }
};

template <class T>
struct Prediction {
  Planes<T> mask;
  Planes<T> sdf;
  Planes<T> boundary;
};

struct Objective {
  std::int64_t batch, pixels;
  int mask_classes, boundary_classes;
  std::vector<Prediction<const float>> sets;
  Planes<const std::uint8_t> mask;  // a value that is no class belongs to none
  Planes<const float> sdf;
  Planes<const std::uint8_t> boundary;

  int classes() const { return mask_classes + boundary_classes; }
  std::int64_t columns() const { return sets.size() * classes(); }                    // of alpha and beta
  std::int64_t blocks() const { return (pixels + kBlockPixels - 1) / kBlockPixels; }  // of an image
};

// Pixels of one image.
struct Block {
  std::int64_t number, image, first;
  int pixels;
};

// Calls body(block) for every block of the batch.
template <class Body>
void for_each_block(const Objective& objective, int threads, const Body& body) {
  const std::int64_t pixels = objective.sets.size() * objective.batch * objective.pixels;
  Workers workers(std::clamp<std::int64_t>(pixels / kObjectivePixelsPerThread, 1, std::max(threads, 1)));
  workers.each(objective.batch * objective.blocks(), [&](std::int64_t number) {
    const std::int64_t first = number % objective.blocks() * kBlockPixels;
    const int pixels = static_cast<int>(std::min<std::int64_t>(kBlockPixels, objective.pixels - first));
    body(Block{number, number / objective.blocks(), first, pixels});
  });
}

// A block of some channels as the kernels take it: where it lies, if that will do, else in memory of its own, which is
// 0 behind the last pixel.
template <class T>
class Rows {
 public:
  Rows(const Planes<T>& planes, const Block& block, int channels)
      : planes_(planes), block_(block), channels_(channels) {
    if (planes.pixel == 1 && block.pixels % kMostLanes == 0) {
      data_ = planes.at(block.image, 0, block.first);
      stride_ = planes.channel;
    } else {
      own_.resize(std::size_t{kBlockPixels} * channels);
      data_ = own_.data();
      stride_ = kBlockPixels;
    }
  }

  T* data() const { return data_; }
  std::int64_t stride() const { return stride_; }

 protected:
  using Value = std::remove_const_t<T>;

  // Calls body(pixel of the tensor, pixel of the own memory) for every pixel of the latter.
  template <class Body>
  void for_each_own(const Body& body) {
    if (own_.empty()) return;
    for (int k = 0; k < channels_; ++k)
      for (int i = 0; i < block_.pixels; ++i)
        body(*planes_.at(block_.image, k, block_.first + i), own_[std::size_t{kBlockPixels} * k + i]);
  }

 private:
  const Planes<T> planes_;
  const Block block_;
  const int channels_;
  T* data_;
  std::int64_t stride_;
  std::vector<Value> own_;
};

template <class T>
class Input : public Rows<const T> {
 public:
  Input(const Planes<const T>& planes, const Block& block, int channels = 1) : Rows<const T>(planes, block, channels) {
    this->for_each_own([](const T& theirs, T& own) { own = theirs; });
  }
};

class Output : public Rows<float> {
 public:
  using Rows<float>::Rows;
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    for_each_own([](float& theirs, const float& own) { theirs = own; });
  }
};

struct Targets {
  Input<std::uint8_t> mask;
  Input<float> sdf;
  Input<std::uint8_t> boundary;

  Targets(const Objective& objective, const Block& block)
      : mask(objective.mask, block), sdf(objective.sdf, block), boundary(objective.boundary, block) {}
};

inline DiceBlock dice_block(const Input<float>& logits, const Input<std::uint8_t>& target, int classes,
                            const Block& block) {
  return {logits.data(), logits.stride(), target.data(), classes, block.pixels};
}

// Sum of 1 - ratio over the classes of one image; alpha and beta, for `count` images times classes.
inline double finish_dice(const double* sums, int classes, bool squared, double count, float* alpha, float* beta) {
  const double smooth = squared ? 1 : 1e-8;
  const double *overlap = sums, *mass = sums + classes;
  double loss = 0;
  for (int k = 0; k < classes; ++k) {
    const double ratio = (2 * overlap[k] + smooth) / (mass[k] + smooth);
    const double scale = 1 / (count * (mass[k] + smooth));
    loss += 1 - ratio;
    alpha[k] = static_cast<float>(-2 * scale);
    beta[k] = static_cast<float>((squared ? 2 : 1) * ratio * scale);
  }
  return loss;
}

// terms (3,); alpha and beta (images, columns): the masks of all sets, then their boundaries.
inline void objective_terms(const ObjectiveKernels& kernels, const Objective& objective, int threads, float* terms,
                            float* alpha, float* beta) {
  const int K = objective.mask_classes, L = objective.boundary_classes;
  const std::int64_t sums_per_set = 2 * (K + L) + 1, width = objective.sets.size() * sums_per_set;
  std::vector<double> sums(objective.batch * objective.blocks() * width);
  for_each_block(objective, threads, [&](const Block& block) {
    const Targets targets(objective, block);
    double* sum = &sums[block.number * width];
    for (const Prediction<const float>& set : objective.sets) {
      const Input<float> mask(set.mask, block, K), raw(set.sdf, block), boundary(set.boundary, block, L);
      kernels.dice_sums(dice_block(mask, targets.mask, K, block), true, sum, sum + K);
      sum += 2 * K;
      kernels.dice_sums(dice_block(boundary, targets.boundary, L, block), false, sum, sum + L);
      sum += 2 * L;
      *sum++ = kernels.tanh_error(raw.data(), targets.sdf.data(), block.pixels);
    }
  });

  double mask_loss = 0, error = 0, boundary_loss = 0;
  for (std::int64_t image = 0; image < objective.batch; ++image) {
    std::vector<double> total(width);
    for (std::int64_t block = 0; block < objective.blocks(); ++block)
      for (std::int64_t i = 0; i < width; ++i) total[i] += sums[(image * objective.blocks() + block) * width + i];
    const double* sum = total.data();
    std::int64_t of_mask = image * objective.columns(), of_boundary = of_mask + objective.sets.size() * K;
    for (std::size_t set = 0; set < objective.sets.size(); ++set, of_mask += K, of_boundary += L, sum += sums_per_set) {
      mask_loss += finish_dice(sum, K, true, objective.batch * K, alpha + of_mask, beta + of_mask);
      boundary_loss += finish_dice(sum + 2 * K, L, false, objective.batch * L, alpha + of_boundary, beta + of_boundary);
      error += sum[2 * (K + L)];
    }
  }
  terms[0] = static_cast<float>(mask_loss / (objective.batch * K));
  terms[1] = static_cast<float>(error / (objective.batch * objective.pixels));
  terms[2] = static_cast<float>(boundary_loss / (objective.batch * L));
}

// Gradients of the predictions, given alpha and beta as above and upstream (3,), the gradient of the terms.
inline void objective_gradients(const ObjectiveKernels& kernels, const Objective& objective, int threads,
                                const float* alpha, const float* beta, const float* upstream,
                                const std::vector<Prediction<float>>& gradients) {
  const int K = objective.mask_classes, L = objective.boundary_classes;
  const float of_error = static_cast<float>(2.0 * upstream[1] / (objective.batch * objective.pixels));
  for_each_block(objective, threads, [&](const Block& block) {
    const Targets targets(objective, block);
    std::int64_t of_mask = block.image * objective.columns(), of_boundary = of_mask + objective.sets.size() * K;
    for (std::size_t set = 0; set < objective.sets.size(); ++set, of_mask += K, of_boundary += L) {
      const Prediction<const float>& logits = objective.sets[set];
      const Input<float> mask(logits.mask, block, K), raw(logits.sdf, block), boundary(logits.boundary, block, L);
      const Output to_mask(gradients[set].mask, block, K), to_raw(gradients[set].sdf, block, 1),
          to_boundary(gradients[set].boundary, block, L);
      kernels.dice_gradient(dice_block(mask, targets.mask, K, block), true, alpha + of_mask, beta + of_mask,
                            upstream[0], to_mask.data(), to_mask.stride());
      kernels.dice_gradient(dice_block(boundary, targets.boundary, L, block), false, alpha + of_boundary,
                            beta + of_boundary, upstream[2], to_boundary.data(), to_boundary.stride());
      kernels.tanh_gradient(raw.data(), targets.sdf.data(), block.pixels, of_error, to_raw.data());
    }
  });
}

}  // namespace semimoe
