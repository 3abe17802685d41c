// The instructions of sm_90a that the Hopper kernels are made of: mbarriers, the copy engine (TMA), wgmma.
//
// Tiles in shared memory are panels of 64 columns: rows of 128 bytes, whose 16-byte chunk c lies at c ^ (row % 8), as the
// copy engine's 128-byte swizzle leaves them; panels begin at multiples of 1024 bytes. `wgmma` reads them through 64-bit
// descriptors (PTX ISA, "Matrix descriptor"). With g = lane / 4 and t = lane % 4, warp w of a warpgroup holds of a
// 64 x N accumulator d the rows 16 w + g and 16 w + g + 8:
//   d[4 n + c]      row g,      column 8 n + 2 t + c
//   d[4 n + 2 + c]  row g + 8,  column 8 n + 2 t + c
// and of a 64 x 16 operand in registers a[0], a[1], a[2], a[3] as in mma.m16n8k16 (ptx.cuh).
#pragma once

#include "hopper_params.h"
#include "ptx.cuh"

namespace hmar {

// threadIdx.x, read once more: what the compiler has made of it would be kept in a register.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// The registers of each thread from here on; called by all warps of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// A number of which the compiler shall not move what is computed with it to another place.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)); }

// Past which the compiler shall move no loads.
__device__ __forceinline__ void hold() { asm volatile("" ::: "memory"); }

// Of numbers that are not negative: all are known before anything that follows. ptxas would have the warp wait for a product
// first and compute what has nothing to do with it later, so that they do not overlap.
template <int kNumbers>
__device__ __forceinline__ void finish(const float (&x)[kNumbers]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) bits |= __float_as_uint(x[i]);
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %0, 0;\n@p nanosleep.u32 0;\n}\n" ::"r"(bits) : "memory");
}

// Named barriers of a block (from 1 on; 0 is __syncthreads): of so many threads, of which some wait and others only arrive.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Counters in global memory: what was written before one was counted is visible once it has been read.
__device__ __forceinline__ int32_t load_acquire(const int32_t* counter) {
  int32_t count;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(count) : "l"(counter) : "memory");
  return count;
}
__device__ __forceinline__ void count_release(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}

// The same without any order: of what was written before, what was read back is there.
__device__ __forceinline__ void count_relaxed(int32_t* counter) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;\n" ::"l"(counter) : "memory");
}
// Returns once so many have been counted.
__device__ __forceinline__ void await_count(const int32_t* counter, int count) {
  int32_t found;
  do {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(found) : "l"(counter) : "memory");
  } while (found < count);
}

// What is in the L2 cache, after what this thread has written there before.
template <class T>
__device__ __forceinline__ uint32_t read_back(const T* address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  if constexpr (sizeof(T) == 2) {
    uint16_t found;
    asm volatile("ld.relaxed.gpu.global.b16 %0, [%1];\n" : "=h"(found) : "l"(address) : "memory");
    return found;
  } else {
    uint32_t found;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];\n" : "=r"(found) : "l"(address) : "memory");
    return found;
  }
}

// Programmatic dependent launch: lets the kernels start that may overlap with this one; waits until those before have ended and
// what they wrote can be read. Nothing where a kernel was launched without.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;\n"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;\n" ::: "memory"); }

// Fetches a line of global memory into the L2 cache, and nothing nearer: what it holds may still change.
__device__ __forceinline__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address)); }

// --- mbarriers -----------------------------------------------------------------------------------------------------

using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of the copy engine too.
__device__ __forceinline__ void barrier_arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Arrives once this thread's cp_async copies so far are complete.
__device__ __forceinline__ void barrier_arrive_after_cp_async(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
}

// Returns when the phase of this parity is complete. A barrier that was never used has completed parity 1.
__device__ __forceinline__ void barrier_wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni finished;\n"
      "bra.uni again;\n"
      "finished:\n}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Orders ordinary accesses to global memory, this thread's and those that it knows of, before later ones of the copy engine.
__device__ __forceinline__ void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }
// The same for shared memory, where wgmma reads that way too.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// --- copy engine ---------------------------------------------------------------------------------------------------

// Fetches a tensor map, so that the first load through it does not wait for it.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// So many bytes, a multiple of 16, to the second level of the cache.
__device__ __forceinline__ void prefetch_bytes(const void* src, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(src), "r"(bytes) : "memory");
}

// One box of a tensor [batch, head, row, column] to `dst`; its bytes count on `barrier`. What lies outside reads as zero.
__device__ __forceinline__ void tma_load(uint8_t* dst, const TensorMap& map, Barrier& barrier, int column, int row,
                                         int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(dst)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same of a tensor of two dimensions and of three: coordinates from the innermost one on.
__device__ __forceinline__ void tma_load(uint8_t* dst, const TensorMap& map, Barrier& barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          shared_address(dst)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1)
      : "memory");
}
// Of what is read once in a long time: it shall be the first to leave the L2 cache (a policy as createpolicy gives it).
__device__ __forceinline__ void tma_load_once(uint8_t* dst, const TensorMap& map, Barrier& barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], "
      "%5;\n" ::"r"(shared_address(dst)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "l"(0x12f0000000000000)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint8_t* dst, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(
          shared_address(dst)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// Eight bytes from global to shared memory; zeros, and nothing read, where `valid` is false.
__device__ __forceinline__ void cp_async_8(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared::cta.global [%0], [%1], 8, %2;\n" ::"r"(dst), "l"(src), "r"(valid ? 8 : 0)
               : "memory");
}

// The same for four bytes.
__device__ __forceinline__ void cp_async_4(uint32_t dst, const void* src, bool valid) {
  asm volatile("cp.async.ca.shared::cta.global [%0], [%1], 4, %2;\n" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0)
               : "memory");
}

