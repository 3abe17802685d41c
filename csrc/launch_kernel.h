// How kernels are launched that are of clusters, or that may start before those queued before them have ended.
#pragma once

#include <cuda_runtime_api.h>

namespace hmar {

// cluster_blocks: 1 for none. overlap: programmatic dependent launch; the kernel waits by itself (hopper_ptx.cuh).
template <class Params>
cudaError_t launch_kernel(void (*kernel)(Params), Params params, int num_blocks, int num_threads, int cluster_blocks,
                          int shared_bytes, bool overlap, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster_blocks > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(cluster_blocks), 1, 1};
  }
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

}  // namespace hmar
