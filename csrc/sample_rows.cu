// Instances of the kernel that draws codes and its launch. Everything else is in sample_rows.cuh.
#include "sample_rows.cuh"

#include "launch_kernel.h"
#include "sample_rows.h"

namespace hmar {
namespace {

static_assert(sizeof(SampleShared) <= 48 * 1024, "more shared memory has to be asked for");

using Kernel = void (*)(SampleRowsParams);

template <LogitType kLogitType>
Kernel kernel_for(int num_codes) {
  constexpr int kGroupCodes = 4 * kSampleThreads;
  static_assert(kMaxSampledCodes == 4 * kGroupCodes);
  return num_codes <= 2 * kGroupCodes ? sample_rows_kernel<kLogitType, 2> : sample_rows_kernel<kLogitType, 4>;
}

Kernel kernel_for(LogitType type, int num_codes) {
  switch (type) {
    case LogitType::kFloat16: return kernel_for<LogitType::kFloat16>(num_codes);
    case LogitType::kBFloat16: return kernel_for<LogitType::kBFloat16>(num_codes);
    case LogitType::kFloat32: return kernel_for<LogitType::kFloat32>(num_codes);
  }
  return nullptr;
}

}  // namespace

cudaError_t launch_sample_rows(const SampleRowsParams& params, LogitType type, bool overlap, cudaStream_t stream) {
  if (params.num_codes > kMaxSampledCodes) return cudaErrorInvalidValue;
  return launch_kernel(kernel_for(type, params.num_codes), params, params.num_images * params.num_tokens, kSampleThreads, 1,
                       sizeof(SampleShared), overlap, stream);
}

}  // namespace hmar
