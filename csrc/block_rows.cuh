// Transformer blocks of few rows for sm_90a, all of them in one kernel, as generation has them at the small scales of an image:
// the time goes into reading the weights, and this kernel never stops reading.
//
//   qkv = (LN(x) (1 + s1) + t1) W_qkv^T                           x += g1 (attention(qkv) W_proj^T + b_proj)
//   hidden = gelu((LN(x) (1 + s2) + t2) W_fc1^T + b_fc1)          x += g2 (hidden W_fc2^T + b_fc2)
//
// A block of the kernel stays on its multiprocessor. One warp brings weights, 64 features and 64 inputs at a time, product
// after product, as far ahead as its ring goes: what a product has to wait for, it does not. But it asks for little at a time,
// lest the few numbers that blocks send each other wait behind what memory has not delivered yet. Eight warps bring rows as
// soon as all blocks have written what comes before: normed; attended, each warp a head, or of more than 16 rows as a step of
// its own that all blocks share; or as they are. Two warpgroups multiply, chunks of 64 inputs in turn, as one waits for its
// products most of the time: features are the rows of wgmma, rows of x its columns. The eight warps take their sums, and
// write the outputs, while they have the next tile.
//
// Tiles of 64 features are dealt to clusters like cards, on and on through the products, so that no cluster is always the one
// with more. K is divided among the blocks of a cluster, which add up each other's sums in their order and write the outputs:
// results are bit-equal from run to run on as many clusters.
//
// NOTE: blocks wait for each other, so all of them must be on the GPU at once.
// Read next: rows.cuh, block_rows.h.
#pragma once

#include "rows.cuh"

namespace hmar {

constexpr int kBlockSplits = 4;  // blocks of a cluster
constexpr int kBroughtBarrier = 8;

template <DType kType_, int kRows_>
struct BlockRowsTile {
  static constexpr DType kType = kType_;
  static constexpr int kRows = kRows_;
  static constexpr int kGroups = 2;  // of warps that multiply
  static constexpr int kWeightThread = kGroups * kGroupThreads, kFirstNormThread = kWeightThread + kGroupThreads;
  static constexpr int kNumThreads = kFirstNormThread + kNormThreads;
  // Of each thread, of all that the threads have at the launch.
  static constexpr int kAllRegisters = 65536 / kNumThreads / 8 * 8 * (kNumThreads / kGroupThreads);
  static constexpr int kMultiplyRegisters = 48, kWeightRegisters = 32;
  static constexpr int kNormRegisters = (kAllRegisters - kGroups * kMultiplyRegisters - kWeightRegisters) / 2 / 8 * 8;
  static constexpr int kRowsAtOnce = 1;    // of which a warp reads the parts together
  // That a thread has under way.
  static constexpr int kNormPieces = kRows <= 16 ? 2 : 3, kHiddenPieces = kRows <= 16 ? 3 : 6;
  // Whether attention is a product of its own, dealt to all blocks of the kernel, and not done by each cluster for itself.
  static constexpr bool kAttendsApart = kRows > 16;
  static constexpr int kAttendedRows = kRows <= 16 ? kRows : 16;  // by a warp together, at most

  static constexpr int kWeightBytes = kLinearFeatures * kPanelRowBytes, kXBytes = kRows * kPanelRowBytes;
  static constexpr int kXStages = 16;                     // a power of two
  static constexpr int kXTogether = kXStages / 2;         // chunks that are waited for together
  static constexpr int kParts = kBlockSplits * kGroups;   // of a sum
  static constexpr int kPartRows = kRows / kBlockSplits;  // rows that a block adds up
  static constexpr int kSums = kParts * kPartRows * kSumsRow;
  static constexpr int kInFlight = 5;         // tiles of weights that are asked for and not there yet
  static constexpr int kChains = 32 / kRows;  // sums of a tile side by side: each product waits for the last one of its own
  static constexpr int kStages = (225 * 1024 - kXStages * kXBytes - 8 * kSums) / kWeightBytes;

  struct Shared {
    alignas(1024) uint8_t weight[kStages][kWeightBytes];
    alignas(1024) uint8_t x[kXStages][kXBytes];
    RowMoments moments[kRows];
    alignas(16) float sums[2][kSums];  // [part, every kBlockSplits-th row, kSumsRow]
    Barrier weight_full[kStages], weight_empty[kStages];
    Barrier x_full[kXStages], x_empty[kXStages];
    Barrier sums_full[2], sums_empty[2];
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

template <int kLayer_>
struct LayerOf {
  static constexpr int kLayer = kLayer_;

