// What the Hopper kernels share: jobs in shared memory, rings of buffers, the mask, rows out of registers.
//
// A block has kGroups warpgroups that compute, 64 rows each, and one more, which gives up its registers, with one warp that
// fetches: it takes the next item, brings the job and its rows (the stationary tiles), then its columns block by block,
// up to a whole item ahead of the arithmetic.
// Read next: hopper_forward.cuh.
#pragma once

#include "hopper_ptx.cuh"

namespace hmar {

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kGroupRows = 64;
constexpr int kGroupThreads = 128;
constexpr float kLog2E = 1.44269504088896341f;

// The place of a ring of kStages buffers that a loop has come to.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ int last_stage() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// Descriptor of panels that are read along their rows (the summed dimension runs along the 64 columns): `K-major`.
__device__ __forceinline__ uint64_t row_descriptor(const uint8_t* panel) {
  const uint64_t address = (shared_address(panel) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Descriptor of panels that are read along their columns (the summed dimension runs down the rows): `MN-major`.
// `panel_bytes` from one panel of 64 columns to the next.
__device__ __forceinline__ uint64_t column_descriptor(const uint8_t* panel, int panel_bytes) {
  const uint64_t address = (shared_address(panel) & 0x3ffff) >> 4;
  return address | uint64_t(panel_bytes >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same from the number of a 16-byte chunk of shared memory, to which one of these is added: one addition a descriptor.
constexpr uint32_t kRowDescriptor = 1 << 16;
template <int kPanelBytes>
constexpr uint32_t kColumnDescriptor = kPanelBytes >> 4 << 16;

// A descriptor so many bytes further on.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// How the 65536 registers of an SM are shared: each thread's at the launch, then of the fetching and the computing ones.
template <int kGroups, int kBlocksPerSM>
struct Registers {
  static constexpr int kAtLaunch = 65536 / (kBlocksPerSM * (kGroups + 1) * kGroupThreads) / 8 * 8;
  static constexpr int kTogether = (kGroups + 1) * kAtLaunch;
  static constexpr int kAvailable = (kTogether - 32) / kGroups / 8 * 8;
  static constexpr int kCompute = kAvailable < 240 ? kAvailable : 240;
  static constexpr int kFetch = kTogether - kGroups * kCompute < kAtLaunch ? kTogether - kGroups * kCompute : kAtLaunch;
};

// The numbers of a kernel of the backward.
template <DType kType_, int kHeadDim_, int kGroups_, int kBlockN_, int kStages_, int kRowStages_, int kBlocksPerSM_>
struct BackwardTile {
  static constexpr DType kType = kType_;
  static constexpr int kHeadDim = kHeadDim_, kGroups = kGroups_, kBlockN = kBlockN_, kStages = kStages_;
  static constexpr int kRowStages = kRowStages_, kBlocksPerSM = kBlocksPerSM_;

  static constexpr int kPanels = kHeadDim / kPanelColumns;
  static constexpr int kNumThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kGroupPanelBytes = kGroupRows * kPanelRowBytes;
  static constexpr int kBlockPanelBytes = kBlockN * kPanelRowBytes;
};

// Shared memory of a job that is under way: what the fetching warp read of the plan.
template <int kGroups>
struct JobSlot {
  int32_t head;  // batch * num_heads + head; negative when there is nothing left to do
  alignas(16) int32_t job[kJobInts<kGroups>];
};

// What all lanes of a warp have alike, so that the compiler knows it and keeps it, and addresses made of it, in registers of the
// warp.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// A warpgroup's part of a job, in registers.
struct GroupJob {
  int row_begin, num_rows, column_begin, num_blocks;
  int block_begin, block_end, full_begin, full_end;

  template <int kGroups>
  __device__ __forceinline__ GroupJob(const JobSlot<kGroups>& slot, int group) {
    const int32_t* field = slot.job + GROUP_FIELDS + NUM_GROUP_FIELDS * group;
    column_begin = uniform(slot.job[COLUMN_BEGIN]), num_blocks = uniform(slot.job[NUM_BLOCKS]);
    row_begin = uniform(field[ROW_BEGIN_OF_GROUP]), num_rows = uniform(field[ROW_END_OF_GROUP]) - row_begin;
    block_begin = uniform(field[BLOCK_BEGIN]), block_end = uniform(field[BLOCK_END]);
    full_begin = uniform(field[FULL_BLOCK_BEGIN]), full_end = uniform(field[FULL_BLOCK_END]);
  }
  __device__ __forceinline__ bool masked(int block) const { return block < full_begin || block >= full_end; }
};

// The fetching warp: writes an item's job to its slot. False, and a negative head, when there are no more items.
template <int kGroups>
__device__ __forceinline__ bool fetch_job(JobSlot<kGroups>& slot, const HopperWork& work, int item) {
  const int lane = threadIdx.x % 32;
  const bool valid = item < work.num_items;
  int head = item / work.num_jobs, job = item % work.num_jobs;
  const int tail_item = item - (work.num_items - work.tail_heads * work.num_jobs);
  if (tail_item >= 0) {
    head = work.num_items / work.num_jobs - work.tail_heads + tail_item % work.tail_heads;
    job = tail_item / work.tail_heads;
  }
  if (valid && lane < kJobInts<kGroups>) slot.job[lane] = work.jobs[job * kJobInts<kGroups> + lane];
  if (lane == 0) slot.head = valid ? head : -1;
  __syncwarp();
  return valid;
}

// The fetching warp of the last block that finds no more items leaves the queue as the launch found it.
__device__ __forceinline__ void leave_queue(const HopperWork& work) {
  if (threadIdx.x % 32 == 0 && atomicAdd(work.next_item + 1, 1) == int(gridDim.x) - 1) {
    work.next_item[0] = 0;
    work.next_item[1] = 0;
  }
}

// The fetching warp takes an item in two steps, so that it waits for the answer only when it has nothing else to do.
__device__ __forceinline__ int request_item(const HopperWork& work) {
  return threadIdx.x % 32 == 0 ? atomicAdd(work.next_item, 1) + gridDim.x : 0;
}
__device__ __forceinline__ int receive_item(int requested) { return __shfl_sync(0xffffffffu, requested, 0); }

template <int kGroups>
__device__ __forceinline__ int group_row_begin(const JobSlot<kGroups>& slot, int group) {
  return slot.job[GROUP_FIELDS + NUM_GROUP_FIELDS * group + ROW_BEGIN_OF_GROUP];
}

// All columns of the rows from `row` on, as many as the tensor map's box has.
template <int kPanels, int kPanelBytes>
__device__ __forceinline__ void load_panels(uint8_t (&panels)[kPanels][kPanelBytes], const TensorMap& map,
                                            Barrier& barrier, int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    tma_load(panels[panel], map, barrier, panel * kPanelColumns, row, head, batch);
  }
}

template <int kCount>
__device__ __forceinline__ void barriers_init(Barrier (&barriers)[kCount], int arrivals) {
  for (Barrier& barrier : barriers) barrier_init(barrier, arrivals);
}

struct BatchHead {
  int batch, head;
};

__device__ __forceinline__ BatchHead batch_and_head(const HopperWork& work, int batch_head) {
  return {batch_head / work.num_heads, batch_head % work.num_heads};
}

// Address of row `row` of a head.
__device__ __forceinline__ uint16_t* rows_of(void* tensor, const Strides& strides, const BatchHead& of, int row) {
  return static_cast<uint16_t*>(tensor) + of.batch * strides.batch + of.head * strides.head + row * strides.row;
}

__device__ __forceinline__ uint16_t* rows_of(void* tensor, const Strides& strides, const HopperWork& work,
                                             int batch_head, int row) {
  return rows_of(tensor, strides, batch_and_head(work, batch_head), row);
}

// One arrival a warp on a barrier that counts warps.
__device__ __forceinline__ void release(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// A barrier among the threads of one warpgroup.
__device__ __forceinline__ void group_sync(int group) { named_barrier_sync(group + 1, kGroupThreads); }

// Warpgroups in turn: `turn_wait` returns once the one before has passed its turn on. The last one starts by passing to
// the first.
template <int kGroups>
__device__ __forceinline__ void turn_wait(int group) {
  named_barrier_sync(1 + kGroups + group, 2 * kGroupThreads);
}
template <int kGroups>
__device__ __forceinline__ void turn_pass(int group) {
  const int next = group + 1 == kGroups ? 0 : group + 1;
  named_barrier_arrive(1 + kGroups + next, 2 * kGroupThreads);
}

// Address of 16-byte chunk `chunk` of row `row` in a swizzled panel.
__device__ __forceinline__ int swizzled_chunk(int row, int chunk) {
  return row * kPanelRowBytes + ((chunk ^ (row % 8)) * 16);
}

// Rows are queries: key intervals of this thread's two rows, against which columns of a block are tested.
struct RowIntervals {
  int begin[2], end[2];

  // An empty interval where the row is not the group's.
  __device__ __forceinline__ void load(const HopperWork& work, const GroupJob& job, int first_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 8 * half;
      const bool valid = row < job.num_rows;
      begin[half] = valid ? work.key_start[job.row_begin + row] : 0;
      end[half] = valid ? work.key_end[job.row_begin + row] : 0;
    }
  }

  template <int kRegisters>
  __device__ __forceinline__ void apply(float (&s)[kRegisters], int first_column) const {
    apply(s, first_column, {true, true});
  }

  // The same in those of the two rows that are marked.
  template <int kRegisters>
  __device__ __forceinline__ void apply(float (&s)[kRegisters], int first_column, const bool (&marked)[2]) const {
    const int column = first_column + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!marked[half]) continue;
      const int from = begin[half] - column, to = end[half] - column;
#pragma unroll
      for (int n = 0; n < kRegisters / 4; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (8 * n + c < from || 8 * n + c >= to) s[4 * n + 2 * half + c] = -INFINITY;
        }
      }
    }
  }
};

// Columns are queries: tests this thread's two keys against the intervals of a block's queries.
template <int kRegisters>
__device__ __forceinline__ void mask_keys(float (&s)[kRegisters], const HopperWork& work, int first_query, int key) {
#pragma unroll
  for (int n = 0; n < kRegisters / 4; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int query = first_query + 8 * n + 2 * (threadIdx.x % 4) + c;
      const bool valid = query < work.num_queries;
      const int begin = valid ? work.key_start[query] : 0, end = valid ? work.key_end[query] : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (key + 8 * half < begin || key + 8 * half >= end) s[4 * n + 2 * half + c] = -INFINITY;
      }
    }
  }
}

