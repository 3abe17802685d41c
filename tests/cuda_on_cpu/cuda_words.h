// The words of CUDA C++ that a C++ compiler does not know, for the emulations beside: ptx.cuh and hopper_ptx.cuh.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline Index threadIdx, blockIdx, gridDim;