  __device__ __forceinline__ static int outputs(const BlockRowsParams& params) {
    return kLayer == QKV ? 3 * params.width : kLayer == FC1 ? params.hidden_width : params.width;
  }
  __device__ __forceinline__ static int inputs(const BlockRowsParams& params) {
    return kLayer == FC2 ? params.hidden_width : params.width;
  }
};

// Where a block of the kernel has come to in the products of all transformer blocks, which every warp goes through in order.
struct Course {
  int rank, cluster, num_clusters;
  int dealt = 0;    // tiles of the products before, modulo the clusters
  int counted;      // blocks that have been counted when these products are done
  uint32_t turns = 0;  // chunks of x brought for them

  __device__ __forceinline__ Course()
      : rank(cluster_rank()), cluster(blockIdx.x / kBlockSplits), num_clusters(gridDim.x / kBlockSplits), counted(gridDim.x) {}

  // This cluster's are every num_clusters-th from here on.
  __device__ __forceinline__ int first_tile() const {
    const int tile = cluster - dealt;
    return tile < 0 ? tile + num_clusters : tile;
  }
  __device__ __forceinline__ int num_tiles(int tiles) const { return (tiles - first_tile() + num_clusters - 1) / num_clusters; }
};

// What a block does in one product. Chunks of x that fit into the ring are brought once for all of its tiles, others for each.
struct Share {
  ChunkRange chunks;
  int count;      // of chunks
  int num_tiles;  // none where it is 0 or less
  bool resident;

  __device__ __forceinline__ Share(const Course& course, int outputs, int inputs, int stages)
      : chunks(inputs / kLinearInputs, course.rank, kBlockSplits),
        count(chunks.end - chunks.begin),
        num_tiles(course.num_tiles(outputs / kLinearFeatures)),
        resident(count <= stages) {}
  __device__ __forceinline__ int num_passes() const { return resident ? 1 : num_tiles; }
};

// Rows of whole images.
struct RowSpan {
  int first, count;
};

// Heads of so many rows that a warp attends together, where attention is dealt to all blocks of the kernel.
template <class Tile>
struct AttendedParts {
  int heads, rows, parts;

