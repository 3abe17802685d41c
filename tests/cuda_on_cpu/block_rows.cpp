// Runs csrc/block_rows.cuh, as it stands, on the CPU; test_block_rows_source.py loads this through ctypes.
#include "block_rows.cuh"

using namespace hmar;

namespace {

template <class Tile>
void run(const BlockRowsParams& params, int num_clusters, bool last_thread_first, Cluster& cluster) {
  cluster.kernel = [&] { block_rows_kernel<Tile>(params); };
  gridDim.x = unsigned(num_clusters * kBlockSplits);
  run_cluster(cluster, 0, num_clusters * kBlockSplits, Tile::kNumThreads, sizeof(typename Tile::Shared),
              {last_thread_first, last_thread_first}, kBlockSplits);
}

template <DType kType>
void run(const BlockRowsParams& params, int kernel_rows, int num_clusters, bool last_thread_first, Cluster& cluster) {
  if (kernel_rows == 8) return run<BlockRowsTile<kType, 8>>(params, num_clusters, last_thread_first, cluster);
  if (kernel_rows == 16) return run<BlockRowsTile<kType, 16>>(params, num_clusters, last_thread_first, cluster);
  if (kernel_rows == 32) return run<BlockRowsTile<kType, 32>>(params, num_clusters, last_thread_first, cluster);
  cluster.failure = "no such tile";
}

}  // namespace

// weights: [num_blocks, NUM_BLOCK_LAYERS], where the maps of params->weights, made here, lead to. Null, or what went wrong.
extern "C" const char* block_rows_on_cpu(BlockRowsParams* params, const void* const* weights, bool bfloat16, int kernel_rows,
                                         int num_clusters, bool last_thread_first) {
  static Cluster cluster;
  cluster.failure.clear();
  std::deque<MapContent> maps;
  auto* blocks = const_cast<BlockWeights*>(params->weights);
  const int width = params->width, hidden_width = params->hidden_width;
  const int outputs[] = {3 * width, width, hidden_width, width}, inputs[] = {width, width, width, hidden_width};
  for (int i = 0; i < params->num_blocks * NUM_BLOCK_LAYERS; ++i) {
    const int layer = i % NUM_BLOCK_LAYERS;
    maps.push_back({static_cast<const uint8_t*>(weights[i]),
                    2,
                    {uint64_t(inputs[layer]), uint64_t(outputs[layer])},
                    {2 * uint64_t(inputs[layer])},
                    {uint32_t(kLinearInputs), uint32_t(kLinearFeatures)},
                    false});
    blocks[i / NUM_BLOCK_LAYERS].layers[layer].opaque[0] = reinterpret_cast<uint64_t>(&maps.back());
  }
  if (bfloat16) {
    run<DType::kBFloat16>(*params, kernel_rows, num_clusters, last_thread_first, cluster);
  } else {
    run<DType::kFloat16>(*params, kernel_rows, num_clusters, last_thread_first, cluster);
  }
  return cluster.failure.empty() ? nullptr : cluster.failure.c_str();
}

extern "C" int size_of_block_weights() { return sizeof(BlockWeights); }
extern "C" int size_of_params() { return sizeof(BlockRowsParams); }
