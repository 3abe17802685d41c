// Instances of the kernels for few rows and their launch.
#include "linear_rows.cuh"

#include "launch.h"

namespace hmar {
namespace {

struct Instance {
  DType dtype;
  int rows;
  void (*kernel)(LinearRowsParams);
  int shared_bytes;
};

template <class Tile>
constexpr Instance instance() {
  return {Tile::kType, Tile::kRows, linear_rows_kernel<Tile>, sizeof(typename Tile::Shared)};
}

const Instance INSTANCES[] = {
    instance<LinearRowsTile<DType::kBFloat16, 8>>(),
    instance<LinearRowsTile<DType::kBFloat16, 16>>(),
    instance<LinearRowsTile<DType::kFloat16, 8>>(),
    instance<LinearRowsTile<DType::kFloat16, 16>>(),
};

template <class Params>
cudaError_t launch(void (*kernel)(Params), Params params, unsigned num_blocks, int shared_bytes, bool overlap,
                   cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kLinearThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace

std::vector<int> linear_rows_kernels() {
  std::vector<int> rows;
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype == DType::kBFloat16) rows.push_back(instance.rows);
  }
  return rows;
}

cudaError_t launch_linear_rows(LinearRowsParams params, DType dtype, int kernel_rows, bool overlap,
                               cudaStream_t stream) {
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype != dtype || instance.rows != kernel_rows) continue;
    const unsigned num_blocks = (params.num_outputs + kFeatures - 1) / kFeatures;
    return launch(instance.kernel, params, num_blocks, instance.shared_bytes, overlap, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_norm_rows(NormRowsParams params, DType dtype, int num_rows, bool overlap, cudaStream_t stream) {
  const auto kernel = dtype == DType::kBFloat16 ? norm_rows_kernel<DType::kBFloat16> : norm_rows_kernel<DType::kFloat16>;
  return launch(kernel, params, num_rows, 2 * kLinearWarps * sizeof(float), overlap, stream);
}

}  // namespace hmar
