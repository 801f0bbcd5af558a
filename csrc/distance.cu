#include "distance_cuda.hpp"

namespace semimoe {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 20;  // beyond, a thread takes several items

template <void (*phase)(const Problem&, std::int64_t)>
__global__ void __launch_bounds__(kThreads) for_each(const Problem problem, std::int64_t count) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride)
    phase(problem, i);
}

template <void (*phase)(const Problem&, std::int64_t)>
void launch(const Problem& problem, std::int64_t count, void* stream) {
  const auto blocks = static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMaxBlocks));
  for_each<phase><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(problem, count);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA could not launch a distance kernel: ") + cudaGetErrorString(error));
}

}  // namespace

void launch_squared_distance(const Problem& problem, void* stream) {
  if (problem.pixels() == 0) return;
  launch<column_phase>(problem, problem.columns(), stream);
  launch<row_phase>(problem, problem.pixels(), stream);
}

void launch_distance_targets(const Problem& problem, void* stream) {
  if (problem.pixels() == 0) return;
  launch_squared_distance(problem, stream);
  launch<target_phase>(problem, problem.pixels(), stream);
}

}  // namespace semimoe