// The two numbers that pack made one word of.
template <DType kType>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high) {
  if constexpr (kType == DType::kFloat16) {
    asm("{\n.reg .f16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
        : "=f"(low), "=f"(high)
        : "r"(packed));
  } else {
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  }
}

__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }

// Off by 2^-11 of its value at most.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Adds one box of float32 numbers in shared memory to a tensor [batch, head, row, column]; what lies outside is left out.
// Committed in groups, for which the thread that started them waits: until the copy engine has read them, or until the sums
// are in global memory.
__device__ __forceinline__ void bulk_add(const TensorMap& map, const uint8_t* src, int column, int row, int head, int batch) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(shared_address(src)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory"); }

__device__ __forceinline__ void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers to shared memory, transposed: lane 8 i + j says where row j of the transposed matrix i
// goes (16 bytes). Registers as in mma.m16n8k16's operand.
__device__ __forceinline__ void store_transposed(uint8_t* row, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

// The same, not transposed: lane 8 i + j says where row j of matrix i goes.
__device__ __forceinline__ void store_matrices(uint8_t* row, const uint32_t (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
}

// An 8 x 8 matrix of 16-bit numbers, of which a lane has numbers 2 t and 2 t + 1 of row g: those of column g.
__device__ __forceinline__ uint32_t transposed(uint32_t a) {
  uint32_t b;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(b) : "r"(a));
  return b;
}

// --- clusters ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}

// A barrier among all threads of a cluster's blocks; what they wrote before is seen by all behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// The same, but nothing that was written before need be seen: for the end, when others may still read this block's shared
// memory.
__device__ __forceinline__ void cluster_leave() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n" ::: "memory");
}

// What lies at this place in the shared memory of a block of the cluster.
__device__ __forceinline__ float load_cluster(const float* address, int rank) {
  float x;
  asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}\n"
               : "=f"(x)
               : "r"(shared_address(address)), "r"(rank)
               : "memory");
  return x;
}

// Arrives at a barrier of a block of the cluster: what was read before may be written over. What was written need not be seen.
__device__ __forceinline__ void barrier_arrive_at(Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// A number to this place in the shared memory of a block of the cluster; its bytes count on that block's `barrier`.
__device__ __forceinline__ void store_cluster(float* address, float x, Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 to, counter;\nmapa.shared::cluster.u32 to, %0, %3;\nmapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %1, [counter];\n}\n" ::"r"(shared_address(address)),
      "f"(x), "r"(shared_address(&barrier)), "r"(rank)
      : "memory");
}

// --- wgmma ---------------------------------------------------------------------------------------------------------

// The descriptor whose lower half this is; the same upper half as all (hopper_tile.cuh).
__device__ __forceinline__ uint64_t descriptor_at(uint32_t low) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};\n" : "=l"(descriptor) : "r"(low), "n"(1024 >> 4 | 1 << 30));
  return descriptor;
}

// A number of which the compiler knows nothing, so that it does not keep what is computed from it in registers across a loop.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  uint32_t y;
  asm volatile("mov.b32 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most kPending of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The operands of an accumulator of 4, 8, 16, 32, 48, 64 and 80 registers.
#define HMAR_F4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define HMAR_F8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define HMAR_F16(d) HMAR_F8(d, 0), HMAR_F8(d, 8)
#define HMAR_F32(d, i) HMAR_F8(d, i), HMAR_F8(d, i + 8), HMAR_F8(d, i + 16), HMAR_F8(d, i + 24)
#define HMAR_F48(d) HMAR_F32(d, 0), HMAR_F8(d, 32), HMAR_F8(d, 40)
#define HMAR_F64(d) HMAR_F32(d, 0), HMAR_F32(d, 32)
#define HMAR_F80(d) HMAR_F64(d), HMAR_F8(d, 64), HMAR_F8(d, 72)
#define HMAR_D4 "{%0, %1, %2, %3}"
#define HMAR_D8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define HMAR_D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define HMAR_D32                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"
#define HMAR_D48                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47}"
#define HMAR_D64                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define HMAR_D80                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "  \
  "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}"

#define HMAR_WGMMA_SHARED(N, TYPE, D, A, B, P, T, ...)                                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " " D ", " A ", " B ", p, 1, 1, 0, " T ";\n}\n"                                                         \
               : __VA_ARGS__                                                                                           \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kColumns)))

