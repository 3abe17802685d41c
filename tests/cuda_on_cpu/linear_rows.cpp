// Runs csrc/linear_rows.cuh, as it stands, on the CPU; test_linear_rows_source.py loads this through ctypes.
#include "linear_rows.cuh"

using namespace hmar;

namespace {

constexpr DType kType = DType::kBFloat16;

const char* run(Block& block, unsigned num_blocks, bool last_warp_first) {
  for (blockIdx.x = 0; blockIdx.x < num_blocks && !block.failure; ++blockIdx.x) {
    run_block(block, kLinearThreads, last_warp_first);
  }
  return block.failure;
}

template <class Tile>
const char* run(const LinearRowsParams& params, Block& block, bool last_warp_first) {
  block.kernel = [&] { linear_rows_kernel<Tile>(params); };
  return run(block, (params.num_outputs + kFeatures - 1) / kFeatures, last_warp_first);
}

}  // namespace

// Return what went wrong, or null. counts: prefetches, and loads of the weight after the wait for the kernel before.
extern "C" const char* linear_rows_on_cpu(const LinearRowsParams* params, int rows, bool last_warp_first, long* counts) {
  Block block;
  const auto* weight = static_cast<const uint8_t*>(params->weight);
  block.readable.emplace_back(weight, weight + 2l * params->num_outputs * params->num_inputs);
  const char* failure = "no such tile";
  if (rows == 8) failure = run<LinearRowsTile<kType, 8>>(*params, block, last_warp_first);
  if (rows == 16) failure = run<LinearRowsTile<kType, 16>>(*params, block, last_warp_first);
  counts[0] = block.prefetches;
  counts[1] = block.late_loads;
  return failure;
}

extern "C" const char* norm_rows_on_cpu(const NormRowsParams* params, int num_rows, bool last_warp_first) {
  Block block;
  block.kernel = [&] { norm_rows_kernel<kType>(*params); };
  return run(block, num_rows, last_warp_first);
}
