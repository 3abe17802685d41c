// Takes the place of csrc/hopper_ptx.cuh, and of what it includes, when a Hopper kernel of csrc is compiled for the CPU: every
// thread of a block is a coroutine, and the blocks of a cluster take turns. The operands of wgmma, the swizzle of the copy engine
// and what it leaves outside of a tensor are written down a second time, element by element as in the PTX ISA. Products and bulk
// additions read shared memory as late as their thread lets them. With first threads first, a copy lands when it is issued: a
// buffer given back too early shows in the result. With last threads first copies land when no thread can go on without, those
// of one barrier at a time, whichever: a wait for them that is missing shows. A kernel may ask for late copies with first threads
// first, too: then those who shall wait for what later threads make of a copy come before them. Fences do nothing here, threads
// take turns in these orders only, and the compiler is another one: what is wrong there does not show.
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
#include <utility>
#include <vector>

#include "cuda_words.h"
#include "hopper_params.h"

using std::max;
using std::min;

template <class T>
T atomicAdd(T* address, T number) {
  const T before = *address;
  *address += number;
  return before;
}
inline int atomicMin(int32_t* address, int number) { return std::exchange(*address, min(*address, number)); }
inline int atomicMax(int32_t* address, int number) { return std::exchange(*address, max(*address, number)); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, const T& value) {
  *address = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
// g++ fuses nothing where the processor that it compiles for need not have fused products.
inline float __uint2float_rn(uint32_t x) { return float(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }

namespace hmar {

constexpr int WARP_SIZE = 32, WARPGROUP_SIZE = 128, MAX_WARPS = 32, SHARED_BYTES = 227 * 1024;
alignas(1024) inline uint8_t shared_memory[SHARED_BYTES];

struct Product {
  DType type;
  float* d;
  int columns;
  bool a_in_registers, b_by_columns;
  float a_values[2][16];  // of this thread's rows, as they were when it was issued
  uint64_t a, b;
  bool accumulate;
};
struct Addition {
  float* to;
  const uint8_t* from;
  int bytes;
};

struct Thread {
  ucontext_t context;
  std::vector<uint8_t> stack = std::vector<uint8_t>(64 * 1024);
  std::function<bool()> ready;  // empty when it can run
  bool done = false;
  bool asleep = false;
  bool held = false;    // until nothing else can go on
  bool waited = false;  // for the kernel before
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<Addition> additions;
  uintptr_t copy_groups = 0;  // committed
};

struct Meeting {
  int arrived = 0;
  long generation = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t registers[WARP_SIZE][8];
};

// Of a cluster of blocks, one after the other.
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<int, Meeting> barriers;
  std::vector<uint8_t> shared_memory;  // while another block runs
  std::map<uintptr_t, std::vector<std::function<void()>>> copies;  // under way: those of a barrier, or of a warp's group, in order
  long launches = 0;    // of the kernels that depend on this one
  long late_boxes = 0;  // that could have been asked for before the wait, or that come after such a launch
};
// What the kernel before writes, at these addresses, which hold NaN while a thread runs that has not waited for it.
struct Previous {
  uint8_t* to;
  std::vector<uint8_t> content;
};
struct Cluster {
  std::vector<Block> blocks;
  int size = 0;  // of a cluster, where these are the blocks of several, which run at once
  std::vector<Previous> previous;
  bool previous_is_shown = true;
  std::map<int, Meeting> barriers;  // of each cluster
  ucontext_t scheduler;
  std::string failure;
  std::function<void()> kernel;
  bool copies_are_late = false;
  int late_warp = -1;  // of each block: after every arrival at a barrier, and wait for one, it goes on only when nothing else can
  uint32_t random = 1;
  std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;  // by copies without a tensor map; empty where not known
};
inline Cluster* cluster;
inline Block* running;

inline void show_previous(bool shown) {
  if (shown == cluster->previous_is_shown) return;
  for (const Previous& part : cluster->previous) {
    if (shown) {
      std::copy(part.content.begin(), part.content.end(), part.to);
    } else {
      std::fill_n(part.to, part.content.size(), 0xff);
    }
  }
  cluster->previous_is_shown = shown;
}

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

// Lets others run first.
inline void __nanosleep(int) {
  Thread& thread = this_thread();
  thread.asleep = true;
  swapcontext(&thread.context, &cluster->scheduler);
}

inline void __syncwarp() { meet(this_warp().meeting, WARP_SIZE); }
inline void __syncthreads() { meet(running->barriers[0], int(running->threads.size())); }

inline void named_barrier_sync(int barrier, int threads) { meet(running->barriers[barrier], threads); }
inline void named_barrier_arrive(int barrier, int threads) { arrive(running->barriers[barrier], threads); }

inline int index_of_running() { return int(running - cluster->blocks.data()); }
inline int cluster_rank() { return index_of_running() % cluster->size; }
inline int cluster_size() { return cluster->size; }
inline void cluster_sync() {
  meet(cluster->barriers[index_of_running() / cluster->size], int(cluster->size * running->threads.size()));
}

// What `words` of the warp's lanes give to this one, who all come here.
template <class Choose>
auto exchanged(const uint32_t* words, int count, Choose choose) {
  Warp& warp = this_warp();
  std::copy(words, words + count, warp.registers[threadIdx.x % WARP_SIZE]);
  __syncwarp();
  const auto chosen = choose(warp.registers);
  __syncwarp();
  return chosen;
}
template <class T>
T value_of_lane(T x, int lane) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &x, sizeof(T));
  return exchanged(words, sizeof(T) / 4, [&](auto& registers) {
    std::memcpy(&x, registers[lane], sizeof(T));
    return x;
  });
}
template <class T>
T __shfl_sync(uint32_t, T x, int lane) {
  return value_of_lane(x, lane % WARP_SIZE);
}
template <class T>
T __shfl_xor_sync(uint32_t, T x, int lanes) {
  return value_of_lane(x, (threadIdx.x % WARP_SIZE) ^ lanes);
}
template <class T>
T __shfl_up_sync(uint32_t, T x, int lanes) {
  const int lane = threadIdx.x % WARP_SIZE;
  return value_of_lane(x, lane >= lanes ? lane - lanes : lane);
}
template <class Better>
int best_of_lanes(int x, Better better) {
  const auto word = uint32_t(x);
  return exchanged(&word, 1, [&](auto& registers) {
    for (int lane = 0; lane < WARP_SIZE; ++lane) x = better(x, int(registers[lane][0]));
    return x;
  });
}
inline int __reduce_min_sync(uint32_t, int x) {
  return best_of_lanes(x, [](int a, int b) { return min(a, b); });
}
inline int __reduce_max_sync(uint32_t, int x) {
  return best_of_lanes(x, [](int a, int b) { return max(a, b); });
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
  const uint32_t word = x;
  return exchanged(&word, 1, [](auto& registers) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < WARP_SIZE; ++lane) lanes |= registers[lane][0] << lane;
    return lanes;
  });
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }

