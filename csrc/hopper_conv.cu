// Instances of the Hopper convolutions and their launch. Everything else is in hopper_conv.cuh.
#include "hopper_conv.cuh"

#include <algorithm>
#include <iterator>

#include "hopper_conv.h"
#include "tensor_map.h"

namespace hmar {
namespace {

struct Instance {
  HopperConvKernel kernel;
  void (*float16)(HopperConvParams);
  void (*bfloat16)(HopperConvParams);
  int num_threads;
};

template <Resolution kResolution, int kBlocks, int kStages, int kMapStages>
constexpr Instance instance() {
  using Half = HopperConvTile<DType::kFloat16, kResolution, kBlocks, kStages, kMapStages>;
  using Brain = HopperConvTile<DType::kBFloat16, kResolution, kBlocks, kStages, kMapStages>;
  return {{kResolution == Resolution::kDoubled, kBlocks, kStages, kMapStages, sizeof(typename Half::Shared)},
          hopper_conv_kernel<Half>, hopper_conv_kernel<Brain>, Half::kNumThreads};
}

// What conv2d/hopper.py's table names.
constexpr auto kSame = Resolution::kSame, kDoubled = Resolution::kDoubled;
const Instance KERNELS[] = {
    instance<kSame, 2, 12, 3>(),
    instance<kSame, 1, 14, 3>(),
    instance<kDoubled, 2, 10, 4>(),
    instance<kDoubled, 1, 12, 4>(),
};

cudaError_t describe(TensorMap* map, DType dtype, const void* data, const MapGeometry& geometry) {
  return encode_tensor_map(map, tensor_map_type(dtype), geometry.rank, data, geometry.sizes, geometry.strides, geometry.box,
                           CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace

std::vector<HopperConvKernel> hopper_conv_kernels() {
  std::vector<HopperConvKernel> kernels;
  for (const auto& instance : KERNELS) kernels.push_back(instance.kernel);
  return kernels;
}

cudaError_t launch_hopper_conv(int kernel, const HopperConvShape& shape, const HopperConvInput& input,
                               const HopperConvOutput& output, cudaStream_t stream) {
  if (kernel < 0 || kernel >= int(std::size(KERNELS))) return cudaErrorInvalidValue;
  const Instance& instance = KERNELS[kernel];
  HopperConvParams params = conv_params(shape, instance.kernel, input, output);
  cudaError_t error = describe(&params.x, shape.dtype, input.x, conv_x_geometry(shape, instance.kernel));
  if (error == cudaSuccess) {
    error = describe(&params.weight, shape.dtype, input.weight, conv_weight_geometry(shape, instance.kernel));
  }
  int device, num_sms;
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  const void* function =
      reinterpret_cast<const void*>(shape.dtype == DType::kBFloat16 ? instance.bfloat16 : instance.float16);
  const int shared_bytes = instance.kernel.shared_bytes;
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error != cudaSuccess) return error;
  void* arguments[] = {&params};
  return cudaLaunchKernel(function, std::min(params.num_items, num_sms), instance.num_threads, arguments, shared_bytes,
                          stream);
}

}  // namespace hmar
