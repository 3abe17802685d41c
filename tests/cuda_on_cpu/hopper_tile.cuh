// Takes the place of csrc/hopper_tile.cuh, and of what it includes, when csrc/hopper_conv.cuh and linear_rows.cuh are compiled for the
// CPU: every thread of a block is a coroutine, and the blocks of a cluster take turns. The operands of wgmma, the swizzle of the copy engine and what it leaves outside of a
// tensor are written down a second time, element by element as in the PTX ISA. A copy lands when it is issued, and a product
// reads shared memory as late as its thread lets it: a buffer given back too early shows in the result.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "hopper_params.h"

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  unsigned x;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline Index threadIdx, blockIdx, gridDim;

namespace hmar {

constexpr int WARP_SIZE = 32, SHARED_BYTES = 227 * 1024;
alignas(1024) inline uint8_t shared_memory[SHARED_BYTES];

constexpr int kGroupRows = 64;
constexpr int kGroupThreads = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;

struct Product {
  DType type;
  float* d;
  int columns;
  uint64_t a, b;
  bool accumulate;
};

struct Thread {
  ucontext_t context;
  std::vector<uint8_t> stack = std::vector<uint8_t>(64 * 1024);
  std::function<bool()> ready;  // empty when it can run
  bool done = false;
  bool waited = false;  // for the kernel before
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

struct Meeting {
  int arrived = 0;
  long generation = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t registers[WARP_SIZE][4];
};

// Of a cluster of blocks, one after the other.
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Meeting> barriers;
  std::vector<uint8_t> shared_memory;  // while another block runs
  long launches = 0;    // of the kernels that depend on this one
  long late_boxes = 0;  // that could have been asked for before the wait, or that come after such a launch
};
struct Cluster {
  std::vector<Block> blocks;
  Meeting barrier;
  ucontext_t scheduler;
  std::string failure;
  std::function<void()> kernel;
};
inline Cluster* cluster;
inline Block* running;

inline Thread& this_thread() { return running->threads[threadIdx.x]; }
inline Warp& this_warp() { return running->warps[threadIdx.x / WARP_SIZE]; }

// Lets others run until `ready`.
inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  Thread& thread = this_thread();
  thread.ready = std::move(ready);
  swapcontext(&thread.context, &cluster->scheduler);
}
[[noreturn]] inline void fail(const std::string& why) {
  cluster->failure = why;
  for (;;) swapcontext(&this_thread().context, &cluster->scheduler);
}

inline void arrive(Meeting& meeting, int expected) {
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}
inline void meet(Meeting& meeting, int expected) {
  const long generation = meeting.generation;
  arrive(meeting, expected);
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

inline void __syncwarp() { meet(this_warp().meeting, WARP_SIZE); }
inline void __syncthreads() { meet(running->barriers[0], int(running->threads.size())); }

template <int kThreads = kGroupThreads>
void group_sync(int group) {
  meet(running->barriers[group + 1], kThreads);
}

inline int cluster_rank() { return int(running - cluster->blocks.data()); }
inline int cluster_size() { return int(cluster->blocks.size()); }
inline void cluster_sync() { meet(cluster->barrier, int(cluster->blocks.size() * running->threads.size())); }

inline float __shfl_xor_sync(uint32_t, float x, int lanes) {
  const int lane = threadIdx.x % WARP_SIZE;
  std::memcpy(&this_warp().registers[lane][0], &x, sizeof(x));
  __syncwarp();
  std::memcpy(&x, &this_warp().registers[lane ^ lanes][0], sizeof(x));
  __syncwarp();
  return x;
}

template <int kGroups>
void turn_wait(int group) {
  meet(running->barriers[1 + kGroups + group], 2 * kGroupThreads);
}
template <int kGroups>
void turn_pass(int group) {
  arrive(running->barriers[1 + kGroups + (group + 1) % kGroups], 2 * kGroupThreads);
}

inline int uniform(int x) { return x; }  // the kernel passes what is alike in a warp

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - shared_memory;
  if (offset < 0 || offset >= SHARED_BYTES) fail("an address outside of shared memory");
  return uint32_t(offset);
}

inline void cluster_leave() { cluster_sync(); }
inline float load_cluster(const float* address, int rank) {
  const uint32_t offset = shared_address(address);
  const Block& block = cluster->blocks[rank];
  float x;
  std::memcpy(&x, &block == running ? shared_memory + offset : block.shared_memory.data() + offset, sizeof(x));
  return x;
}

inline void launch_dependents() { ++running->launches; }
inline void wait_for_previous() { this_thread().waited = true; }

// --- mbarriers -----------------------------------------------------------------------------------------------------

struct Barrier {
  int arrivals, pending, bytes;
  uint32_t phase;
};

