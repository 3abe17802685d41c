// Linear layers of few rows, as generation has them for the small scales of an image: the time goes into reading the weight.
//
//   y = gelu(x W^T + b)   or   y = residual + gate (x W^T + b);    and before it   h = LN(x) (1 + scale) + shift
//
// mma.m16n8k16 with weights as its 16 rows and x as its 8 columns. A sum over k does not ask for an order: a lane holds eight
// neighbours of a row, 16 bytes, as the k of two products, for weights and x alike, so both come from global memory into
// registers as they lie there. A block has 16 features; its warps take steps of 32 k in turn, and their sums are added
// in their order: results are bit-equal from run to run.
//
// Every kernel lets the next one start at once, and reads its part of the weight, into registers and the L2 cache, before it
// waits for the one before (programmatic dependent launch): weights must not be written by any kernel under way.
// Read next: linear_rows.cu.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace hmar {

constexpr int kLinearWarps = 8, kLinearThreads = 32 * kLinearWarps;
constexpr int kFeatures = 16;       // rows of the weight a block
constexpr int kUnroll = 4;          // steps of a warp that are loaded at once
constexpr int kStepK = 32;          // of four lanes, 8 each
constexpr int kLineElements = 64;   // of the L2 cache
constexpr int kNormVectors = 8;     // of four numbers a thread: rows of at most 8192

// kRows: of x, a multiple of 8.
template <DType kType_, int kRows_>
struct LinearRowsTile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static_assert(kRows % 8 == 0 && kRows * kFeatures <= kLinearThreads);  // an output a thread
  static constexpr int kSumsRow = kFeatures + 4;  // so that the lanes of a warp write to 32 banks
  struct Shared {
    float sums[kLinearWarps][kRows][kSumsRow];
  };
};

template <DType kType>
__device__ __forceinline__ float value_at(const void* numbers, int64_t i) {
  return value_of<kType>(static_cast<const uint16_t*>(numbers)[i]);
}

template <DType kType>
__device__ __forceinline__ float value_at(const void* numbers, int64_t i, bool is_float) {
  return is_float ? static_cast<const float*>(numbers)[i] : value_at<kType>(numbers, i);
}

template <class Tile>
__global__ void __launch_bounds__(kLinearThreads, 2) linear_rows_kernel(const __grid_constant__ LinearRowsParams params) {
  constexpr DType kType = Tile::kType;
  constexpr int kRowTiles = Tile::kRows / 8;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = blockIdx.x * kFeatures;
  const int num_steps = params.num_inputs / kStepK;
  const auto* weight = static_cast<const uint16_t*>(params.weight);
  const auto* x = static_cast<const uint16_t*>(params.x);

  uint4 w[kUnroll][2];
  const auto load_weights = [&](int step, uint4 (&to)[2]) {
    if (step >= num_steps) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int feature = min(first + 8 * i + g, params.num_outputs - 1);
      to[i] = load_once(weight + static_cast<int64_t>(feature) * params.num_inputs + step * kStepK + 8 * t);
    }
  };
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) load_weights(warp + kLinearWarps * u, w[u]);
  const int loaded = kLinearWarps * kUnroll * kStepK;
  const int lines = max(0, params.num_inputs - loaded + kLineElements - 1) / kLineElements;
  for (int i = threadIdx.x; i < lines * kFeatures; i += kLinearThreads) {
    const int feature = min(first + i / lines, params.num_outputs - 1);
    prefetch_l2(weight + static_cast<int64_t>(feature) * params.num_inputs + loaded + i % lines * kLineElements);
  }
  // The output of this thread
  const int row = threadIdx.x / kFeatures, feature = first + threadIdx.x % kFeatures;
  const bool valid = row < params.num_rows && feature < params.num_outputs;
  const int64_t at = static_cast<int64_t>(row) * params.num_outputs + feature;
  const float bias = valid && params.bias != nullptr ? value_at<kType>(params.bias, feature) : 0.0f;
  wait_for_previous();

  // Residual and gate too are on their way in the meantime.
  float residual = 0.0f, gate = 1.0f;
  if (valid && params.residual != nullptr) {
    residual = value_at<kType>(params.residual, at, params.float_residual);
    gate = value_at<kType>(params.gate, row / params.image_rows * params.gate_stride + feature);
  }

  float sums[kRowTiles][4] = {};
  for (int begin = warp; begin < num_steps; begin += kLinearWarps * kUnroll) {
    uint4 rows[kUnroll][kRowTiles];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int step = begin + kLinearWarps * u;
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        rows[u][r] = uint4{0, 0, 0, 0};
        if (8 * r + g < params.num_rows && step < num_steps) {
          rows[u][r] = *reinterpret_cast<const uint4*>(x + static_cast<int64_t>(8 * r + g) * params.num_inputs +
                                                       step * kStepK + 8 * t);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int step = begin + kLinearWarps * u;
      if (step >= num_steps) break;
      const uint4 low = w[u][0], high = w[u][1];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        mma_m16n8k16<kType>(sums[r], {low.x, high.x, low.y, high.y}, rows[u][r].x, rows[u][r].y);
        mma_m16n8k16<kType>(sums[r], {low.z, high.z, low.w, high.w}, rows[u][r].z, rows[u][r].w);
      }
      load_weights(step + kLinearWarps * kUnroll, w[u]);
    }
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.sums[warp][8 * r + 2 * t + i % 2][i / 2 * 8 + g] = sums[r][i];
  }
  __syncthreads();
  if (!valid) return;
  float y = bias;