// s = a b^T, a group committed: a of 64 rows in panels a_panel_bytes apart, b of kRegisters * 2 rows, both of kHeadDim columns.
template <DType kType, int kHeadDim, int kRegisters>
__device__ __forceinline__ void issue_rows_product(float (&s)[kRegisters], const uint8_t* a, const uint8_t* b) {
  constexpr int kStepsOfPanel = kPanelColumns / 16;
  const uint64_t a_rows = row_descriptor(a), b_rows = row_descriptor(b);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / kStepsOfPanel, bytes = step % kStepsOfPanel * 32;
    wgmma<kType, false>(s, advanced(a_rows, panel * kGroupRows * kPanelRowBytes + bytes),
                        advanced(b_rows, panel * 2 * kRegisters * kPanelRowBytes + bytes), step > 0);
  }
  wgmma_commit();
}

// d = a b, added to what d holds when `accumulate`, a group committed: a of 64 rows and 16 * kSteps columns in registers, b
// of as many rows.
template <DType kType, int kRegisters, int kSteps>
__device__ __forceinline__ void issue_columns_product(float (&d)[kRegisters], const uint32_t (&a)[kSteps][4],
                                                      const uint8_t* b, bool accumulate = true) {
  const uint64_t b_columns = column_descriptor(b, 16 * kSteps * kPanelRowBytes);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wgmma<kType, true>(d, a[step], advanced(b_columns, step * 16 * kPanelRowBytes), step > 0 || accumulate);
  }
  wgmma_commit();
}