  __device__ __forceinline__ explicit AttendedParts(const BlockRowsParams& params)
      : heads(params.width / kBlockHeadDim),
        rows(Tile::kAttendedRows / params.image_rows * params.image_rows),
        parts(heads * ((params.num_rows + rows - 1) / rows)) {}
  __device__ __forceinline__ int head(int part) const { return part % heads; }
  __device__ __forceinline__ RowSpan span(int part, int num_rows) const {
    const int first = part / heads * rows;
    return {first, min(rows, num_rows - first)};
  }
};

// visit(layer, block, share, course) of every product; attend(block, course) before the projection, where that is apart.
template <class Tile, class Visit, class Attend>
__device__ __forceinline__ void go_through(const BlockRowsParams& params, Visit visit, Attend attend) {
  Course course;
  const auto step = [&](auto layer, int block) {
    const int outputs = layer.outputs(params), tiles = outputs / kLinearFeatures;
    const Share share(course, outputs, layer.inputs(params), Tile::kXStages);
    if (share.num_tiles > 0) {
      visit(layer, block, share, course);
      course.turns += share.num_passes() * share.count;
    }
    course.counted += min(tiles, course.num_clusters) * kBlockSplits;
    course.dealt = (course.dealt + tiles) % course.num_clusters;
  };
#pragma unroll 1
  for (int block = 0; block < params.num_blocks; ++block) {
    step(LayerOf<QKV>(), block);
    if constexpr (Tile::kAttendsApart) {
      attend(block, course);
      course.counted += min(AttendedParts<Tile>(params).parts, int(gridDim.x));
    }
    step(LayerOf<PROJ>(), block), step(LayerOf<FC1>(), block), step(LayerOf<FC2>(), block);
  }
}

template <class Tile, class Visit>
__device__ __forceinline__ void go_through(const BlockRowsParams& params, Visit visit) {
  go_through<Tile>(params, visit, [](int, const Course&) {});
}

// --- the warp that brings weights ------------------------------------------------------------------------------------

// One thread.
template <class Tile>
__device__ __forceinline__ void bring_weights(const BlockRowsParams& params, typename Tile::Shared& shared) {
  RingPosition<Tile::kStages> ring, landed;
  int in_flight = 0;
  go_through<Tile>(params, [&](auto layer, int block, const Share& share, const Course& course) {
    constexpr int kLayer = decltype(layer)::kLayer;
    const TensorMap& map = params.weights[block].layers[kLayer];
    if (block + 1 < params.num_blocks) prefetch_map(params.weights[block + 1].layers[kLayer]);
#pragma unroll 1
    for (int i = 0; i < share.num_tiles; ++i) {
      const int feature = (course.first_tile() + i * course.num_clusters) * kLinearFeatures;
#pragma unroll 1
      for (int chunk = share.chunks.begin; chunk < share.chunks.end; ++chunk) {
        if (in_flight == Tile::kInFlight) {
          barrier_wait(shared.weight_full[landed.stage], landed.parity);
          landed.advance();
        } else {
          ++in_flight;
        }
        barrier_wait(shared.weight_empty[ring.stage], ring.parity ^ 1);
        barrier_arrive_expecting(shared.weight_full[ring.stage], Tile::kWeightBytes);
        tma_load_once(shared.weight[ring.stage], map, shared.weight_full[ring.stage], chunk * kLinearInputs, feature);
        ring.advance();
      }
    }
  });
}

// --- the warps that bring rows ---------------------------------------------------------------------------------------

// Asks for what this block reads of a vector of all images.
// NOTE: early, for memory has long queues: weights, all that the rings hold.
template <class Tile>
__device__ __forceinline__ void prefetch_vector(const BlockRowsParams& params, const Share& share, const void* vector) {
  const int thread = threadIdx.x - Tile::kFirstNormThread;
  if (thread >= params.num_rows / params.image_rows * share.count) return;
  const auto* row = static_cast<const uint16_t*>(vector) + thread / share.count * params.vector_stride;
  prefetch_l2(row + (share.chunks.begin + thread % share.count) * kLinearInputs);
}

// Returns when all blocks have written the outputs of the products before.
template <class Tile>
__device__ __forceinline__ void wait_for_rows(const BlockRowsParams& params, const Course& course) {
  if (threadIdx.x == Tile::kFirstNormThread) await_count(params.counters, course.counted);
  named_barrier_sync(kBroughtBarrier, kNormThreads);
}

// The buffer of this turn of the ring, when it is free.
template <class Tile>
__device__ __forceinline__ uint8_t* free_buffer(typename Tile::Shared& shared, uint32_t turn) {
  const uint32_t stage = turn % Tile::kXStages;
  barrier_wait(shared.x_empty[stage], turn / Tile::kXStages % 2 ^ 1);
  return shared.x[stage];
}

// Of all rows at once, each by some lanes: all blocks of the kernel read the same few lines, so none shall read them twice.
template <class Tile>
__device__ __forceinline__ void find_moments(const BlockRowsParams& params, typename Tile::Shared& shared) {
  constexpr int kLanes = kNormThreads / Tile::kRows, kTilesAtOnce = kLanes < 16 ? 32 / kLanes : 2;
  static_assert(kLanes <= 32);
  const int thread = threadIdx.x - Tile::kFirstNormThread, row = thread / kLanes, lane = thread % kLanes;
  const TileStatistics* tiles = params.statistics + min(row, params.num_rows - 1) * (params.width / kLinearFeatures);
  const RowMoments moments = moments_of_tiles<kLanes, kTilesAtOnce>(tiles, params.width, lane, params.eps);
  if (lane == 0) shared.moments[row] = moments;
  named_barrier_sync(kBroughtBarrier, kNormThreads);
}

template <class Tile>
__device__ __forceinline__ void bring_normed(const BlockRowsParams& params, typename Tile::Shared& shared, const Share& share,
                                             const Course& course, int pass, const void* scale, const void* shift) {
  constexpr int kPieces = Tile::kNormPieces;
  const PlaceInChunk<Tile> at(params.num_rows);
  const int64_t image = at.row / params.image_rows * params.vector_stride;
  NormedRow<Tile::kType> row{reinterpret_cast<const uint8_t*>(params.y + int64_t{at.row} * params.width),
                             static_cast<const uint16_t*>(scale) + image, static_cast<const uint16_t*>(shift) + image,
                             params.width, true};
  const auto column = [&](int chunk) { return (share.chunks.begin + chunk) * kLinearInputs + at.column; };
  RowPiece pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (at.chunk + i * at.step < share.count) row.load_vectors(pieces[i], column(at.chunk + i * at.step));
  }
  if (pass == 0) wait_for_rows<Tile>(params, course);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (at.chunk + i * at.step < share.count) row.load_x(pieces[i], column(at.chunk + i * at.step));
  }
  find_moments<Tile>(params, shared);
  row.moments = shared.moments[at.row];
#pragma unroll 1
  for (int begin = at.chunk; begin < share.count; begin += kPieces * at.step) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = begin + i * at.step, later = chunk + kPieces * at.step;
      if (chunk >= share.count) break;
      const uint4 h = row.normed(pieces[i]);
      if (later < share.count) row.load_vectors(pieces[i], column(later)), row.load_x(pieces[i], column(later));
      const uint32_t turn = course.turns + pass * share.count + chunk;
      *reinterpret_cast<uint4*>(free_buffer<Tile>(shared, turn) + at.bytes()) = h;
      release(shared.x_full[turn % Tile::kXStages]);
    }
  }
}

