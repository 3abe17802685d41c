// Runs the Hopper attention kernels of csrc, as they stand, on the CPU; test_hopper_source.py loads this through ctypes, and
// writes what it wants: tiles.inc, types by name, and kernels.inc, KERNEL(name, template, tile, params) of each.
#include <cstring>

#include "hopper_backward.cuh"
#include "hopper_backward_dkdv.cuh"
#include "hopper_backward_dq.cuh"
#include "hopper_forward.cuh"

using namespace hmar;

namespace {

struct Kernel {
  const char* name;
  int num_threads;
  size_t shared_bytes;
  void (*run)(const void* params);
};

#include "tiles.inc"

#define KERNEL(NAME, TEMPLATE, TILE, PARAMS)                              \
  {NAME, TILE::kNumThreads, sizeof(TILE::Shared), [](const void* params) { \
     TEMPLATE<TILE>(*static_cast<const PARAMS*>(params));                  \
   }},
const Kernel KERNELS[] = {
#include "kernels.inc"
};

const Kernel* find(const char* name) {
  for (const Kernel& kernel : KERNELS) {
    if (!std::strcmp(kernel.name, name)) return &kernel;
  }
  return nullptr;
}

std::deque<MapContent> maps;
std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;

}  // namespace

// 0 where there is no such kernel.
extern "C" int num_threads_of(const char* name) { return find(name) ? find(name)->num_threads : 0; }

extern "C" void describe(uint64_t* tensor_map, const void* data, int rank, const uint64_t* sizes, const uint64_t* strides,
                         const uint32_t* box) {
  MapContent map{static_cast<const uint8_t*>(data), rank, {}, {}, {}, false};
  std::copy(sizes, sizes + rank, map.sizes);
  std::copy(strides, strides + rank - 1, map.strides);
  std::copy(box, box + rank, map.box);
  maps.push_back(map);
  *tensor_map = reinterpret_cast<uint64_t>(&maps.back());
}

// In the next launch copies without a tensor map are from such ranges only; from anywhere where none is named.
extern "C" void allow_copies_from(const uint8_t* begin, const uint8_t* end) { readable.emplace_back(begin, end); }

// Null, or what went wrong. Blocks run one after the other, or side by side. late_warp: of each block, -1 for none.
extern "C" const char* run_on_cpu(const char* name, const void* params, int num_blocks, bool last_thread_first,
                                  bool side_by_side, int late_warp) {
  static Cluster cluster;
  const Kernel& kernel = *find(name);
  cluster.failure = kernel.shared_bytes > SHARED_BYTES ? "more shared memory than there is" : "";
  cluster.kernel = [&] { kernel.run(params); };
  cluster.readable.swap(readable);
  readable.clear();
  gridDim.x = unsigned(num_blocks);
  const int at_once = side_by_side ? num_blocks : 1;
  for (int block = 0; block < num_blocks && cluster.failure.empty(); block += at_once) {
    run_cluster(cluster, block, at_once, kernel.num_threads, int(kernel.shared_bytes), {last_thread_first, last_thread_first, late_warp});
  }
  maps.clear();
  return cluster.failure.empty() ? nullptr : cluster.failure.c_str();
}
