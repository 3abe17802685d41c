// Tensor maps of the copy engine, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "hopper_params.h"

namespace hmar {

// The driver's function, found once: nothing is linked against the driver. Null where it has none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry) : nullptr;
  }();
  return found;
}

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Read or added to in boxes; what lies outside reads as zero. From the innermost dimension on; strides in bytes, of all
// dimensions but the first.
inline cudaError_t encode_tensor_map(TensorMap* map, CUtensorMapDataType type, int rank, const void* data,
                                     const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                     CUtensorMapSwizzle swizzle) {
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      reinterpret_cast<CUtensorMap*>(map), type, rank, const_cast<void*>(data), reinterpret_cast<const cuuint64_t*>(sizes),
      reinterpret_cast<const cuuint64_t*>(strides), box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace hmar
