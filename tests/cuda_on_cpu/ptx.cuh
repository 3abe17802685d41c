// Takes the place of csrc/ptx.cuh when a kernel's own source is compiled for the CPU: every thread of a block is a
// coroutine, warp instructions wait for their 32 lanes, and their operand layouts are written down a second time,
// element by element as in the PTX ISA. It checks what a GPU would let pass: addresses outside the tensors or shared
// memory, misalignment, lanes that meet at different instructions, bank conflicts of ldmatrix.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <utility>
#include <vector>

#include "cuda_words.h"
#include "params.h"

namespace hmar {

using std::max;
using std::min;

constexpr int WARP_SIZE = 32;
constexpr int SHARED_BYTES = 227 * 1024;
alignas(1024) inline uint8_t shared_memory[SHARED_BYTES];

struct Copy {
  uint32_t dst;
  const void* src;
  bool valid;
};

struct Thread {
  ucontext_t context;
  std::vector<uint8_t> stack = std::vector<uint8_t>(256 * 1024);
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
  const long* waits_on = nullptr;  // runnable once *waits_on != seen
  long seen = 0;
  bool done = false;
};

struct Meeting {  // of a warp at an instruction, or of the block at a barrier
  int arrived = 0;
  const char* instruction = nullptr;
  void* operands[WARP_SIZE];
  long generation = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting barrier;
  ucontext_t scheduler;
  std::function<void()> kernel;
  bool copies_at_once = false;  // a cp.async lands when issued; otherwise when waited for: both are legal
  const char* failure = nullptr;
  std::vector<std::pair<const uint8_t*, const uint8_t*>> readable;
};
inline Block* running;

inline Thread& this_thread() { return running->threads[threadIdx.x]; }

// Ends the run: control goes to the scheduler and never comes back to this thread.
[[noreturn]] inline void fail(const char* what) {
  running->failure = what;
  setcontext(&running->scheduler);
  std::abort();
}

inline void pause_until_changed(const long& generation) {
  Thread& thread = this_thread();
  thread.waits_on = &generation;
  thread.seen = generation;
  swapcontext(&thread.context, &running->scheduler);
}

// Waits for all lanes of the warp; the last one executes the instruction for all.
template <class Operands, class Execute>
void with_warp(const char* instruction, Operands& operands, const Execute& execute) {
  Meeting& warp = running->warps[threadIdx.x / WARP_SIZE];
  if (warp.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0) fail("lanes of a warp meet at different instructions");
  warp.operands[threadIdx.x % WARP_SIZE] = &operands;
  if (++warp.arrived < WARP_SIZE) return pause_until_changed(warp.generation);
  Operands* lanes[WARP_SIZE];
  for (int lane = 0; lane < WARP_SIZE; ++lane) lanes[lane] = static_cast<Operands*>(warp.operands[lane]);
  execute(lanes);
  warp.arrived = 0;
  ++warp.generation;
}

inline void land(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(shared_memory + copy.dst, copy.src, 16);
  } else {
    std::memset(shared_memory + copy.dst, 0, 16);
  }
}

inline float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t half_of(uint32_t word, int which) { return which ? word >> 16 : word & 0xffff; }

inline bool is_readable(const void* from, int size) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  for (const auto& [begin, end] : running->readable) {
    if (bytes >= begin && bytes + size <= end) return true;
  }
  return false;
}

// The instructions of csrc/ptx.cuh

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared_memory);
}

inline void cp_async_16(uint32_t dst, const void* src, bool valid) {
  if (dst % 16 || dst + 16 > SHARED_BYTES) fail("cp.async outside shared memory, or misaligned");
  if (valid) {
    if (reinterpret_cast<uintptr_t>(src) % 16) fail("cp.async from a misaligned address");
    if (!is_readable(src, 16)) fail("cp.async from outside the tensors");
  }
  const Copy copy{dst, src, valid};
  if (running->copies_at_once) land(copy);
  else this_thread().open.push_back(copy);
}

inline void cp_async_commit() { this_thread().groups.push_back(std::exchange(this_thread().open, {})); }

template <int kPending>
void cp_async_wait() {
  auto& groups = this_thread().groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) land(copy);
  }
}

struct MatrixLoad {
  uint32_t address;
  uint32_t* r;
};

