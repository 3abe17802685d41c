// Runs csrc/hopper_conv.cuh, as it stands, on the CPU; test_conv2d.py loads this through ctypes.
#define HMAR_ON_CPU
#include "hopper_conv.cuh"

#include <type_traits>

#include "hopper_conv.h"

using namespace hmar;

namespace {

MapContent content(const void* data, const MapGeometry& geometry) {
  MapContent map{static_cast<const uint8_t*>(data), geometry.rank, {}, {}, {}, false};
  std::memcpy(map.sizes, geometry.sizes, sizeof(map.sizes));
  std::memcpy(map.strides, geometry.strides, sizeof(map.strides));
  std::memcpy(map.box, geometry.box, sizeof(map.box));
  return map;
}

template <class Tile>
void run(const HopperConvShape& shape, const void* x, const void* weight, const void* bias, const HopperConvOutput& output, int num_blocks,
         bool last_thread_first, Cluster& cluster) {
  static_assert(sizeof(typename Tile::Shared) <= SHARED_BYTES);
  const HopperConvKernel kernel{Tile::kResolution == Resolution::kDoubled, Tile::kBlocks, Tile::kStages, Tile::kMapStages, 0};
  const MapContent x_map = content(x, conv_x_geometry(shape, kernel));
  const MapContent weight_map = content(weight, conv_weight_geometry(shape, kernel));
  HopperConvParams params = conv_params(shape, kernel, bias, output);
  params.x.opaque[0] = reinterpret_cast<uint64_t>(&x_map);
  params.weight.opaque[0] = reinterpret_cast<uint64_t>(&weight_map);
  cluster.kernel = [&] { hopper_conv_kernel<Tile>(params); };
  gridDim.x = unsigned(num_blocks);
  for (int block = 0; block < num_blocks && cluster.failure.empty(); ++block) {
    run_cluster(cluster, block, 1, Tile::kNumThreads, sizeof(typename Tile::Shared), last_thread_first);
  }
}

template <DType kType, Resolution kResolution>
void run(int blocks, const HopperConvShape& shape, const void* x, const void* weight, const void* bias,
         const HopperConvOutput& output, int num_blocks, bool last_thread_first, Cluster& cluster) {
  if (blocks == 1) {
    run<HopperConvTile<kType, kResolution, 1, 5, 2>>(shape, x, weight, bias, output, num_blocks, last_thread_first, cluster);
  } else {
    run<HopperConvTile<kType, kResolution, 2, 6, 2>>(shape, x, weight, bias, output, num_blocks, last_thread_first, cluster);
  }
}

}  // namespace

// Null, or what went wrong. The kernel is that of the extension with fewer stages, so that rings turn over sooner.
extern "C" const char* hopper_conv_on_cpu(bool bfloat16, bool doubled, int blocks, int num_images, int height, int width,
                                          int in_channels, int out_channels, const void* x, const void* weight,
                                          const void* bias, void* out, float* means, float* deviations,
                                          int num_blocks, bool last_thread_first) {
  static Cluster cluster;
  cluster.failure.clear();
  const HopperConvShape shape{bfloat16 ? DType::kBFloat16 : DType::kFloat16, num_images, height, width, in_channels,
                              out_channels};
  const HopperConvOutput output{out, means, deviations};
  const auto call = [&](auto run) { run(blocks, shape, x, weight, bias, output, num_blocks, last_thread_first, cluster); };
  const auto call_type = [&](auto type) {
    constexpr auto kType = decltype(type)::value;
    doubled ? call(run<kType, Resolution::kDoubled>) : call(run<kType, Resolution::kSame>);
  };
  if (bfloat16) {
    call_type(std::integral_constant<DType, DType::kBFloat16>());
  } else {
    call_type(std::integral_constant<DType, DType::kFloat16>());
  }
  return cluster.failure.empty() ? nullptr : cluster.failure.c_str();
}

// The numbers of a launch, in the order of MapGeometry's and HopperConvParams' fields.
extern "C" void hopper_conv_geometry(bool doubled, int blocks, int num_images, int height, int width,
                                     int in_channels, int out_channels, int64_t* numbers) {
  const HopperConvShape shape{DType::kBFloat16, num_images, height, width, in_channels, out_channels};
  const HopperConvKernel kernel{doubled, blocks, 0, 0, 0};
  for (const MapGeometry& map : {conv_x_geometry(shape, kernel), conv_weight_geometry(shape, kernel)}) {
    *numbers++ = map.rank;
    for (int i = 0; i < map.rank; ++i) *numbers++ = int64_t(map.sizes[i]);
    for (int i = 0; i + 1 < map.rank; ++i) *numbers++ = int64_t(map.strides[i]);
    for (int i = 0; i < map.rank; ++i) *numbers++ = int64_t(map.box[i]);
  }
  const HopperConvParams params = conv_params(shape, kernel, nullptr, {});
  for (const int64_t number :
       {params.image_stride, int64_t{params.row_stride}, int64_t{params.column_stride},
        int64_t{params.parity_row_stride}, int64_t{params.parity_column_stride}, int64_t{params.height},
        int64_t{params.width}, int64_t{params.num_chunks}, int64_t{params.out_channels}, int64_t{params.num_patch_rows},
        int64_t{params.num_patch_columns}, int64_t{params.num_column_tiles}, int64_t{params.num_items}}) {
    *numbers++ = number;
  }
}
