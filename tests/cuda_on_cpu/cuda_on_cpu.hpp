// The part of CUDA that csrc/ uses, emulated on the CPU, so that its kernels and launchers run without a GPU.
//
// Every thread of a cluster is a fiber. Fibers take turns, each until its next barrier, in an order that a seed
// shuffles; whole warps and blocks are delayed at random. A missing barrier causes a wrong result or one that depends
// on the seed. A barrier that some threads never reach causes an error. Shared memory starts with arbitrary bytes.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define SEMIMOE_CLUSTERS
#define __global__
#define __device__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };

namespace emulated {

inline int compute_capability_major = 9;
constexpr int kTooSmallForClusters = 12;  // a GPU of this capability has clusters, but none as large as those of csrc
inline bool kernels_load = true;
inline cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;  // there is one host thread
inline unsigned seed = 0;
inline std::uint64_t iterations = 0;           // trips of inner loops since it was last set to 0
inline std::map<void*, std::size_t> opted_in;  // kernel -> its limit of dynamic shared memory

constexpr std::size_t kStack = 64 << 10;
constexpr int kWarp = 32;

// A barrier of `expected` threads, which also or-s one word of each of them.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  std::uint32_t votes = 0, result = 0;
};

struct Warp {
  Barrier barrier;
  std::uint64_t values[kWarp];
};

struct Block {
  unsigned index = 0;
  std::vector<unsigned char> memory;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned running = 0;  // number of threads that have not ended
};

struct Fiber {
  jmp_buf place;  // where it continues; a jump needs no system call, unlike swapcontext
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;

  Warp& warp() { return block->warps[thread / kWarp]; }
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

inline jmp_buf scheduler;
inline Fiber* current = nullptr;
inline Cluster* cluster = nullptr;
inline void (*run_thread)() = nullptr;
inline bool progress = false;

// An exception cannot leave a fiber, so the scheduler throws it.
inline const char* failure = nullptr;
inline void fail(const char* reason) { failure = reason; }

// Returns to the scheduler; the fiber continues here when it is resumed.
inline void yield() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

// Waits for all threads of the barrier and returns the bitwise or of their `bits`.
inline std::uint32_t meet(Barrier& barrier, std::uint32_t bits = 0) {
  const unsigned generation = barrier.generation;
  barrier.votes |= bits;
  if (++barrier.arrived == barrier.expected) {
    barrier.result = barrier.votes;
    barrier.votes = barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
  progress = true;
  return barrier.result;
}

inline void run_fiber() {
  yield();
  run_thread();
  --current->block->running;
  current->done = progress = true;
  yield();
}

// Starts the fiber on its own stack; it yields at once, ready to be resumed.
inline void start(Fiber& fiber) {
  ucontext_t context, here;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  makecontext(&context, run_fiber, 0);
  current = &fiber;
  if (!_setjmp(scheduler)) swapcontext(&here, &context);
}

}  // namespace emulated

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace emulated {

inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->index;
  if (!_setjmp(scheduler)) _longjmp(fiber.place, 1);
}

inline void run_cluster(unsigned first_block, unsigned blocks, unsigned threads, std::size_t memory,
                        std::mt19937& random) {
  static std::vector<Fiber> fibers;  // static, to allocate their stacks once
  if (fibers.size() < blocks * threads) fibers = std::vector<Fiber>(blocks * threads);
  Cluster state;
  cluster = &state;
  state.barrier.expected = blocks * threads;
  state.blocks.resize(blocks);
  std::vector<Fiber*> waiting;
  for (unsigned rank = 0; rank < blocks; ++rank) {
    Block& block = state.blocks[rank];
    block.index = first_block + rank;
    block.memory.assign(memory, 0xA5);
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.barrier.expected = block.running = threads;
    for (unsigned thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[rank * threads + thread];
      fiber.block = &block;
      fiber.thread = thread;
      fiber.done = false;
      ++fiber.warp().barrier.expected;
      start(fiber);
      waiting.push_back(&fiber);
    }
  }
  std::uint32_t blocks_behind = 0, warps_behind = 0;
  for (int pass = 0, idle = 0; !waiting.empty(); ++pass) {
    std::shuffle(waiting.begin(), waiting.end(), random);
    progress = false;
    if (pass % 8 == 0) {  // long enough for other threads to pass several barriers
      blocks_behind = random() & random();
      warps_behind = random() & random();
    }
    for (Fiber* fiber : waiting) {
      const unsigned block = fiber->block->index - first_block, warp = fiber->thread / kWarp;
      if ((blocks_behind >> block | warps_behind >> (warp + block) % 32) % 2 == 0) resume(*fiber);
    }
    idle = progress ? 0 : idle + 1;
    if (idle == 1000) fail("threads wait at a barrier that other threads never reach");
    if (failure) throw std::runtime_error(std::exchange(failure, nullptr));
    waiting.erase(std::remove_if(waiting.begin(), waiting.end(), [](Fiber* fiber) { return fiber->done; }),
                  waiting.end());
  }
}

}  // namespace emulated

// ------------------------------------------------------------------------------------------------------ inside kernels

inline void __syncthreads() { meet(emulated::current->block->barrier); }
inline int __syncthreads_or(int condition) { return meet(emulated::current->block->barrier, condition != 0) != 0; }
inline void __syncwarp() { meet(emulated::current->warp().barrier); }

