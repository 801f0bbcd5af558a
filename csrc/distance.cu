#include <map>
#include <mutex>

#include "cluster_path.cuh"
#include "general_path.cuh"

namespace semimoe {

// Blocks per multiprocessor, limited by registers and shared memory on the largest GPUs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 3;
#else
constexpr int kBlocks = 4;
#endif

// Not in an anonymous namespace: nvcc would name the kernels after the folder, and builds would not be reproducible.
__global__ void __launch_bounds__(kThreads) distance_read_kernel(const Problem problem) {
  read(problem, shared_memory<std::uint32_t[kTileColumns]>());
}

__global__ void __launch_bounds__(kThreads) distance_carry_kernel(const Problem problem) { carry(problem); }

__global__ void __launch_bounds__(kThreads, kBlocks) distance_search_tiles_kernel(const Problem problem) {
  search_tiles(problem, shared_memory<TileMemory>());
}

__global__ void __launch_bounds__(kThreads) distance_search_far_kernel(const Problem problem) {
  search_far(problem, shared_memory<std::uint16_t[]>());
}

__global__ void __launch_bounds__(kThreads) distance_write_targets_kernel(const Problem problem) {
  write_targets(problem);
}

__global__ void __launch_bounds__(kThreads, kBlocks) distance_cluster_kernel(const Problem problem) {
#ifdef SEMIMOE_CLUSTERS
  cluster_targets(problem, shared_memory<ClusterMemory>());
#endif
}

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA could not launch a distance kernel: ") + cudaGetErrorString(error));
}

struct Grid {
  std::int64_t blocks;
  unsigned cluster = 0;    // blocks of a cluster, 0 without clusters
  std::size_t memory = 0;  // shared memory of a block
};

// The configuration of a launch. It points to `cluster`, which must outlive it.
cudaLaunchConfig_t configuration(const Grid& grid, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = grid.memory;
  config.stream = stream;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = grid.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 0;
  return config;
}

void launch(void (*kernel)(Problem), const Problem& problem, const Grid& grid, cudaStream_t stream) {
  if (grid.blocks > INT32_MAX) throw std::invalid_argument("the batch of masks is too large: cut it into several");
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(grid, stream, cluster);
  check(cudaLaunchKernelEx(&config, kernel, problem));
}

// While it exists, this thread may make CUDA calls that a stream capture does not allow.
class RelaxedCapture {
 public:
  RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // after the constructor: the mode before it
};

// Loads every kernel now, because the first launch would load it, perhaps during a capture. Returns whether the current
// device can run the largest cluster and the module has code for that.
bool prepare() {
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes{};
  for (const auto kernel : {distance_read_kernel, distance_carry_kernel, distance_search_tiles_kernel,
                            distance_search_far_kernel, distance_write_targets_kernel, distance_cluster_kernel})
    check(cudaFuncGetAttributes(&attributes, kernel));  // the last one: distance_cluster_kernel
  int device = 0, major = 0, clusters = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major >= 9 && attributes.ptxVersion >= 90) {
    constexpr int kMemory = sizeof(ClusterMemory);
    check(cudaFuncSetAttribute(distance_cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemory));
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration({kMostSlabs, kMostSlabs, kMemory}, nullptr, cluster);
    if (cudaOccupancyMaxActiveClusters(&clusters, distance_cluster_kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // forgets the error: clusters of this size do not fit, for example in a part of a GPU
      clusters = 0;
    }
  }
  return clusters > 0;
}

bool has_clusters() {
  static std::mutex mutex;
  static std::map<int, bool> known;  // device -> result of prepare()
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, prepare()).first->second;
}

}  // namespace

void launch(const Problem& problem, void* stream_address) {
  if (problem.pixels() == 0) return;
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const std::int64_t slabs = problem.batch * problem.slabs(), tiles = slabs * problem.tiles();
  if (has_clusters() && problem.fits_a_cluster()) {
    launch(distance_cluster_kernel, problem, {slabs, static_cast<unsigned>(problem.slabs()), sizeof(ClusterMemory)},
           stream);
    return;
  }
  const auto blocks_of = [](std::int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  check(cudaMemsetAsync(problem.state, 0, problem.batch * sizeof(State), stream));
  launch(distance_read_kernel, problem, {tiles, 0, kTileColumns * sizeof(std::uint32_t)}, stream);
  launch(distance_carry_kernel, problem, {blocks_of(problem.batch * problem.width)}, stream);
  launch(distance_search_tiles_kernel, problem, {tiles, 0, sizeof(TileMemory)}, stream);
  launch(distance_search_far_kernel, problem, {problem.batch * far_blocks(problem), 0, far_memory(problem.width)},
         stream);
  if (problem.sdf) launch(distance_write_targets_kernel, problem, {tiles}, stream);
}

int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);  // an error would be that of an earlier launch
  return version;
}

}  // namespace semimoe