// Rows of params.hidden, of so many numbers.
template <class Tile>
__device__ __forceinline__ void bring_hidden(const BlockRowsParams& params, typename Tile::Shared& shared, const Share& share,
                                             const Course& course, int pass, int inputs) {
  constexpr int kPieces = Tile::kHiddenPieces;
  const PlaceInChunk<Tile> at(params.num_rows);
  const auto* row = static_cast<const uint16_t*>(params.hidden) + int64_t{at.row} * inputs + at.column;
  const auto load = [&](int chunk) {
    return __ldcg(reinterpret_cast<const uint4*>(row + (share.chunks.begin + chunk) * kLinearInputs));
  };
  if (pass == 0) wait_for_rows<Tile>(params, course);
  uint4 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    if (at.chunk + i * at.step < share.count) pieces[i] = load(at.chunk + i * at.step);
  }
#pragma unroll 1
  for (int begin = at.chunk; begin < share.count; begin += kPieces * at.step) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int chunk = begin + i * at.step, later = chunk + kPieces * at.step;
      if (chunk >= share.count) break;
      const uint32_t turn = course.turns + pass * share.count + chunk;
      *reinterpret_cast<uint4*>(free_buffer<Tile>(shared, turn) + at.bytes()) = pieces[i];
      if (later < share.count) pieces[i] = load(later);
      release(shared.x_full[turn % Tile::kXStages]);
    }
  }
}

// Of one row of a head, its numbers from 16 t on, which four lanes have together: in pairs, words 2 s and 2 s + 1 are those
// that this lane gives to step s of a product of rows, for a sum over them has no order.
struct HeadPiece {
  uint32_t words[8];

  __device__ __forceinline__ void load(const uint16_t* numbers) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(numbers) + i);
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  }

  template <DType kType>
  __device__ __forceinline__ void add(const float (&bias)[16]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float low, high;
      unpack<kType>(words[i], low, high);
      words[i] = pack<kType>(low + bias[2 * i], high + bias[2 * i + 1]);
    }
  }

  // (x + bias) factor / |x + bias|
  template <DType kType>
  __device__ __forceinline__ void normalise(const float (&bias)[16], float factor) {
    float numbers[16], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) unpack<kType>(words[i], numbers[2 * i], numbers[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 16; ++i) numbers[i] += bias[i], squares += numbers[i] * numbers[i];
    factor /= fmaxf(sqrtf(sum_of_lanes<4>(squares)), 1e-12f);
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = pack<kType>(numbers[2 * i] * factor, numbers[2 * i + 1] * factor);
  }
};

__device__ __forceinline__ void load_sixteen(float (&numbers)[16], const float* from) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 four = reinterpret_cast<const float4*>(from)[i];
    numbers[4 * i] = four.x, numbers[4 * i + 1] = four.y, numbers[4 * i + 2] = four.z, numbers[4 * i + 3] = four.w;
  }
}

// One head of some rows, at most sixteen, by a warp; `ready` returns when qkv is there, target() what stores eight numbers of a
// row, of those rows, from a multiple of eight on. Rows beyond the last one are the last one.
template <class Tile, class Ready, class Target>
__device__ __forceinline__ void attend(const BlockRowsParams& params, const BlockWeights& weights, int head, RowSpan span,
                                       Ready ready, Target target) {
  constexpr DType kType = Tile::kType;
  constexpr int kEights = Tile::kAttendedRows / 8;
  static_assert(kEights == 1 || kEights == 2);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, width = params.width;
  const int column = head * kBlockHeadDim + 16 * t;
  const float scale = exp2_approx(kLog2E * fminf(weights.log_scale[head], params.max_log_scale));
  ready();
  // Of rows g and g + 8 of q, where there are the upper ones; of keys of each eight.
  HeadPiece q[2], k[kEights], v[kEights];
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    const int64_t at = int64_t{span.first + min(8 * i + g, span.count - 1)} * 3 * width + column;
    const auto* row = static_cast<const uint16_t*>(params.qkv) + at;
    q[i].load(row), k[i].load(row + width), v[i].load(row + 2 * width);
  }
  const float nothing[16] = {};
#pragma unroll
  for (int i = 0; i < kEights; ++i) k[i].template normalise<kType>(nothing, 1.0f);
  // NOTE: what is loaded from here on shall not take registers before.
  hold();
  float v_bias[16];
  load_sixteen(v_bias, weights.v_bias + column);
#pragma unroll
  for (int i = 0; i < kEights; ++i) {
    v[i].template add<kType>(v_bias);
#pragma unroll
    for (int word = 0; word < 8; ++word) v[i].words[word] = transposed(v[i].words[word]);
  }
  hold();
  float q_bias[16];
  load_sixteen(q_bias, weights.q_bias + column);
#pragma unroll
  for (int i = 0; i < kEights; ++i) q[i].template normalise<kType>(q_bias, scale);
  if constexpr (kEights == 1) q[1] = q[0];
  float s[kEights][4], total[2] = {0.0f, 0.0f};
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t a[] = {q[0].words[2 * step], q[1].words[2 * step], q[0].words[2 * step + 1], q[1].words[2 * step + 1]};
      mma_m16n8k16<kType>(s[n], a, k[n].words[2 * step], k[n].words[2 * step + 1]);
    }
  }
