// What the kernels for few rows share (linear_rows.cuh, block_rows.cuh): the part of a sum over K that a block of a cluster
// has, norms of x on its way into shared memory, and the outputs, which the blocks of a cluster add up from each other's shared
// memory.
#pragma once

#include "hopper_tile.cuh"

namespace hmar {

constexpr int kNormWarps = 8, kNormThreads = 32 * kNormWarps;  // which bring rows
constexpr int kSumsRow = kLinearFeatures + 4;                  // so that the lanes of a warp write sums to 32 banks
static_assert(kLinearInputs == kPanelColumns && kLinearFeatures == kGroupRows);

// What a block of a cluster has of the sum over K.
struct ChunkRange {
  int begin, end;

  __device__ __forceinline__ ChunkRange(int num_chunks, int rank, int splits)
      : begin(num_chunks * rank / splits), end(num_chunks * (rank + 1) / splits) {}
};

template <DType kType>
__device__ __forceinline__ float value_of(uint16_t number) {
  float value, nothing;
  unpack<kType>(number, value, nothing);
  return value;
}

// Among lanes whose numbers differ in the bits below kLanes.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// How many numbers of a row a tile has; 0 or less beyond the last one.
__device__ __forceinline__ int tile_size(int num_columns, int tile) {
  return min(kLinearFeatures, num_columns - tile * kLinearFeatures);
}

// Of a tile that a warp has, numbers lane and lane + 32 of it in a lane, of which `size` count.
__device__ __forceinline__ TileStatistics tile_statistics(const float (&x)[2], int size) {
  const int lane = threadIdx.x % 32;
  const bool first = lane < size, second = lane + 32 < size;
  const float mean = sum_of_lanes<32>((first ? x[0] : 0.0f) + (second ? x[1] : 0.0f)) / size;
  const float distances[] = {first ? x[0] - mean : 0.0f, second ? x[1] - mean : 0.0f};
  return {mean, sum_of_lanes<32>(distances[0] * distances[0] + distances[1] * distances[1])};
}

// What a norm takes of a row.
struct alignas(8) RowMoments {
  float mean, rstd;
};

// Of a row, by kLanes lanes that follow each other; `lane` is this one of them. It reads kTilesAtOnce of its tiles together.
// NOTE: sums of distances from the first tile's mean, not of the numbers, so that nothing is lost where means are large.
template <int kLanes, int kTilesAtOnce>
__device__ __forceinline__ RowMoments moments_of_tiles(const TileStatistics* tiles, int num_columns, int lane, float eps) {
  const int num_tiles = (num_columns + kLinearFeatures - 1) / kLinearFeatures;
  const auto* numbers = reinterpret_cast<const float2*>(tiles);
  const float origin = __ldcg(numbers).x;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < num_tiles; begin += kTilesAtOnce * kLanes) {
    const int first = begin + lane;
    float2 parts[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) parts[i] = __ldcg(numbers + min(first + i * kLanes, num_tiles - 1));
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const int size = tile_size(num_columns, first + i * kLanes);
      const float distance = parts[i].x - origin;
      if (size > 0) sum += size * distance, squares += parts[i].y + size * distance * distance;
    }
  }
  const float distance = sum_of_lanes<kLanes>(sum) / num_columns;
  const float variance = fmaxf(sum_of_lanes<kLanes>(squares) / num_columns - distance * distance, 0.0f);
  return {origin + distance, inverse_root(variance + eps)};
}

// Eight numbers of a row as they are read. x: where it is not float32, the first half.
struct RowPiece {
  uint4 x[2], scale, shift;
};

// One row of x and of its image's vectors, of which eight lanes make a chunk of h. Beyond K it is the last piece once more, for
// which weights are zero.
template <DType kType>
struct NormedRow {
  const uint8_t* x;
  const uint16_t* scale;
  const uint16_t* shift;
  int num_inputs;
  bool float_x;
  RowMoments moments;