inline int thread_again() { return threadIdx.x; }

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline void pin(float&) {}
template <int kNumbers>
void finish(const float (&)[kNumbers]) {}
inline void hold() {}
inline uint32_t opaque(uint32_t x) { return x; }
inline int32_t load_acquire(const int32_t* counter) { return *counter; }
inline void count_release(int32_t* counter) { ++*counter; }
inline void count_relaxed(int32_t* counter) { count_release(counter); }
template <class T>
uint32_t read_back(const T*) {
  return 0;
}
inline void await_count(const int32_t* counter, int count) {
  wait_until([counter, count] { return *counter >= count; });
}
// As far off as it may be: eleven bits are kept.
inline float tanh_approx(float x) {
  int exponent;
  const float fraction = std::frexp(std::tanh(x), &exponent);
  return std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
}
inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - shared_memory;
  if (offset < 0 || offset >= SHARED_BYTES) fail("an address outside of shared memory");
  return uint32_t(offset);
}

inline void cluster_leave() { cluster_sync(); }
// What lies there in the shared memory of a block of the cluster.
inline uint8_t* at_rank(const void* address, int rank) {
  Block& block = cluster->blocks[index_of_running() / cluster->size * cluster->size + rank];
  return (&block == running ? shared_memory : block.shared_memory.data()) + shared_address(address);
}
inline float load_cluster(const float* address, int rank) {
  float x;
  std::memcpy(&x, at_rank(address, rank), sizeof(x));
  return x;
}