#pragma unroll
  for (int half = 0; half < kEights; ++half) {
    const int row = min(g + 8 * half, span.count - 1), begin = row - row % params.image_rows;
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        const int key = 8 * n + 2 * t + i % 2;
        if (key < begin || key >= begin + params.image_rows) s[n][i] = -INFINITY;
        largest = fmaxf(largest, s[n][i]);
      }
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = exp2_approx(kLog2E * (s[n][i] - largest));
        total[half] += s[n][i];
      }
    }
    total[half] = 1.0f / sum_of_lanes<4>(total[half]);
  }
  const auto store = target();
  // NOTE: each image for itself, as what is not finite in another one's v would not go away by weights of zero.
#pragma unroll 1
  for (int first = 0; first < span.count; first += params.image_rows) {
    const auto counts = [&](int row) { return row >= first && row < first + params.image_rows; };
    uint32_t mask[kEights];
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      mask[n] = (counts(8 * n + 2 * t) ? 0xffff : 0) | (counts(8 * n + 2 * t + 1) ? 0xffff0000 : 0);
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      hold();
      float o[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int word = 4 * part + i;
#pragma unroll
        for (int j = 0; j < 4; ++j) o[i][j] = 0.0f;
        if constexpr (kEights == 1) {
          mma_m16n8k8<kType>(o[i], pack<kType>(s[0][0], s[0][1]), 0, v[0].words[word] & mask[0]);
        } else {
          const uint32_t a[] = {pack<kType>(s[0][0], s[0][1]), pack<kType>(s[0][2], s[0][3]), pack<kType>(s[1][0], s[1][1]),
                                pack<kType>(s[1][2], s[1][3])};
          mma_m16n8k16<kType>(o[i], a, v[0].words[word] & mask[0], v[1].words[word] & mask[1]);
        }
      }
#pragma unroll
      for (int half = 0; half < kEights; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = pack<kType>(o[i][2 * half] * total[half], o[i][2 * half + 1] * total[half]);
        }
        if (counts(g + 8 * half)) store(g + 8 * half, 2 * t + part, uint4{words[0], words[1], words[2], words[3]});
      }
    }
  }
}

// A head is a chunk of what the projection takes.
template <class Tile>
__device__ __forceinline__ void bring_attended(const BlockRowsParams& params, typename Tile::Shared& shared, const Share& share,
                                               const Course& course, int pass, int block) {
  const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
  const int arrivals = warps_of_chunk<Tile>(params.num_rows);
  bool waited = pass > 0;
  const auto ready = [&] {
    if (!waited) wait_for_rows<Tile>(params, course);
    waited = true;
  };
#pragma unroll 1
  for (int chunk = warp; chunk < share.count; chunk += kNormWarps) {
    const uint32_t turn = course.turns + pass * share.count + chunk;
    attend<Tile>(params, params.weights[block], share.chunks.begin + chunk, {0, params.num_rows}, ready, [&] {
      uint8_t* rows = free_buffer<Tile>(shared, turn);
      return [=](int row, int eight, uint4 numbers) { *reinterpret_cast<uint4*>(rows + swizzled_chunk(row, eight)) = numbers; };
    });
    __syncwarp();
    // NOTE: as often as the warps of a chunk would.
    if (lane < arrivals) barrier_arrive(shared.x_full[turn % Tile::kXStages]);
  }
  ready();
}

template <int kLayer>
__device__ __forceinline__ RowsOutput output_of(const BlockRowsParams& params, int block) {
  constexpr bool kAdded = kLayer == PROJ || kLayer == FC2;
  return {params.weights[block].biases[kLayer],
          kAdded ? params.y : nullptr,
          params.vectors[block][kLayer == PROJ ? GATE_ATTENTION : GATE_MLP],
          kLayer == QKV ? params.qkv : kLayer == FC1 ? params.hidden : params.y,
          kAdded ? params.statistics : nullptr,
          params.vector_stride,
          params.num_rows,
          LayerOf<kLayer>::outputs(params),
          params.image_rows,
          true,
          kLayer == FC1};
}

// Rows whose sums are sent: one to each block of a cluster at least, so that none of them is ahead of the others.
__device__ __forceinline__ int summed_rows(int num_rows) { return max(num_rows, kBlockSplits); }