inline std::uint32_t __ballot_sync(std::uint32_t, int condition) {
  return meet(emulated::current->warp().barrier, std::uint32_t{condition != 0} << (threadIdx.x % emulated::kWarp));
}
inline int __any_sync(std::uint32_t, int condition) { return __ballot_sync(UINT32_MAX, condition) != 0; }

template <class Value>
Value __shfl_xor_sync(std::uint32_t, Value value, int distance) {
  emulated::Warp& warp = emulated::current->warp();
  const unsigned lane = threadIdx.x % emulated::kWarp;
  warp.values[lane] = static_cast<std::uint64_t>(value);
  meet(warp.barrier);
  const auto other = static_cast<Value>(warp.values[lane ^ distance]);
  meet(warp.barrier);
  return other;
}
inline unsigned __reduce_max_sync(std::uint32_t, unsigned value) {
  for (int distance = 1; distance < emulated::kWarp; distance *= 2)
    value = std::max(value, __shfl_xor_sync(UINT32_MAX, value, distance));
  return value;
}

inline int __clz(std::uint32_t word) { return word ? __builtin_clz(word) : 32; }
inline int __ffs(std::uint32_t word) { return __builtin_ffs(word); }
inline int atomicMax(int* address, int value) {
  const int before = *address;
  *address = std::max(before, value);
  return before;
}

inline std::uint32_t atomicOr(std::uint32_t* address, std::uint32_t value) {
  const std::uint32_t before = *address;
  *address = before | value;
  return before;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float a) { return 1 / a; }

// Applies an operation to both 16-bit halves of 32-bit words.
template <class Operation>
std::uint32_t halves(std::uint32_t a, std::uint32_t b, Operation operation) {
  const auto low = static_cast<std::uint16_t>(operation(a & 0xffff, b & 0xffff));
  const auto high = static_cast<std::uint16_t>(operation(a >> 16, b >> 16));
  return low | std::uint32_t{high} << 16;
}
inline std::uint32_t __vminu2(std::uint32_t a, std::uint32_t b) {
  return halves(a, b, [](std::uint32_t x, std::uint32_t y) { return std::min(x, y); });
}
inline std::uint32_t __vmaxu2(std::uint32_t a, std::uint32_t b) {
  return halves(a, b, [](std::uint32_t x, std::uint32_t y) { return std::max(x, y); });
}
inline std::uint32_t __viaddmin_u16x2(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
  const auto sum = [](std::uint32_t x, std::uint32_t y) {
    if (x + y > UINT16_MAX) emulated::fail("a sum of 16-bit words overflows");
    return x + y;
  };
  return __vminu2(halves(a, b, sum), c);
}

namespace semimoe {

template <class Memory>
Memory& shared_memory() {
  return *reinterpret_cast<Memory*>(emulated::current->block->memory.data());
}

// Every other seed estimates too low, by nearly as much as the hardware may.
inline float reciprocal_root(float x) { return (1 - emulated::seed % 2 * 0x1p-23f) / std::sqrt(x); }

inline void count_iteration() { ++emulated::iterations; }

inline void cluster_sync() { meet(emulated::cluster->barrier); }

template <class T>
T* in_block(unsigned rank, T* here) {
  if (emulated::cluster->blocks.at(rank).running == 0)
    emulated::fail("a block accesses the shared memory of a block that has ended");
  const auto offset = reinterpret_cast<unsigned char*>(here) - emulated::current->block->memory.data();
  return reinterpret_cast<T*>(emulated::cluster->blocks.at(rank).memory.data() + offset);
}

}  // namespace semimoe

// ---------------------------------------------------------------------------------------------------------- launching

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidDeviceFunction = 98, cudaErrorInvalidClusterSize = 912 };
enum { cudaDevAttrComputeCapabilityMajor, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension = 4 };

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
// csrc caches properties by device, so that each compute capability is a device of its own.
inline cudaError_t cudaGetDevice(int* device) { return *device = emulated::compute_capability_major, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = emulated::compute_capability_major, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  if (!emulated::kernels_load) return cudaErrorInvalidDeviceFunction;
  return attributes->ptxVersion = 10 * emulated::compute_capability_major, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int, int bytes) {
  emulated::opted_in[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  if (emulated::compute_capability_major == emulated::kTooSmallForClusters) return cudaErrorInvalidClusterSize;
  return *clusters = 1, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, emulated::capture_mode), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(address, value, bytes), cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Argument), const Argument& argument) {
  static void (*running)(Argument);
  static const Argument* given;
  running = kernel;
  given = &argument;
  emulated::run_thread = [] { running(*given); };
  const unsigned cluster = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
  const unsigned grid = config->gridDim.x;
  const auto allowed = emulated::opted_in.find(reinterpret_cast<void*>(kernel));
  if (config->dynamicSmemBytes > (allowed == emulated::opted_in.end() ? 48 << 10 : allowed->second))
    throw std::runtime_error("a kernel uses more shared memory than its limit");
  if (cluster > 8 || grid % cluster)
    throw std::runtime_error("the grid is not a multiple of the cluster, or the cluster has more than 8 blocks");
  std::mt19937 random(emulated::seed);
  for (unsigned block = 0; block < grid; block += cluster)
    emulated::run_cluster(block, cluster, config->blockDim.x, config->dynamicSmemBytes, random);
  return cudaSuccess;
}
