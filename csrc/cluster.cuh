// Dynamic shared memory, clusters of blocks that access each other's shared memory, and estimates of the hardware. A
// CPU compiler finds the same names, and those of CUDA, in tests/cuda_on_cpu.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SEMIMOE_CLUSTERS
#endif

namespace semimoe {

template <class Memory>
__device__ inline Memory& shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<Memory*>(memory);
}

// An estimate of 1 / sqrt(x) with a relative error of at most 2^-22.9 (CUDA's documentation of rsqrtf).
__device__ inline float reciprocal_root(float x) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The tests count the trips of inner loops here.
__device__ inline void count_iteration() {}

#ifdef SEMIMOE_CLUSTERS
// A barrier for all threads of the cluster; afterwards they see each other's writes.
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }

// The address in another block's shared memory that corresponds to `here`.
template <class T>
__device__ inline T* in_block(unsigned rank, T* here) {
  return cooperative_groups::this_cluster().map_shared_rank(here, rank);
}
#endif

}  // namespace semimoe

#else
#include "cuda_on_cpu.hpp"
#endif