// Outputs of a tile of a cluster, of which a block has every kBlockSplits-th row, and each of its warps one.
template <class Tile>
__device__ __forceinline__ void finish_tile(typename Tile::Shared& shared, const RowsOutput& out, RingPosition<2>& sums,
                                            int rank, int tile) {
  static_assert(Tile::kPartRows <= kNormWarps);
  const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
  const int row = rank + kBlockSplits * warp, feature = tile * kLinearFeatures + lane;
  const int num_rows = (summed_rows(out.num_rows) - rank + kBlockSplits - 1) / kBlockSplits;
  float bias[2];
  Surroundings<Tile> surroundings;
  load_bias<Tile::kType>(bias, out, feature);
  surroundings.load_gates(out, row, Tile::kRows, feature);
  surroundings.load_residual(out, row, Tile::kRows, feature);
  if (threadIdx.x == Tile::kFirstNormThread) {
    barrier_arrive_expecting(shared.sums_full[sums.stage], num_rows * Tile::kParts * kLinearFeatures * int(sizeof(float)));
  }
  barrier_wait(shared.sums_full[sums.stage], sums.parity);
  const float* of_rows = shared.sums[sums.stage];
  const auto part = [&](int, int feature, int i) { return of_rows[(i * Tile::kPartRows + warp) * kSumsRow + feature]; };
  store_outputs<Tile, Tile::kParts>(out, part, surroundings, row, Tile::kRows, feature, bias);
  __syncwarp();
  if (lane < kBlockSplits) barrier_arrive_at(shared.sums_empty[sums.stage], lane);
  sums.advance();
}

// x, of which all blocks of the kernel together have all, to y, and its statistics.
template <class Tile>
__device__ __forceinline__ uint32_t begin_stream(const BlockRowsParams& params) {
  const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
  const int num_tiles = params.width / kLinearFeatures;
  uint32_t read = 0;
#pragma unroll 1
  for (int i = blockIdx.x * kNormWarps + warp; i < params.num_rows * num_tiles; i += gridDim.x * kNormWarps) {
    const int64_t at = int64_t{i} * kLinearFeatures + lane;
    const float x[] = {params.x[at], params.x[at + 32]};
    params.y[at] = x[0], params.y[at + 32] = x[1];
    const TileStatistics statistics = tile_statistics(x, kLinearFeatures);
    if (lane == 0) params.statistics[i] = statistics;
    const auto* written = reinterpret_cast<const float*>(params.statistics + i);
    read += read_back(params.y + at) + read_back(params.y + at + 32);
    if (lane == 0) read += read_back(written) + read_back(written + 1);
  }
  return read;
}

// What these warps have written of a product is there for all blocks.
// NOTE: no fence, which would wait for all weights that the copy engine has been asked for: each thread reads back what it has
// written, from where others read it, before the block is counted. PTX promises as much of a fence only; here it is taken that
// stores and loads past the first level meet in L2, in order for an address (reports/log.md, what the fence costs).
template <class Tile>
__device__ __forceinline__ void count_outputs(const BlockRowsParams& params, uint32_t read) {
  constexpr uint32_t kAny = 0x7fbadbad;
  if (read == kAny) __nanosleep(1);  // what needs the numbers
  named_barrier_sync(kBroughtBarrier, kNormThreads);
  if (threadIdx.x == Tile::kFirstNormThread) count_relaxed(params.counters);
}

template <class Tile>
__device__ __forceinline__ uint32_t read_outputs_back(const RowsOutput& out, const Share& share, const Course& course) {
  const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
  const int row = course.rank + kBlockSplits * warp;
  uint32_t read = 0;
  if (row >= out.num_rows) return read;
#pragma unroll 1
  for (int i = 0; i < share.num_tiles; ++i) {
    const int tile = course.first_tile() + i * course.num_clusters;
    const int64_t at = int64_t{row} * out.num_outputs + tile * kLinearFeatures + lane;
    if (out.residual != nullptr) {
      const auto* y = static_cast<const float*>(out.y) + at;
      read += read_back(y) + read_back(y + 32);
      const TileStatistics* of_row = out.statistics + row * (out.num_outputs / kLinearFeatures);
      const auto* statistics = reinterpret_cast<const float*>(of_row + tile);
      if (lane == 0) read += read_back(statistics) + read_back(statistics + 1);
    } else {
      const auto* y = static_cast<const uint16_t*>(out.y) + at;
      read += read_back(y) + read_back(y + 32);
    }
  }
  return read;
}

// Attention to params.hidden, as rows of `width` numbers, which nobody reads meanwhile: each warp a head of some images.
template <class Tile>
__device__ __forceinline__ void attend_apart(const BlockRowsParams& params, int block, const Course& course) {
  const AttendedParts<Tile> dealt(params);
  if (blockIdx.x >= dealt.parts) return;
  const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
  const int first = blockIdx.x + warp * gridDim.x, step = kNormWarps * gridDim.x;
  const auto place = [&](int part, int row, int eight) {
    const int64_t of_row = int64_t{dealt.span(part, params.num_rows).first + row} * params.width;
    return static_cast<uint16_t*>(params.hidden) + of_row + dealt.head(part) * kBlockHeadDim + 8 * eight;
  };
  wait_for_rows<Tile>(params, course);
#pragma unroll 1
  for (int part = first; part < dealt.parts; part += step) {
    attend<Tile>(params, params.weights[block], dealt.head(part), dealt.span(part, params.num_rows), [] {}, [&] {
      return [&](int row, int eight, uint4 numbers) { *reinterpret_cast<uint4*>(place(part, row, eight)) = numbers; };
    });
  }
  uint32_t read = 0;
#pragma unroll 1
  for (int part = first; part < dealt.parts; part += step) {
    const int rows = dealt.span(part, params.num_rows).count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half, eight = 2 * (lane % 4);
      if (row < rows) read += read_back(place(part, row, eight)) + read_back(place(part, row, eight + 1));
    }
  }
  count_outputs<Tile>(params, read);
}

