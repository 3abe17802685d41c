// Host side of the kernel that draws codes: what it is told, and its launch (sample_rows.cu).
#pragma once

#ifndef HMAR_ON_CPU
#include <cuda_runtime_api.h>
#endif

#include <cstdint>

namespace hmar {

enum class LogitType : int32_t { kFloat16, kBFloat16, kFloat32 };

// Strides in elements, of [B, n] or [B, n, V].
struct SampleRowsParams {
  const void *logits, *unconditional;  // [B, n, V]; the latter null without guidance
  const float* guidance;               // [B]
  const int64_t* seeds;                // [B]
  const int64_t* positions;            // [B, n]
  const int64_t* places;               // [B, n], of what is written; null where token n is written at n
  int64_t* codes;                      // [B, N]
  float* confidence;                   // [B, N]
  bool* nonfinite;                     // [B, n]
  int64_t logits_strides[3], unconditional_strides[3];
  int64_t positions_strides[2], places_strides[2], codes_strides[2], confidence_strides[2], nonfinite_strides[2];
  int64_t seed_stride;
  int64_t wanted_share;  // of top-p, in units of 2^-31; 0 keeps all
  int32_t num_images, num_tokens, num_codes;
  int32_t top_k;  // 0 keeps all
  int32_t step;
  float inverse_temperature;
  bool greedy;
  bool marks_only;   // nonfinite is written where it is true, as tokens of an image share it
  bool whole_loads;  // codes of a token follow each other, and each token's begin at a multiple of four numbers
};

// Codes a row may have.
constexpr int kMaxSampledCodes = 8192;

#ifndef HMAR_ON_CPU
// Puts the kernel on a stream: no synchronisation, no allocation, arguments already checked. overlap: it may start before the
// end of the one before it, and then waits, but for seeds and positions.
cudaError_t launch_sample_rows(const SampleRowsParams& params, LogitType type, bool overlap, cudaStream_t stream);
#endif

}  // namespace hmar