inline void launch_dependents() { ++running->launches; }
inline void wait_for_previous() {
  this_thread().waited = true;
  show_previous(true);
}

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
inline void barrier_init(Barrier& barrier, int arrivals) { barrier = {arrivals, arrivals, 0, 0}; }
inline void fall_behind() {
  if (int(threadIdx.x / WARP_SIZE) != cluster->late_warp) return;
  this_thread().held = true;
  swapcontext(&this_thread().context, &cluster->scheduler);
}
inline void barrier_arrive(Barrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals than a barrier expects");
  --barrier.pending;
  complete(barrier);
  fall_behind();
}
inline void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  barrier.bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; });
  fall_behind();
}
inline void barrier_arrive_at(Barrier& barrier, int rank) {
  barrier_arrive(*reinterpret_cast<Barrier*>(at_rank(&barrier, rank)));
}
inline void store_cluster(float* address, float x, Barrier& barrier, int rank) {
  std::memcpy(at_rank(address, rank), &x, sizeof(x));
  auto& counter = *reinterpret_cast<Barrier*>(at_rank(&barrier, rank));
  counter.bytes -= int(sizeof(x));
  complete(counter);
}
inline void fence_barrier_init() {}
inline void fence_async_proxy() {}
inline void fence_async_proxy_global() {}

inline void check_readable(const void* src, int bytes) {
  const auto* begin = static_cast<const uint8_t*>(src);
  const auto& known = cluster->readable;
  const auto holds = [&](const auto& range) { return begin >= range.first && begin + bytes <= range.second; };
  if (!known.empty() && std::none_of(known.begin(), known.end(), holds)) fail("a copy from outside of the tensors");
}

// A copy, or what follows from copies: now, or when nothing else goes on. key: what lands together.
inline void land(uintptr_t key, std::function<void()> copy) {
  if (!cluster->copies_are_late) return copy();
  running->copies[key].push_back(std::move(copy));
}
// Groups are those of whole warps.
inline uintptr_t key_of_copies(uintptr_t group) { return group * MAX_WARPS + threadIdx.x / WARP_SIZE; }
inline void barrier_arrive_after_cp_async(Barrier& barrier) {
  land(key_of_copies(this_thread().copy_groups), [&barrier] {
    if (barrier.pending == 0) cluster->failure = "more copies than a barrier expects";
    --barrier.pending;
    complete(barrier);
  });
}

inline void cp_async_commit() { ++this_thread().copy_groups; }
template <int kPending>
void cp_async_wait() {
  const uintptr_t num_groups = this_thread().copy_groups;
  for (uintptr_t group = 0; group + kPending < num_groups; ++group) {
    wait_until([block = running, key = key_of_copies(group)] { return block->copies.count(key) == 0; });
  }
}

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
inline void prefetch_l2(const void*) {}
inline void prefetch_bytes(const void* src, int bytes) {
  if (reinterpret_cast<uintptr_t>(src) % 16 || bytes % 16 || bytes <= 0) fail("a prefetch that is not of chunks of 16 bytes");
  check_readable(src, bytes);
}

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
  if (start + 2 * num_elements > SHARED_BYTES) fail("a box beyond shared memory");
  land(reinterpret_cast<uintptr_t>(&barrier), [&content, &barrier, begin = std::move(begin), start, row_bytes, num_elements] {
    if (content.of_previous) show_previous(true);
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
      std::memcpy(shared_memory + swizzled(start + 2 * index, row_bytes), &number, 2);
    }
    barrier.bytes -= 2 * num_elements;
    complete(barrier);
  });
}
template <class... Coordinates>
void tma_load(uint8_t* dst, const TensorMap& map, Barrier& barrier, Coordinates... coordinates) {
  copy_box(dst, map, barrier, {coordinates...});
}