#pragma unroll
  for (int from = 0; from < kLinearWarps; ++from) y += shared.sums[from][row][feature - first];
  // 0.5 (1 + tanh u) = 1 / (1 + 2^(-2 u log2 e)), and 2 sqrt(2 / pi) log2 e = 2.3022082
  if (params.gelu) y /= 1.0f + exp2_approx(-2.3022082f * (y + 0.044715f * y * y * y));
  y = residual + gate * y;
  if (params.residual != nullptr && params.float_residual) {
    static_cast<float*>(params.y)[at] = y;
  } else {
    static_cast<uint16_t*>(params.y)[at] = static_cast<uint16_t>(pack<kType>(y, 0.0f));
  }
}

// Of all threads of a block, the same for each of them.
__device__ __forceinline__ float block_sum(float value, float* shared) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kLinearWarps; ++warp) total += shared[warp];
  return total;
}

// One row of h a block.
template <DType kType>
__global__ void __launch_bounds__(kLinearThreads) norm_rows_kernel(const __grid_constant__ NormRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto* shared = reinterpret_cast<float*>(shared_memory);
  launch_dependents();
  wait_for_previous();
  const int row = blockIdx.x, num_vectors = params.num_inputs / 4;
  const int64_t begin = static_cast<int64_t>(row) * params.num_inputs;
  float x[kNormVectors][4];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    const int vector = i * kLinearThreads + threadIdx.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i][j] = 0.0f;
    if (vector >= num_vectors) continue;
    if (params.float_x) {
      const auto numbers = reinterpret_cast<const float4*>(static_cast<const float*>(params.x) + begin)[vector];
      x[i][0] = numbers.x, x[i][1] = numbers.y, x[i][2] = numbers.z, x[i][3] = numbers.w;
    } else {
      unpack<kType>(x[i], reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(params.x) + begin)[vector]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += x[i][j];
  }
  const float mean = block_sum(sum, shared) / params.num_inputs;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    if (i * kLinearThreads + threadIdx.x >= num_vectors) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += (x[i][j] - mean) * (x[i][j] - mean);
  }
  const float rstd = inverse_root(block_sum(squares, shared + kLinearWarps) / params.num_inputs + params.eps);
  const int image = row / params.image_rows;
  const auto* scale = static_cast<const uint16_t*>(params.scale) + image * params.scale_stride;
  const auto* shift = static_cast<const uint16_t*>(params.shift) + image * params.shift_stride;
#pragma unroll
  for (int i = 0; i < kNormVectors; ++i) {
    const int vector = i * kLinearThreads + threadIdx.x;
    if (vector >= num_vectors) continue;
    float factor[4], offset[4], h[4];
    unpack<kType>(factor, reinterpret_cast<const uint2*>(scale)[vector]);
    unpack<kType>(offset, reinterpret_cast<const uint2*>(shift)[vector]);
#pragma unroll
    for (int j = 0; j < 4; ++j) h[j] = (x[i][j] - mean) * rstd * (1.0f + factor[j]) + offset[j];
    reinterpret_cast<uint2*>(static_cast<uint16_t*>(params.h) + begin)[vector] =
        uint2{pack<kType>(h[0], h[1]), pack<kType>(h[2], h[3])};
  }
}

}  // namespace hmar