// The 64 x 16 operand of step `step` from an accumulator.
template <DType kType, int kRegisters>
__device__ __forceinline__ void pack_operand(uint32_t (&a)[4], const float (&s)[kRegisters], int step) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int first = 4 * (2 * step + j / 2) + 2 * (j % 2);
    a[j] = pack<kType>(s[first], s[first + 1]);
  }
}

template <DType kType, int kRegisters>
__device__ __forceinline__ void pack_operands(uint32_t (&a)[kRegisters / 8][4], const float (&s)[kRegisters]) {
#pragma unroll
  for (int step = 0; step < kRegisters / 8; ++step) pack_operand<kType>(a[step], s, step);
}

// Sum of the products of two pairs of numbers.
template <DType kType>
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
  float a_low, a_high, b_low, b_high;
  unpack<kType>(a, a_low, a_high);
  unpack<kType>(b, b_low, b_high);
  return a_low * b_low + a_high * b_high;
}

template <int kCount>
__device__ __forceinline__ void set_zero(float (&x)[kCount]) {
#pragma unroll
  for (float& value : x) value = 0.0f;
}

// Rounds a group's accumulator (64 rows, 2 * kRegisters columns), times a factor for each of this thread's two rows, and
// writes the first num_rows rows to global memory. `staging`: the group's own panels, panel_bytes apart; every warp
// passes its own 16 rows through its own part of them.
template <DType kType, int kRegisters>
__device__ __forceinline__ void store_rows(const float (&accumulator)[kRegisters], const float (&factor)[2],
                                           uint8_t* staging, int panel_bytes, uint16_t* rows, int64_t row_stride,
                                           int num_rows) {
  constexpr int kPanels = kRegisters / 32;
  const int lane = threadIdx.x % 32, first_row = threadIdx.x % kGroupThreads / 32 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < kRegisters / 4; ++n) {
      const float* d = accumulator + 4 * n + 2 * half;
      *reinterpret_cast<uint32_t*>(staging + n / 8 * panel_bytes + swizzled_chunk(row, n % 8) + lane % 4 * 4) =
          pack<kType>(d[0] * factor[half], d[1] * factor[half]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const int row = first_row + 4 * pass + lane / 8;
    if (row < num_rows) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        *reinterpret_cast<uint4*>(rows + row * row_stride + panel * kPanelColumns + lane % 8 * 8) =
            *reinterpret_cast<const uint4*>(staging + panel * panel_bytes + swizzled_chunk(row, lane % 8));
      }
    }
  }
}

}  // namespace hmar