inline void tma_load_once(uint8_t* dst, const TensorMap& map, Barrier& barrier, int c0, int c1) {
  copy_box(dst, map, barrier, {c0, c1});
}

inline void copy(uint32_t dst, const void* src, int bytes, bool valid) {
  if (valid) check_readable(src, bytes);
  land(key_of_copies(this_thread().copy_groups), [dst, src, bytes, valid] {
    std::memset(shared_memory + dst, 0, bytes);
    if (valid) std::memcpy(shared_memory + dst, src, bytes);
  });
}
inline void cp_async_16(uint32_t dst, const void* src, bool valid) {
  if (dst % 16 || reinterpret_cast<uintptr_t>(src) % 16) fail("a copy of 16 bytes that is not aligned");
  copy(dst, src, 16, valid);
}
inline void cp_async_8(uint32_t dst, const void* src, bool valid) { copy(dst, src, 8, valid); }
inline void cp_async_4(uint32_t dst, const void* src, bool valid) { copy(dst, src, 4, valid); }

inline void bulk_add(const TensorMap& map, const uint8_t* src, int column, int row, int head, int batch) {
  const MapContent& content = *reinterpret_cast<const MapContent*>(map.opaque[0]);
  if (shared_address(src) % 128) fail("a box that is not aligned in shared memory");
  const int bytes = 4 * int(content.box[0]);
  if (column != 0 || content.box[0] != content.sizes[0]) fail("a box of other than whole rows");
  if (head < 0 || head >= int(content.sizes[2]) || batch < 0 || batch >= int(content.sizes[3])) fail("a head that there is not");
  for (int i = 0; i < int(content.box[1]); ++i) {
    if (row + i < 0 || row + i >= int(content.sizes[1])) continue;
    const uint64_t offset = (row + i) * content.strides[0] + head * content.strides[1] + batch * content.strides[2];
    auto* to = reinterpret_cast<float*>(const_cast<uint8_t*>(content.data) + offset);
    this_thread().additions.push_back({to, src + i * bytes, bytes});
  }
}
inline void bulk_commit() {}
inline void bulk_wait_read() {
  for (const Addition& addition : this_thread().additions) {
    for (int i = 0; i < addition.bytes / 4; ++i) addition.to[i] += reinterpret_cast<const float*>(addition.from)[i];
  }
  this_thread().additions.clear();
}
inline void bulk_wait() { bulk_wait_read(); }

inline void store_shared(uint32_t address, float x, float y) {
  const float two[] = {x, y};
  std::memcpy(shared_memory + address, two, 8);
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

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }

// ldmatrix: lane 8 i + j says where row j of matrix i is, of which a lane gets numbers 2 t and 2 t + 1 of row g.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  if (address % 16 || address >= SHARED_BYTES) fail("a row of ldmatrix that is not aligned, or not in shared memory");
  const int lane = threadIdx.x % WARP_SIZE;
  const auto rows = exchanged(&address, 1, [&](auto& registers) {
    return std::vector<uint32_t>{registers[lane / 4][0], registers[8 + lane / 4][0], registers[16 + lane / 4][0],
                                 registers[24 + lane / 4][0]};
  });
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], shared_memory + rows[i] + lane % 4 * 4, 4);
}

// movmatrix: of a matrix whose row g this lane has numbers 2 t and 2 t + 1 of, those of column g.
inline uint32_t transposed(uint32_t a) {
  const int g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4;
  return exchanged(&a, 1, [&](auto& registers) {
    const auto number = [&](int row) { return registers[4 * row + g / 2][0] >> 16 * (g % 2) & 0xffff; };
    return number(2 * t) | number(2 * t + 1) << 16;
  });
}