inline void complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
  }
}
inline void barrier_arrive(Barrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals than a barrier expects");
  --barrier.pending;
  complete(barrier);
}
inline void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  barrier.bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; });
}
template <int kCount>
void barriers_init(Barrier (&barriers)[kCount], int arrivals) {
  for (Barrier& barrier : barriers) barrier = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() {}
inline void release(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % WARP_SIZE == 0) barrier_arrive(barrier);
}

template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  int last_stage() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// --- copy engine ---------------------------------------------------------------------------------------------------

// What opaque[0] of a tensor map points to.
struct MapContent {
  const uint8_t* data;
  int rank;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];
  bool of_previous;  // written by the kernel before
};

// Of an address in rows of 64 or 128 bytes: chunks of 16 bytes change places, in a pattern of 512 or 1024 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

inline void prefetch_map(const TensorMap&) {}

inline void copy_box(uint8_t* dst, const TensorMap& map, Barrier& barrier, std::vector<int> begin) {
  const auto& content = *reinterpret_cast<const MapContent*>(map.opaque[0]);
  if (int(begin.size()) != content.rank) fail("coordinates of another rank than the tensor map's");
  const uint32_t start = shared_address(dst);
  if (start % 1024) fail("a box that is not aligned in shared memory");
  if (content.of_previous && !this_thread().waited) fail("a box of what the kernel before writes, without a wait for it");
  const uint32_t row_bytes = 2 * content.box[0];
  if (row_bytes != 64 && row_bytes != 128) fail("a box of neither of the two swizzles");
  running->late_boxes += !content.of_previous && (this_thread().waited || running->launches > 0);
  int num_elements = 1;
  for (int i = 0; i < content.rank; ++i) num_elements *= int(content.box[i]);
  for (int index = 0; index < num_elements; ++index) {
    int rest = index;
    bool inside = true;
    uint64_t offset = 0;
    for (int i = 0; i < content.rank; ++i) {
      const int64_t at = begin[i] + rest % int(content.box[i]);
      rest /= int(content.box[i]);
      inside &= at >= 0 && at < int64_t(content.sizes[i]);
      offset += at * (i == 0 ? 2 : content.strides[i - 1]);
    }
    uint16_t number = 0;
    if (inside) std::memcpy(&number, content.data + offset, 2);
    const uint32_t address = start + 2 * index;
    if (address + 2 > SHARED_BYTES) fail("a box beyond shared memory");
    std::memcpy(shared_memory + swizzled(address, row_bytes), &number, 2);
  }
  barrier.bytes -= 2 * num_elements;
  complete(barrier);
}
template <class... Coordinates>
void tma_load(uint8_t* dst, const TensorMap& map, Barrier& barrier, Coordinates... coordinates) {
  copy_box(dst, map, barrier, {coordinates...});
}

// --- numbers -------------------------------------------------------------------------------------------------------