// d (64 x N, N = 2 kRegisters) = a b, added to what d holds when `accumulate`. a: 64 x 16 in shared memory, read along its
// rows. b: 16 x N in shared memory, read along its rows (a tile of N rows) or, with kColumns, down its columns (of 16 rows).
template <DType kType, bool kColumns, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kRegisters == 4 || kRegisters == 8 || kRegisters == 16 || kRegisters == 32 || kRegisters == 48 ||
                kRegisters == 64 || kRegisters == 80);
  if constexpr (kRegisters == 4 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("8", "bf16", HMAR_D4, "%4", "%5", "%6", "%7", HMAR_F4(d));
  } else if constexpr (kRegisters == 4) {
    HMAR_WGMMA_SHARED("8", "f16", HMAR_D4, "%4", "%5", "%6", "%7", HMAR_F4(d));
  } else if constexpr (kRegisters == 8 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("16", "bf16", HMAR_D8, "%8", "%9", "%10", "%11", HMAR_F8(d, 0));
  } else if constexpr (kRegisters == 8) {
    HMAR_WGMMA_SHARED("16", "f16", HMAR_D8, "%8", "%9", "%10", "%11", HMAR_F8(d, 0));
  } else if constexpr (kRegisters == 16 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("32", "bf16", HMAR_D16, "%16", "%17", "%18", "%19", HMAR_F16(d));
  } else if constexpr (kRegisters == 16) {
    HMAR_WGMMA_SHARED("32", "f16", HMAR_D16, "%16", "%17", "%18", "%19", HMAR_F16(d));
  } else if constexpr (kRegisters == 80 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("160", "bf16", HMAR_D80, "%80", "%81", "%82", "%83", HMAR_F80(d));
  } else if constexpr (kRegisters == 80) {
    HMAR_WGMMA_SHARED("160", "f16", HMAR_D80, "%80", "%81", "%82", "%83", HMAR_F80(d));
  } else if constexpr (kRegisters == 32 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("64", "bf16", HMAR_D32, "%32", "%33", "%34", "%35", HMAR_F32(d, 0));
  } else if constexpr (kRegisters == 32) {
    HMAR_WGMMA_SHARED("64", "f16", HMAR_D32, "%32", "%33", "%34", "%35", HMAR_F32(d, 0));
  } else if constexpr (kRegisters == 48 && kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("96", "bf16", HMAR_D48, "%48", "%49", "%50", "%51", HMAR_F48(d));
  } else if constexpr (kRegisters == 48) {
    HMAR_WGMMA_SHARED("96", "f16", HMAR_D48, "%48", "%49", "%50", "%51", HMAR_F48(d));
  } else if constexpr (kType == DType::kBFloat16) {
    HMAR_WGMMA_SHARED("128", "bf16", HMAR_D64, "%64", "%65", "%66", "%67", HMAR_F64(d));
  } else {
    HMAR_WGMMA_SHARED("128", "f16", HMAR_D64, "%64", "%65", "%66", "%67", HMAR_F64(d));
  }
}

#define HMAR_WGMMA_REGISTERS(N, TYPE, D, A, B, P, T, ...)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " " D ", " A ", " B ", p, 1, 1, " T ";\n}\n"                                                            \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kColumns)))

// The same with a in registers.
template <DType kType, bool kColumns, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 48 || kRegisters == 64);
  if constexpr (kRegisters == 32 && kType == DType::kBFloat16) {
    HMAR_WGMMA_REGISTERS("64", "bf16", HMAR_D32, "{%32, %33, %34, %35}", "%36", "%37", "%38", HMAR_F32(d, 0));
  } else if constexpr (kRegisters == 32) {
    HMAR_WGMMA_REGISTERS("64", "f16", HMAR_D32, "{%32, %33, %34, %35}", "%36", "%37", "%38", HMAR_F32(d, 0));
  } else if constexpr (kRegisters == 48 && kType == DType::kBFloat16) {
    HMAR_WGMMA_REGISTERS("96", "bf16", HMAR_D48, "{%48, %49, %50, %51}", "%52", "%53", "%54", HMAR_F48(d));
  } else if constexpr (kRegisters == 48) {
    HMAR_WGMMA_REGISTERS("96", "f16", HMAR_D48, "{%48, %49, %50, %51}", "%52", "%53", "%54", HMAR_F48(d));
  } else if constexpr (kType == DType::kBFloat16) {
    HMAR_WGMMA_REGISTERS("128", "bf16", HMAR_D64, "{%64, %65, %66, %67}", "%68", "%69", "%70", HMAR_F64(d));
  } else {
    HMAR_WGMMA_REGISTERS("128", "f16", HMAR_D64, "{%64, %65, %66, %67}", "%68", "%69", "%70", HMAR_F64(d));
  }
}

#undef HMAR_F4
#undef HMAR_F16
#undef HMAR_D4
#undef HMAR_D8
#undef HMAR_D16
#undef HMAR_F8
#undef HMAR_F32
#undef HMAR_F48
#undef HMAR_F64
#undef HMAR_F80
#undef HMAR_D32
#undef HMAR_D48
#undef HMAR_D64
#undef HMAR_D80
#undef HMAR_WGMMA_SHARED
#undef HMAR_WGMMA_REGISTERS

}  // namespace hmar