// stmatrix, transposed: what a lane holds of matrix i are numbers 2 t and 2 t + 1 of a column of what is stored.
inline void store_transposed(uint8_t* row, const uint32_t (&a)[4]) {
  const int lane = threadIdx.x % WARP_SIZE;
  const auto chunk = exchanged(a, 4, [&](auto& registers) {
    std::vector<uint16_t> numbers(8);
    for (int i = 0; i < 8; ++i) numbers[i] = uint16_t(registers[4 * i + lane % 8 / 2][lane / 8] >> 16 * (lane % 2));
    return numbers;
  });
  if (shared_address(row) % 16) fail("a row of stmatrix that is not aligned");
  std::memcpy(row, chunk.data(), 16);
  __syncwarp();
}

// A 16 x kDepth operand's two rows of this lane, and its two columns of a kDepth x 8 one, of all lanes' registers.
template <DType kType, int kDepth>
void multiply_registers(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  constexpr int kWords = kDepth / 8;
  const int lane = threadIdx.x % WARP_SIZE;
  uint32_t words[3 * kWords];
  std::copy(a, a + 2 * kWords, words);
  std::copy(b, b + kWords, words + 2 * kWords);
  const auto sums = exchanged(words, 3 * kWords, [&](auto& registers) {
    std::vector<float> sums(c, c + 4);
    for (int k = 0; k < kDepth; ++k) {
      const int t = k % 8 / 2, high = k % 2;
      const auto number = [&](int row_lane, int word) { return widened<kType>(uint16_t(registers[row_lane + t][word] >> 16 * high)); };
      for (int i = 0; i < 4; ++i) {
        const int column = lane % 4 * 2 + i % 2;
        sums[i] += number(lane / 4 * 4, k / 8 * 2 + i / 2) * number(column * 4, 2 * kWords + k / 8);
      }
    }
    return sums;
  });
  std::copy(sums.begin(), sums.end(), c);
}
template <DType kType>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[] = {b0, b1};
  multiply_registers<kType, 16>(c, a, b);
}
template <DType kType>
void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  const uint32_t a[] = {a0, a1};
  multiply_registers<kType, 8>(c, a, &b);
}

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

inline uint64_t descriptor_at(uint32_t low) { return low | uint64_t(1024 >> 4 | 1 << 30) << 32; }

// Number k of row r of an operand in swizzled rows of 64 or 128 bytes: K-major, or by columns, where row k of panel r / 64 holds
// 64 numbers of different r.
template <DType kType>
float element(uint64_t descriptor, int r, int k, bool by_columns = false) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const int layout = int(descriptor >> 62), row_bytes = layout == 2 ? 64 : 128;
  if (layout != 1 && layout != 2) fail("an operand that is not in swizzled rows of 64 or 128 bytes");
  uint32_t address = field(0);
  if (by_columns) {
    if (layout != 1) fail("an operand by columns that is not in rows of 128 bytes");
    address += r / 64 * field(16) + k / 8 * field(32) + k % 8 * row_bytes + r % 64 * 2;
  } else {
    address += r / 8 * field(32) + r % 8 * row_bytes + k * 2;
  }
  address = swizzled(address, row_bytes);
  if (address + 2 > SHARED_BYTES) fail("an operand beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, shared_memory + address, 2);
  return widened<kType>(bits);
}

