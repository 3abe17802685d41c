// Instances of the kernel of transformer blocks for few rows and its launch. Everything else is in block_rows.cuh.
#include "block_rows.cuh"

#include <mutex>

#include "block_rows.h"
#include "tensor_map.h"

namespace hmar {
namespace {

struct Instance {
  DType dtype;
  int rows, num_threads, shared_bytes;
  void (*kernel)(BlockRowsParams);
};

template <DType kType, int kRows>
constexpr Instance instance() {
  using Tile = BlockRowsTile<kType, kRows>;
  return {kType, kRows, Tile::kNumThreads, sizeof(typename Tile::Shared), block_rows_kernel<Tile>};
}

// What blocks/cuda.py's ROWS name.
constexpr auto kFloat16 = DType::kFloat16, kBFloat16 = DType::kBFloat16;
const Instance INSTANCES[] = {
    instance<kFloat16, 8>(),
    instance<kFloat16, 16>(),
    instance<kFloat16, 32>(),
    instance<kBFloat16, 8>(),
    instance<kBFloat16, 16>(),
    instance<kBFloat16, 32>(),
};
constexpr int kNumInstances = sizeof(INSTANCES) / sizeof(Instance), kMaxDevices = 64;

struct Launch {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};

  Launch(const Instance& instance, int num_clusters, cudaStream_t stream) {
    config.gridDim = dim3(num_clusters * kBlockSplits);
    config.blockDim = dim3(instance.num_threads);
    config.dynamicSmemBytes = instance.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kBlockSplits, 1, 1};
    // All blocks at once, or none.
    attributes[1].id = cudaLaunchAttributeCooperative;
    attributes[1].val.cooperative = 1;
  }
};

// How many clusters are on the device at once, found once. 0 where there is no room for one.
cudaError_t find_clusters(int* num_clusters, int index) {
  static std::mutex mutex;
  static int found[kMaxDevices][kNumInstances];
  const std::lock_guard<std::mutex> lock(mutex);
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  int& known = found[device][index];
  if (known == 0) {
    const Instance& instance = INSTANCES[index];
    const auto* kernel = reinterpret_cast<const void*>(instance.kernel);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, instance.shared_bytes);
    Launch one(instance, 1, nullptr);
    one.config.numAttrs = 1;
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&known, kernel, &one.config);
  }
  *num_clusters = known;
  return error;
}

}  // namespace

std::vector<int> block_rows_kernels() {
  std::vector<int> rows;
  for (const Instance& instance : INSTANCES) {
    if (instance.dtype == kBFloat16) rows.push_back(instance.rows);
  }
  return rows;
}

cudaError_t describe_block(BlockWeights* to, DType dtype, const BlockTensors& tensors, int width, int hidden_width) {
  const int outputs[] = {3 * width, width, hidden_width, width}, inputs[] = {width, width, width, hidden_width};
  for (int layer = 0; layer < NUM_BLOCK_LAYERS; ++layer) {
    const uint64_t sizes[] = {uint64_t(inputs[layer]), uint64_t(outputs[layer])}, strides[] = {2 * sizes[0]};
    const uint32_t box[] = {kLinearInputs, kLinearFeatures};
    const cudaError_t error = encode_tensor_map(&to->layers[layer], tensor_map_type(dtype), 2, tensors.weights[layer], sizes,
                                                strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
    if (error != cudaSuccess) return error;
    to->biases[layer] = tensors.biases[layer];
  }
  to->q_bias = tensors.q_bias, to->v_bias = tensors.v_bias, to->log_scale = tensors.log_scale;
  return cudaSuccess;
}

cudaError_t launch_block_rows(const BlockRowsParams& params, DType dtype, int kernel_rows, cudaStream_t stream) {
  for (int index = 0; index < kNumInstances; ++index) {
    const Instance& instance = INSTANCES[index];
    if (instance.dtype != dtype || instance.rows != kernel_rows) continue;
    int num_clusters;
    const cudaError_t error = find_clusters(&num_clusters, index);
    if (error != cudaSuccess) return error;
    if (num_clusters == 0) return cudaErrorCooperativeLaunchTooLarge;
    const Launch launch(instance, num_clusters, stream);
    void* arguments[] = {const_cast<BlockRowsParams*>(&params)};
    return cudaLaunchKernelExC(&launch.config, reinterpret_cast<const void*>(instance.kernel), arguments);
  }
  return cudaErrorInvalidValue;
}

}  // namespace hmar