template <class Tile>
__device__ __forceinline__ void bring_rows(const BlockRowsParams& params, typename Tile::Shared& shared) {
  RingPosition<2> sums;
  count_outputs<Tile>(params, begin_stream<Tile>(params));
  const auto attend = [&](int block, const Course& course) { attend_apart<Tile>(params, block, course); };
  const auto bring = [&](auto layer, int block, const Share& share, const Course& course) {
    constexpr int kLayer = decltype(layer)::kLayer;
    const void* const* vectors = params.vectors[block];
    const int thread = threadIdx.x - Tile::kFirstNormThread;
    if (thread < share.num_tiles) {
      const RowsOutput out = output_of<kLayer>(params, block);
      const int feature = (course.first_tile() + thread * course.num_clusters) * kLinearFeatures;
      if (out.bias != nullptr) prefetch_l2(static_cast<const uint16_t*>(out.bias) + feature);
      for (int image = 0; out.residual != nullptr && image < params.num_rows / params.image_rows; ++image) {
        prefetch_l2(static_cast<const uint16_t*>(out.gate) + image * params.vector_stride + feature);
      }
    }
    // Of products that come later.
    if constexpr (kLayer == QKV) {
      const int line = 32 * thread;
      const int head = Tile::kAttendsApart ? AttendedParts<Tile>(params).head(blockIdx.x) : share.chunks.begin;
      if (line < (Tile::kAttendsApart ? 1 : share.count) * kBlockHeadDim) {
        prefetch_l2(params.weights[block].q_bias + head * kBlockHeadDim + line);
        prefetch_l2(params.weights[block].v_bias + head * kBlockHeadDim + line);
      }
      prefetch_vector<Tile>(params, share, vectors[SCALE_MLP]), prefetch_vector<Tile>(params, share, vectors[SHIFT_MLP]);
    }
    if (kLayer == FC1 && block + 1 < params.num_blocks) {
      prefetch_vector<Tile>(params, share, params.vectors[block + 1][SCALE_ATTENTION]);
      prefetch_vector<Tile>(params, share, params.vectors[block + 1][SHIFT_ATTENTION]);
    }
#pragma unroll 1
    for (int pass = 0; pass < share.num_passes(); ++pass) {
      if constexpr (kLayer == QKV) {
        bring_normed<Tile>(params, shared, share, course, pass, vectors[SCALE_ATTENTION], vectors[SHIFT_ATTENTION]);
      } else if constexpr (kLayer == PROJ && !Tile::kAttendsApart) {
        bring_attended<Tile>(params, shared, share, course, pass, block);
      } else if constexpr (kLayer == FC1) {
        bring_normed<Tile>(params, shared, share, course, pass, vectors[SCALE_MLP], vectors[SHIFT_MLP]);
      } else {
        bring_hidden<Tile>(params, shared, share, course, pass, layer.inputs(params));
      }
      const RowsOutput out = output_of<kLayer>(params, block);
      const int end = share.resident ? share.num_tiles : pass + 1;
#pragma unroll 1
      for (int i = pass; i < end; ++i) {
        finish_tile<Tile>(shared, out, sums, course.rank, course.first_tile() + i * course.num_clusters);
      }
    }
    count_outputs<Tile>(params, read_outputs_back<Tile>(output_of<kLayer>(params, block), share, course));
  };
  go_through<Tile>(params, bring, attend);
  // NOTE: nobody waits for counts any more when all blocks have come here.
  if (threadIdx.x == Tile::kFirstNormThread) {
    __threadfence();
    if (atomicAdd(params.counters + 1, 1) == int(gridDim.x) - 1) {
      __threadfence();
      params.counters[0] = params.counters[1] = 0;
    }
  }
}

// --- the warpgroup that multiplies -----------------------------------------------------------------------------------

// Moves on by so many.
template <int kStages>
__device__ __forceinline__ void advance(RingPosition<kStages>& ring, int count) {
  for (ring.stage += count; ring.stage >= kStages; ring.stage -= kStages) ring.parity ^= 1;
}

