// Instances of the kernels for few rows and their launch. Everything else is in linear_rows.cuh.
#include "linear_rows.cuh"

#include "launch_kernel.h"
#include "linear_rows.h"
#include "tensor_map.h"

namespace hmar {
namespace {

struct Instance {
  DType dtype;
  int rows;
  bool normed;
  int num_threads, shared_bytes;
  void (*kernel)(LinearRowsParams);
};

template <DType kType, int kRows, bool kNormed>
constexpr Instance instance() {
  using Tile = LinearRowsTile<kType, kRows, kNormed>;
  return {kType, kRows, kNormed, Tile::kNumThreads, sizeof(typename Tile::Shared), linear_rows_kernel<Tile>};
}

// What linear/cuda.py's ROWS and NORMED_ROWS name.
constexpr auto kFloat16 = DType::kFloat16, kBFloat16 = DType::kBFloat16;
const Instance INSTANCES[] = {
    instance<kFloat16, 8, false>(),  instance<kFloat16, 16, false>(),  instance<kFloat16, 32, false>(),
    instance<kFloat16, 8, true>(),   instance<kBFloat16, 8, false>(),  instance<kBFloat16, 16, false>(),
    instance<kBFloat16, 32, false>(), instance<kBFloat16, 8, true>(),
};

cudaError_t describe(TensorMap* map, DType dtype, const void* data, const MapGeometry& geometry) {
  return encode_tensor_map(map, tensor_map_type(dtype), geometry.rank, data, geometry.sizes, geometry.strides, geometry.box,
                           CU_TENSOR_MAP_SWIZZLE_128B);
}

}  // namespace

std::vector<int> linear_rows_kernels() {
  std::vector<int> rows;
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype == kBFloat16 && !instance.normed) rows.push_back(instance.rows);
  }
  return rows;
}

cudaError_t launch_linear_rows(const LinearRows& call, int kernel_rows, bool overlap, cudaStream_t stream) {
  const bool normed = call.norm.scale != nullptr;
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype != call.dtype || instance.rows != kernel_rows || instance.normed != normed) continue;
    LinearRowsParams params = linear_rows_params(call);
    cudaError_t error = describe(&params.weight, call.dtype, call.weight,
                                 linear_geometry(call.num_outputs, call.num_inputs, kLinearFeatures));
    if (error == cudaSuccess && !normed) {
      error = describe(&params.x_map, call.dtype, call.x, linear_geometry(call.num_rows, call.num_inputs, instance.rows));
    }
    int device, num_sms;
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(instance.kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared_bytes);
    }
    if (error != cudaSuccess) return error;
    const int num_tiles = divided(call.num_outputs, kLinearFeatures);
    const int splits = linear_splits(num_tiles, params.num_chunks, num_sms);
    return launch_kernel(instance.kernel, params, num_tiles * splits, instance.num_threads, splits, instance.shared_bytes,
                         overlap, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_norm_rows(NormRowsParams params, DType dtype, int num_rows, bool overlap, cudaStream_t stream) {
  const auto kernel = dtype == kBFloat16 ? norm_rows_kernel<kBFloat16> : norm_rows_kernel<kFloat16>;
  return launch_kernel(kernel, params, num_rows, kNormThreads, 1, 2 * kNormWarps * sizeof(float), overlap, stream);
}

}  // namespace hmar
