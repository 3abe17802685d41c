// Runs csrc/linear_rows.cuh, as it stands, on the CPU; test_linear_rows_source.py loads this through ctypes.
#define HMAR_ON_CPU
#include "linear_rows.cuh"

#include <type_traits>

#include "linear_rows.h"

using namespace hmar;

namespace {

const char* message(const Cluster& cluster) { return cluster.failure.empty() ? nullptr : cluster.failure.c_str(); }

MapContent content(const void* data, const MapGeometry& geometry, bool of_previous) {
  return {static_cast<const uint8_t*>(data),
          geometry.rank,
          {geometry.sizes[0], geometry.sizes[1]},
          {geometry.strides[0]},
          {geometry.box[0], geometry.box[1]},
          of_previous};
}

// Of rows that begin so many numbers apart.
void hide(Cluster& cluster, const void* data, int rows, int64_t stride, int columns, int number_bytes) {
  if (data == nullptr) return;
  auto* begin = static_cast<uint8_t*>(const_cast<void*>(data));
  for (int row = 0; row < rows; ++row, begin += stride * number_bytes) {
    cluster.previous.push_back({begin, {begin, begin + columns * number_bytes}});
  }
}

template <class Tile>
void run(const LinearRows& call, int splits, bool last_thread_first, Cluster& cluster) {
  const MapContent x = content(call.x, linear_geometry(call.num_rows, call.num_inputs, Tile::kRows), true);
  const MapContent weight = content(call.weight, linear_geometry(call.num_outputs, call.num_inputs, kLinearFeatures), false);
  LinearRowsParams params = linear_rows_params(call);
  params.x_map.opaque[0] = reinterpret_cast<uint64_t>(&x);
  params.weight.opaque[0] = reinterpret_cast<uint64_t>(&weight);
  cluster.kernel = [&] { linear_rows_kernel<Tile>(params); };
  const int num_images = divided(call.num_rows, call.image_rows), tiles = divided(call.num_inputs, kLinearFeatures);
  cluster.previous.clear();
  hide(cluster, call.x, call.num_rows, call.num_inputs, call.num_inputs, call.float_x ? 4 : 2);
  hide(cluster, call.norm.statistics, call.num_rows, tiles, tiles, sizeof(TileStatistics));
  hide(cluster, call.norm.scale, num_images, call.norm.scale_stride, call.num_inputs, 2);
  hide(cluster, call.norm.shift, num_images, call.norm.shift_stride, call.num_inputs, 2);
  hide(cluster, call.residual, call.num_rows, call.num_outputs, call.num_outputs, call.float_residual ? 4 : 2);
  hide(cluster, call.gate, num_images, call.gate_stride, call.num_outputs, 2);
  const int num_tiles = divided(call.num_outputs, kLinearFeatures);
  if (splits == 0) splits = linear_splits(num_tiles, params.num_chunks, 132);
  for (int block = 0; block < num_tiles * splits && cluster.failure.empty(); block += splits) {
    run_cluster(cluster, block, splits, Tile::kNumThreads, sizeof(typename Tile::Shared), last_thread_first);
    if (!cluster.failure.empty()) return;
    for (const Block& of_cluster : cluster.blocks) {
      if (of_cluster.launches != 1) cluster.failure = "the next kernel is not let start once";
      if (of_cluster.late_boxes) cluster.failure = "weights are asked for late";
    }
  }
}

template <DType kType>
void run(const LinearRows& call, int kernel_rows, int splits, bool last_thread_first, Cluster& cluster) {
  const auto with = [&](auto rows, auto normed) {
    if (kernel_rows != decltype(rows)::value || (call.norm.scale != nullptr) != decltype(normed)::value) return;
    cluster.failure.clear();
    run<LinearRowsTile<kType, decltype(rows)::value, decltype(normed)::value>>(call, splits, last_thread_first, cluster);
  };
  cluster.failure = "no such tile";
  const auto either = [&](auto rows) { with(rows, std::false_type()), with(rows, std::true_type()); };
  either(std::integral_constant<int, 8>()), either(std::integral_constant<int, 16>());
  either(std::integral_constant<int, 32>());
}

}  // namespace

// Null, or what went wrong. splits: 0 for those of a launch on 132 multiprocessors.
extern "C" const char* linear_rows_on_cpu(const LinearRows* call, int kernel_rows, int splits, bool last_thread_first) {
  static Cluster cluster;
  if (call->dtype == DType::kBFloat16) {
    run<DType::kBFloat16>(*call, kernel_rows, splits, last_thread_first, cluster);
  } else {
    run<DType::kFloat16>(*call, kernel_rows, splits, last_thread_first, cluster);
  }
  return message(cluster);
}

extern "C" int linear_splits_of(int num_tiles, int num_chunks, int num_sms) {
  return linear_splits(num_tiles, num_chunks, num_sms);
}

extern "C" const char* row_statistics_on_cpu(const RowStatisticsParams* params, bool bfloat16, int num_rows,
                                             bool last_thread_first) {
  static Cluster cluster;
  cluster.failure.clear();
  cluster.previous.clear();
  hide(cluster, params->x, num_rows, params->num_inputs, params->num_inputs, params->float_x ? 4 : 2);
  cluster.kernel = [&] {
    bfloat16 ? row_statistics_kernel<DType::kBFloat16>(*params) : row_statistics_kernel<DType::kFloat16>(*params);
  };
  const int num_blocks = num_rows * divided(params->num_tiles, kStatisticsWarps);
  for (int block = 0; block < num_blocks && cluster.failure.empty(); ++block) {
    run_cluster(cluster, block, 1, 32 * kStatisticsWarps, 0, last_thread_first);
  }
  return message(cluster);
}
