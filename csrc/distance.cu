#include "distance_kernels.cuh"

namespace semimoe {
namespace {

// Of a multiprocessor, by registers and shared memory: the clusters of 64 images of 256 x 256 fit an H100 all at once.
constexpr int kBlocks = 4;

__global__ void __launch_bounds__(kThreads) pack_kernel(const Problem problem) { pack(problem); }

__global__ void __launch_bounds__(kThreads, kBlocks) search_tiles_kernel(const Problem problem) {
  search_tiles(problem, shared_memory<Slab>());
}

__global__ void __launch_bounds__(kThreads) search_far_kernel(const Problem problem) { search_far(problem); }

__global__ void __launch_bounds__(kThreads) write_targets_kernel(const Problem problem) { write_targets(problem); }

__global__ void __launch_bounds__(kThreads, kBlocks) cluster_kernel(const Problem problem) {
#ifdef SEMIMOE_CLUSTERS
  cluster_targets(problem, shared_memory<ClusterMemory>());
#endif
}

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA could not launch a distance kernel: ") + cudaGetErrorString(error));
}

struct Grid {
  std::int64_t blocks;
  unsigned cluster = 1;    // blocks of a cluster
  std::size_t memory = 0;  // shared memory of a block
};

void launch(void (*kernel)(Problem), const Problem& problem, const Grid& grid, cudaStream_t stream) {
  if (grid.blocks > INT32_MAX) throw std::invalid_argument("the batch of masks is too large: cut it into several");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = grid.memory;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, problem));
}

// Whether the current device runs clusters, and the module holds code for it that does.
bool has_clusters() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, cluster_kernel));
  return major >= 9 && attributes.ptxVersion >= 90;
}

}  // namespace

void launch(const Problem& problem, void* stream_address) {
  if (problem.pixels() == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const std::int64_t slabs = problem.batch * problem.slabs(), tiles = slabs * problem.tiles();
  if (problem.fits_a_cluster() && has_clusters()) {
    constexpr int kMemory = sizeof(ClusterMemory);
    check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory));
    launch(cluster_kernel, problem, {slabs, static_cast<unsigned>(problem.slabs()), kMemory}, stream);
    return;
  }
  check(cudaMemsetAsync(problem.state, 0, problem.batch * sizeof(State), stream));
  launch(pack_kernel, problem, {(slabs * problem.width + kThreads - 1) / kThreads}, stream);
  launch(search_tiles_kernel, problem, {tiles, 1, sizeof(Slab)}, stream);
  launch(search_far_kernel, problem, {tiles}, stream);
  if (problem.sdf) launch(write_targets_kernel, problem, {tiles}, stream);
}

}  // namespace semimoe