  __device__ __forceinline__ void load_x(RowPiece& piece, int column) const {
    const auto* numbers = reinterpret_cast<const uint4*>(x + min(column, num_inputs - 8) * (float_x ? 4 : 2));
    piece.x[0] = __ldcg(numbers);
    if (float_x) piece.x[1] = __ldcg(numbers + 1);
  }
  __device__ __forceinline__ void load_vectors(RowPiece& piece, int column) const {
    column = min(column, num_inputs - 8);
    piece.scale = *reinterpret_cast<const uint4*>(scale + column), piece.shift = *reinterpret_cast<const uint4*>(shift + column);
  }

  __device__ __forceinline__ uint4 normed(const RowPiece& piece) const {
    const uint32_t x[] = {piece.x[0].x, piece.x[0].y, piece.x[0].z, piece.x[0].w,
                          piece.x[1].x, piece.x[1].y, piece.x[1].z, piece.x[1].w};
    const uint32_t scale[] = {piece.scale.x, piece.scale.y, piece.scale.z, piece.scale.w};
    const uint32_t shift[] = {piece.shift.x, piece.shift.y, piece.shift.z, piece.shift.w};
    uint32_t h[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float numbers[2] = {__uint_as_float(x[2 * i]), __uint_as_float(x[2 * i + 1])}, factor[2], offset[2];
      if (!float_x) unpack<kType>(x[i], numbers[0], numbers[1]);
      unpack<kType>(scale[i], factor[0], factor[1]);
      unpack<kType>(shift[i], offset[0], offset[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        numbers[j] = (numbers[j] - moments.mean) * moments.rstd * (1.0f + factor[j]) + offset[j];
      }
      h[i] = pack<kType>(numbers[0], numbers[1]);
    }
    return {h[0], h[1], h[2], h[3]};
  }
};

// How many warps bring a chunk, four rows each; the others have the chunks that follow.
// NOTE: not more chunks at a time than the ring has, of which no warp must pass over a turn.
template <class Tile>
__device__ __forceinline__ int warps_of_chunk(int num_rows) {
  int warps = (kNormWarps + Tile::kXStages - 1) / Tile::kXStages;
  while (4 * warps < num_rows) warps *= 2;
  return warps;
}

// What a thread of these warps has of a chunk: eight numbers of one row. Lanes of rows beyond the last one do what those of the
// last one do. chunk: the first of them, `step` before the next one.
template <class Tile>
struct PlaceInChunk {
  int chunk, step, place, row, column;

  __device__ __forceinline__ PlaceInChunk(int num_rows) {
    const int warp = uniform((threadIdx.x - Tile::kFirstNormThread) / 32), lane = threadIdx.x % 32;
    const int warps = warps_of_chunk<Tile>(num_rows);
    chunk = warp / warps, step = kNormWarps / warps;
    place = warp % warps * 4 + lane / 8, row = min(place, num_rows - 1), column = lane % 8 * 8;
  }
  __device__ __forceinline__ int bytes() const { return swizzled_chunk(place, column / 8); }
};

// visit(row of x, feature, sum) of what a thread of a warpgroup has of products, features along the rows of d.
template <int kRows, class Visit>
__device__ __forceinline__ void visit_sums(const float (&d)[kRows / 2], Visit visit) {
  const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) visit(8 * n + 2 * t + i % 2, 16 * warp + g + i / 2 * 8, d[4 * n + i]);
  }
}

// What surrounds outputs of a thread: two features, 32 apart, of kRowsAtOnce rows from one on.
// NOTE: as it is read, without branches, and what lies beyond the last row or feature like that: so that nothing waits for the
// loads before the outputs do.
template <class Tile>
struct Surroundings {
  float wide[Tile::kRowsAtOnce][2];  // the residual, in one of these two
  uint16_t narrow[Tile::kRowsAtOnce][2];
  uint16_t gate[Tile::kRowsAtOnce][2];

  __device__ __forceinline__ void load_gates(const RowsOutput& out, int first_row, int row_step, int first_feature) {
    if (out.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = min(first_row + i * row_step, out.num_rows - 1);
      const auto* gates = static_cast<const uint16_t*>(out.gate) + row / out.image_rows * out.gate_stride;
#pragma unroll
      for (int j = 0; j < 2; ++j) gate[i][j] = gates[min(first_feature + 32 * j, out.num_outputs - 1)];
    }
  }