// Sums of 64 features over every kGroups-th chunk of a block. weights, x: the place of the first chunk of all. first, last: x
// was not used before, is not once more.
template <class Tile>
__device__ __forceinline__ void multiply_tile(typename Tile::Shared& shared, RingPosition<Tile::kStages> weights, uint32_t x,
                                              int count, bool first, bool last,
                                              float (&d)[Tile::kChains][Tile::kRows / 2]) {
  const int group = uniform(threadIdx.x / kGroupThreads);
  const auto done = [&](int stage, uint32_t turn) {
    release(shared.weight_empty[stage]);
    if (last) release(shared.x_empty[turn % Tile::kXStages]);
  };
#pragma unroll
  for (auto& chain : d) {
#pragma unroll
    for (float& sum : chain) sum = 0.0f;
  }
  advance(weights, group);
  int ready = first ? group : count, last_stage = 0;
#pragma unroll 1
  for (int i = group; i < count; i += Tile::kGroups) {
    const uint32_t turn = x + i;
    if (i >= ready) {
      // NOTE: of no other group, which may have given them back.
#pragma unroll 1
      for (const int end = min(i + Tile::kXTogether, count); ready < end; ready += Tile::kGroups) {
        barrier_wait(shared.x_full[(x + ready) % Tile::kXStages], (x + ready) / Tile::kXStages % 2);
      }
      // NOTE: where x is written it may wait for what has been asked for of later chunks.
      fence_async_proxy();
    }
    barrier_wait(shared.weight_full[weights.stage], weights.parity);
    const uint64_t a = row_descriptor(shared.weight[weights.stage]), b = row_descriptor(shared.x[turn % Tile::kXStages]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kLinearInputs / 16; ++k) {
      wgmma<Tile::kType, false>(d[k % Tile::kChains], advanced(a, k * 32), advanced(b, k * 32), true);
    }
    wgmma_commit();
    // The products of the chunk before are done: its buffers are free.
    wgmma_wait<1>();
    if (i > group) done(last_stage, turn - Tile::kGroups);
    last_stage = weights.stage;
    advance(weights, Tile::kGroups);
  }
  wgmma_wait<0>();
  if (group < count) done(last_stage, x + group + (count - 1 - group) / Tile::kGroups * Tile::kGroups);
}

template <class Tile>
__device__ __forceinline__ void multiply(const BlockRowsParams& params, typename Tile::Shared& shared) {
  const int group = uniform(threadIdx.x / kGroupThreads);
  RingPosition<Tile::kStages> weights;
  RingPosition<2> sums;
  go_through<Tile>(params, [&](auto, int, const Share& share, const Course& course) {
#pragma unroll 1
    for (int i = 0; i < share.num_tiles; ++i) {
      float d[Tile::kChains][Tile::kRows / 2];
      const uint32_t x = course.turns + (share.resident ? 0 : i * share.count);
      const bool first = !share.resident || i == 0, last = !share.resident || i + 1 == share.num_tiles;
      multiply_tile<Tile>(shared, weights, x, share.count, first, last, d);
      advance(weights, share.count);
      barrier_wait(shared.sums_empty[sums.stage], sums.parity ^ 1);
      float* of_group = shared.sums[sums.stage] + (course.rank * Tile::kGroups + group) * (Tile::kPartRows * kSumsRow);
#pragma unroll
      for (int chain = 1; chain < Tile::kChains; ++chain) {
#pragma unroll
        for (int j = 0; j < Tile::kRows / 2; ++j) d[0][j] += d[chain][j];
      }
      visit_sums<Tile::kRows>(d[0], [&](int row, int feature, float sum) {
        if (row >= summed_rows(params.num_rows)) return;
        store_cluster(of_group + row / kBlockSplits * kSumsRow + feature, sum, shared.sums_full[sums.stage], row % kBlockSplits);
      });
      sums.advance();
    }
  });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, 1) block_rows_kernel(const __grid_constant__ BlockRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<typename Tile::Shared*>(shared_memory);
  if (threadIdx.x == 0) {
    barriers_init(shared.weight_full, 1), barriers_init(shared.weight_empty, kGroupThreads / 32);
    barriers_init(shared.x_full, warps_of_chunk<Tile>(params.num_rows)), barriers_init(shared.x_empty, kGroupThreads / 32);
    barriers_init(shared.sums_full, 1), barriers_init(shared.sums_empty, kBlockSplits * kNormWarps);
    fence_barrier_init();
  }
  // NOTE: others arrive at this block's barriers.
  cluster_sync();
  if (threadIdx.x < Tile::kWeightThread) {
    give_registers<Tile::kMultiplyRegisters>();
    multiply<Tile>(params, shared);
  } else if (threadIdx.x < Tile::kFirstNormThread) {
    give_registers<Tile::kWeightRegisters>();
    if (threadIdx.x == Tile::kWeightThread) bring_weights<Tile>(params, shared);
  } else {
    take_registers<Tile::kNormRegisters>();
    bring_rows<Tile>(params, shared);
  }
  // NOTE: others write to a block's shared memory until here.
  cluster_sync();
}

}  // namespace hmar