// This thread's part of a product: rows 16 w + g and 16 w + g + 8, columns 8 n + 2 t and 8 n + 2 t + 1.
template <DType kType>
void multiply(const Product& product) {
  const int lane = threadIdx.x % WARP_SIZE, first_row = threadIdx.x % WARPGROUP_SIZE / WARP_SIZE * 16 + lane / 4;
  float a[2][16], b[16];
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      a[half][k] = product.a_in_registers ? product.a_values[half][k] : element<kType>(product.a, first_row + 8 * half, k);
    }
  }
  for (int n = 0; n < product.columns / 8; ++n) {
    for (int c = 0; c < 2; ++c) {
      for (int k = 0; k < 16; ++k) b[k] = element<kType>(product.b, 8 * n + lane % 4 * 2 + c, k, product.b_by_columns);
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
  this_thread().open.push_back({kType, d, 2 * kRegisters, false, kColumns, {}, a, b, accumulate});
}
template <DType kType, bool kColumns, int kRegisters>
void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  Product product{kType, d, 2 * kRegisters, true, kColumns, {}, 0, b, accumulate};
  const int first = threadIdx.x % WARP_SIZE / 4 * 4;
  exchanged(a, 4, [&](auto& registers) {
    for (int i = 0; i < 32; ++i) {
      const int half = i / 16, k = i % 16;
      product.a_values[half][k] = widened<kType>(uint16_t(registers[first + k % 8 / 2][k / 8 * 2 + half] >> 16 * (k % 2)));
    }
    return 0;
  });
  this_thread().open.push_back(product);
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
      if (thread.done || thread.held || (thread.ready && !thread.ready())) continue;
      thread.ready = nullptr;
      show_previous(thread.waited);
      const bool slept = std::exchange(thread.asleep, false);
      swapcontext(&cluster->scheduler, &thread.context);
      if (!cluster->failure.empty()) return true;
      if (!(slept && thread.asleep)) any = moved = true;  // not only looked, and slept again
    }
  }
  return any;
}

inline bool ended(const Block& block) {
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& thread) { return thread.done; });
}

struct Schedule {
  bool last_thread_first, copies_are_late;
  int late_warp = -1;  // as in Cluster
};

// One cluster, whose first block has this index; or clusters of a size that wait for each other.
inline void run_cluster(Cluster& run, int first_block, int num_blocks, int num_threads, int shared_bytes, Schedule schedule,
                        int cluster_size = 0) {
  cluster = &run;
  run.size = cluster_size ? cluster_size : num_blocks;
  run.barriers.clear();
  run.copies_are_late = schedule.copies_are_late;
  run.late_warp = schedule.late_warp;
  run.blocks.resize(num_blocks);
  for (Block& block : run.blocks) {
    block.shared_memory.assign(shared_bytes, 0xff);  // NaN in every format
    block.warps = std::vector<Warp>(num_threads / WARP_SIZE);
    block.barriers.clear();
    block.threads.resize(num_threads);
    block.launches = block.late_boxes = 0;
    block.copies.clear();
    for (Thread& thread : block.threads) {
      thread.ready = nullptr;
      thread.done = thread.waited = thread.asleep = thread.held = false;
      thread.open.clear();
      thread.groups.clear();
      thread.additions.clear();
      thread.copy_groups = 0;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      makecontext(&thread.context, enter, 0);
    }
  }
  // In each block; whether anything came of it.
  const auto in_turn = [&](auto act) {
    bool any = false;
    for (int i = 0; i < num_blocks && run.failure.empty(); ++i) {
      const int rank = schedule.last_thread_first ? num_blocks - 1 - i : i;
      running = &run.blocks[rank];
      blockIdx.x = unsigned(first_block + rank);
      std::memcpy(shared_memory, running->shared_memory.data(), shared_bytes);
      any |= act(*running);
      std::memcpy(running->shared_memory.data(), shared_memory, shared_bytes);
      // Of a block that has ended others read nothing.
      if (ended(*running)) std::memset(running->shared_memory.data(), 0xff, shared_bytes);
    }
    return any && run.failure.empty();
  };
  const auto advance = [&](Block&) { return advance_block(schedule.last_thread_first); };
  const auto land_copies = [&run](Block& block) {
    if (block.copies.empty()) return false;
    run.random = run.random * 1664525 + 1013904223;
    const auto chosen = std::next(block.copies.begin(), (run.random >> 16) % block.copies.size());
    for (const auto& copy : chosen->second) copy();
    block.copies.erase(chosen);
    return true;
  };
  const auto go_on = [](Block& block) {
    bool any = false;
    for (Thread& thread : block.threads) any |= std::exchange(thread.held, false);
    return any;
  };
  while (in_turn(advance) || in_turn(land_copies) || in_turn(go_on)) {
  }
  show_previous(true);
  if (!run.failure.empty()) return;
  if (!std::all_of(run.blocks.begin(), run.blocks.end(), ended)) run.failure = "threads wait for each other";
}

}  // namespace hmar