template <DType kType>
float widened(uint16_t bits) {
  if constexpr (kType == DType::kFloat16) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return float(x);
  } else {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
}
template <DType kType>
uint16_t rounded(float x) {
  uint16_t bits;
  if constexpr (kType == DType::kFloat16) {
    const auto half = _Float16(x);
    std::memcpy(&bits, &half, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = std::isnan(x) ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  return bits;
}
template <DType kType>
uint32_t pack(float low, float high) {
  return rounded<kType>(low) | uint32_t(rounded<kType>(high)) << 16;
}
template <DType kType>
void unpack(uint32_t packed, float& low, float& high) {
  low = widened<kType>(uint16_t(packed)), high = widened<kType>(uint16_t(packed >> 16));
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }

// stmatrix: a lane holds numbers 2 t and 2 t + 1 of row g of each matrix; lane 8 i + j says where row j of matrix i goes.
inline void store_matrices(uint8_t* row, const uint32_t (&a)[4]) {
  const int lane = threadIdx.x % WARP_SIZE;
  std::memcpy(this_warp().registers[lane], a, sizeof(a));
  __syncwarp();
  uint32_t chunk[4];
  for (int t = 0; t < 4; ++t) chunk[t] = this_warp().registers[4 * (lane % 8) + t][lane / 8];
  if (shared_address(row) % 16) fail("a row of stmatrix that is not aligned");
  std::memcpy(row, chunk, sizeof(chunk));
  __syncwarp();
}

// --- wgmma ---------------------------------------------------------------------------------------------------------

inline uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Of panels: rows of 128 bytes, groups of eight one after the other.
inline uint64_t row_descriptor(const uint8_t* panel) {
  return uint64_t(shared_address(panel) >> 4) | uint64_t{64} << 32 | uint64_t{1} << 62;
}

// Number k of row r of a K-major operand in swizzled rows of 64 or 128 bytes.
template <DType kType>
float element(uint64_t descriptor, int r, int k) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint64_t mode = descriptor >> 62;
  if (mode != 1 && mode != 2) fail("an operand in rows of neither of the two swizzles");
  const uint32_t row_bytes = mode == 1 ? 128 : 64;
  const uint32_t address = swizzled(field(0) + r / 8 * field(32) + r % 8 * row_bytes + k * 2, row_bytes);
  if (address + 2 > SHARED_BYTES) fail("an operand beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, shared_memory + address, 2);
  return widened<kType>(bits);
}

// This thread's part of a product: rows 16 w + g and 16 w + g + 8, columns 8 n + 2 t and 8 n + 2 t + 1.
template <DType kType>
void multiply(const Product& product) {
  const int lane = threadIdx.x % WARP_SIZE, first_row = threadIdx.x % kGroupThreads / WARP_SIZE * 16 + lane / 4;
  float a[2][16], b[16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) a[half][k] = element<kType>(product.a, first_row + 8 * half, k);
  }
  for (int n = 0; n < product.columns / 8; ++n) {
    for (int c = 0; c < 2; ++c) {
      for (int k = 0; k < 16; ++k) b[k] = element<kType>(product.b, 8 * n + lane % 4 * 2 + c, k);
      for (int half = 0; half < 2; ++half) {
        float& d = product.d[4 * n + 2 * half + c];
        float sum = product.accumulate ? d : 0.0f;
        for (int k = 0; k < 16; ++k) sum += a[half][k] * b[k];
        d = sum;
      }
    }
  }
}

inline void wgmma_fence() {}
template <DType kType, bool kColumns, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(!kColumns);
  this_thread().open.push_back({kType, d, 2 * kRegisters, a, b, accumulate});
}
inline void wgmma_commit() {
  this_thread().groups.push_back(std::move(this_thread().open));
  this_thread().open.clear();
}
template <int kPending>
void wgmma_wait() {
  auto& groups = this_thread().groups;
  while (groups.size() > kPending) {
    for (const Product& product : groups.front()) {
      if (product.type == DType::kFloat16) {
        multiply<DType::kFloat16>(product);
      } else {
        multiply<DType::kBFloat16>(product);
      }
    }
    groups.pop_front();
  }
}

// --- scheduler -----------------------------------------------------------------------------------------------------

inline void enter() {
  cluster->kernel();
  this_thread().done = true;
  swapcontext(&this_thread().context, &cluster->scheduler);
}

// A block as far as it comes: whether it came any further. Each thread runs as far as it can before the next one.
inline bool advance_block(bool last_thread_first) {
  const int num_threads = int(running->threads.size());
  bool any = false;
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < num_threads; ++i) {
      threadIdx.x = last_thread_first ? num_threads - 1 - i : i;
      Thread& thread = this_thread();
      if (thread.done || (thread.ready && !thread.ready())) continue;
      thread.ready = nullptr;
      swapcontext(&cluster->scheduler, &thread.context);
      if (!cluster->failure.empty()) return true;
      any = moved = true;
    }
  }
  return any;
}

inline bool ended(const Block& block) {
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.done; });
}

// One cluster, whose first block has this index.
inline void run_cluster(Cluster& run, int first_block, int num_blocks, int num_threads, int shared_bytes,
                        bool last_thread_first) {
  cluster = &run;
  run.barrier = {};
  run.blocks.resize(num_blocks);
  for (Block& block : run.blocks) {
    block.shared_memory.assign(shared_bytes, 0xff);  // NaN in every format
    block.warps = std::vector<Warp>(num_threads / WARP_SIZE);
    block.barriers.clear();
    block.threads.resize(num_threads);
    block.launches = block.late_boxes = 0;
    for (Thread& thread : block.threads) {
      thread.ready = nullptr;
      thread.done = thread.waited = false;
      thread.open.clear();
      thread.groups.clear();
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, enter, 0);
    }
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < num_blocks; ++i) {
      const int rank = last_thread_first ? num_blocks - 1 - i : i;
      running = &run.blocks[rank];
      blockIdx.x = unsigned(first_block + rank);
      std::memcpy(shared_memory, running->shared_memory.data(), shared_bytes);
      moved |= advance_block(last_thread_first);
      std::memcpy(running->shared_memory.data(), shared_memory, shared_bytes);
      // Of a block that has ended others read nothing.
      if (ended(*running)) std::memset(running->shared_memory.data(), 0xff, shared_bytes);
      if (!run.failure.empty()) return;
    }
  }
  if (!std::all_of(run.blocks.begin(), run.blocks.end(), ended)) run.failure = "threads wait for each other";
}

}  // namespace hmar