inline void load_matrices(const char* instruction, uint32_t (&r)[4], uint32_t address, bool transposed) {
  MatrixLoad operands{address, r};
  with_warp(instruction, operands, [&](MatrixLoad** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t m[8][8];
      uint32_t banks = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = lanes[8 * matrix + row]->address;
        if (from % 16 || from + 16 > SHARED_BYTES) fail("ldmatrix outside shared memory, or misaligned");
        std::memcpy(m[row], shared_memory + from, 16);
        banks |= 1u << from / 16 % 8;
      }
      if (banks != 0xff) fail("bank conflict of ldmatrix");
      for (int lane = 0; lane < WARP_SIZE; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = transposed ? m[2 * t][g] : m[g][2 * t];
        const uint32_t high = transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
        lanes[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { load_matrices("ldmatrix", r, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { load_matrices("ldmatrix.trans", r, address, true); }

struct Product {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <DType kType>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kType == DType::kBFloat16, "float16 differs in the names of two instructions only");
  Product operands{c, a, {b0, b1}};
  with_warp("mma", operands, [](Product** lanes) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {  // PTX ISA: element a_i of a lane
        const int row = (i < 2 || (4 <= i && i < 6)) ? g : g + 8;
        const int column = t * 2 + i % 2 + (i >= 4 ? 8 : 0);
        a[row][column] = bfloat16_value(half_of(lanes[lane]->a[i / 2], i % 2));
      }
      for (int i = 0; i < 4; ++i) {  // element b_i
        b[t * 2 + i % 2 + (i >= 2 ? 8 : 0)][g] = bfloat16_value(half_of(lanes[lane]->b[i / 2], i % 2));
      }
    }
    for (int lane = 0; lane < WARP_SIZE; ++lane) {
      for (int i = 0; i < 4; ++i) {  // element c_i
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + i % 2;
        double sum = lanes[lane]->c[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->c[i] = static_cast<float>(sum);
      }
    }
  });
}

template <DType kType>
uint32_t pack(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace hmar

// What CUDA C++ has built in

inline void __syncthreads() {
  hmar::Meeting& barrier = hmar::running->barrier;
  if (++barrier.arrived < static_cast<int>(hmar::running->threads.size())) {
    return hmar::pause_until_changed(barrier.generation);
  }
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void __syncwarp() {
  int nothing = 0;
  hmar::with_warp("syncwarp", nothing, [](int**) {});
}

struct Exchange {
  float value, result;
  int distance;
};

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  Exchange operands{value, 0.0f, distance};
  hmar::with_warp("shfl", operands, [](Exchange** lanes) {
    for (int lane = 0; lane < hmar::WARP_SIZE; ++lane) {
      lanes[lane]->result = lanes[lane ^ lanes[lane]->distance]->value;
    }
  });
  return operands.result;
}

inline bool __any_sync(unsigned, bool value) {
  bool operand = value;
  hmar::with_warp("any", operand, [](bool** lanes) {
    bool any = false;
    for (int lane = 0; lane < hmar::WARP_SIZE; ++lane) any |= *lanes[lane];
    for (int lane = 0; lane < hmar::WARP_SIZE; ++lane) *lanes[lane] = any;
  });
  return operand;
}

namespace hmar {

inline void enter() {
  running->kernel();
  this_thread().done = true;
  swapcontext(&this_thread().context, &running->scheduler);
}

// One block, its warps in the order given; each runs as far as it can before the next one.
inline void run_block(Block& block, int num_threads, bool last_warp_first) {
  running = &block;
  std::memset(shared_memory, 0xff, SHARED_BYTES);  // NaN in every format
  block.threads = std::vector<Thread>(num_threads);
  block.warps = std::vector<Meeting>(num_threads / WARP_SIZE);
  block.barrier = Meeting();
  for (Thread& thread : block.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, enter, 0);
  }
  const int num_warps = num_threads / WARP_SIZE;
  for (bool alive = true; alive;) {
    alive = false;
    bool moved = false;
    for (int i = 0; i < num_warps; ++i) {
      const int warp = last_warp_first ? num_warps - 1 - i : i;
      for (bool again = true; again;) {
        again = false;
        for (int lane = 0; lane < WARP_SIZE; ++lane) {
          threadIdx.x = warp * WARP_SIZE + lane;
          Thread& thread = this_thread();
          if (thread.done) continue;
          alive = true;
          if (thread.waits_on && *thread.waits_on == thread.seen) continue;
          thread.waits_on = nullptr;
          swapcontext(&block.scheduler, &thread.context);
          if (block.failure) return;
          again = moved = true;
        }
      }
    }
    if (alive && !moved) {
      block.failure = "threads wait for each other";
      return;
    }
  }
}

}  // namespace hmar