  __device__ __forceinline__ void load_residual(const RowsOutput& out, int first_row, int row_step, int first_feature) {
    if (out.residual == nullptr) return;
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = min(first_row + i * row_step, out.num_rows - 1);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t at = int64_t{row} * out.num_outputs + min(first_feature + 32 * j, out.num_outputs - 1);
        if (out.float_residual) wide[i][j] = __ldcg(static_cast<const float*>(out.residual) + at);
        if (!out.float_residual) narrow[i][j] = __ldcg(static_cast<const uint16_t*>(out.residual) + at);
      }
    }
  }

  // residual + gate y
  __device__ __forceinline__ float around(const RowsOutput& out, int i, int j, float y) const {
    if (out.residual == nullptr) return y;
    return (out.float_residual ? wide[i][j] : value_of<Tile::kType>(narrow[i][j])) + value_of<Tile::kType>(gate[i][j]) * y;
  }
};

// Of the features `feature` and 32 further on; zeros where there are none.
template <DType kType>
__device__ __forceinline__ void load_bias(float (&bias)[2], const RowsOutput& out, int feature) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const bool counts = out.bias != nullptr && feature + 32 * j < out.num_outputs;
    bias[j] = counts ? value_of<kType>(static_cast<const uint16_t*>(out.bias)[feature + 32 * j]) : 0.0f;
  }
}

// What is stored of y where it counts, which may have fewer bits.
template <class Tile>
__device__ __forceinline__ float store_output(const RowsOutput& out, int row, int feature, bool counts, float y) {
  const int64_t at = int64_t{row} * out.num_outputs + feature;
  if (out.residual != nullptr && out.float_residual) {
    if (counts) static_cast<float*>(out.y)[at] = y;
    return y;
  }
  const auto number = static_cast<uint16_t>(pack<Tile::kType>(y, 0.0f));
  if (counts) static_cast<uint16_t*>(out.y)[at] = number;
  return value_of<Tile::kType>(number);
}

// Adds up the parts of sums of rows from the first one on, and writes the outputs, by a warp. part(row, feature of the tile,
// i): the i-th part of kParts. feature: of this lane, which has those 32 further on too. surroundings: of the first rows.
template <class Tile, int kParts, class Part>
__device__ __forceinline__ void store_outputs(const RowsOutput& out, Part part, Surroundings<Tile>& surroundings, int first_row,
                                              int row_step, int feature, const float (&bias)[2]) {
  const int tile = feature / kLinearFeatures, size = tile_size(out.num_outputs, tile);
  const int num_tiles = (out.num_outputs + kLinearFeatures - 1) / kLinearFeatures;
#pragma unroll 1
  for (int begin = first_row; begin < out.num_rows; begin += Tile::kRowsAtOnce * row_step) {
    if (begin != first_row) {
      surroundings.load_gates(out, begin, row_step, feature);
      surroundings.load_residual(out, begin, row_step, feature);
    }
    float parts[Tile::kRowsAtOnce][2][kParts];
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = begin + i * row_step;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
          parts[i][j][k] = row < out.num_rows ? part(row, feature % kLinearFeatures + 32 * j, k) : 0.0f;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsAtOnce; ++i) {
      const int row = begin + i * row_step;
      const bool valid = row < out.num_rows;
      float stored[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float y = bias[j];
#pragma unroll
        for (int k = 0; k < kParts; ++k) y += parts[i][j][k];
        // 0.5 (1 + tanh u) = 1 / (1 + 2^(-2 u log2 e)), and 2 sqrt(2 / pi) log2 e = 2.3022082
        if (out.gelu) y /= 1.0f + exp2_approx(-2.3022082f * (y + 0.044715f * y * y * y));
        y = surroundings.around(out, i, j, y);
        stored[j] = store_output<Tile>(out, row, feature + 32 * j, valid && feature + 32 * j < out.num_outputs, y);
      }
      if (out.statistics != nullptr) {
        const TileStatistics statistics = tile_statistics(stored, size);
        if (valid && threadIdx.x % 32 == 0) out.statistics[int64_t{row} * num_tiles + tile] = statistics;
      }
    }
  }
}

}  // namespace hmar
