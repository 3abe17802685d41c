// The Python module hmar_kernels._cuda: addresses, strides and the stream come as integers, so that no torch header and
// no torch version is compiled in. Its callers, in hmar_kernels/{attention,blocks,conv2d,linear,sampling}, have checked every
// argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#ifdef HMAR_HOPPER
#include "block_rows.h"
#include "hopper.h"
#include "hopper_conv.h"
#include "linear_rows.h"
#include "sample_rows.h"
#endif
#include "launch.h"

namespace py = pybind11;

namespace {

using StrideTuple = std::array<int64_t, 3>;  // batch, head, row; in elements

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

hmar::Strides strides(const StrideTuple& s) { return {s[0], s[1], s[2]}; }

// Makes a device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string("hmar_kernels._cuda: ") + what + " failed: " + cudaGetErrorName(error) + " (" +
                             cudaGetErrorString(error) + ")");
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

hmar::DType type_of(bool bfloat16) { return bfloat16 ? hmar::DType::kBFloat16 : hmar::DType::kFloat16; }

void attention_forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t key_start,
                       uintptr_t key_end, uintptr_t plan, const StrideTuple& q_strides, const StrideTuple& k_strides,
                       const StrideTuple& v_strides, const StrideTuple& out_strides, int batch_size, int num_heads,
                       int num_queries, int num_tiles, int head_dim, int tile_rows, bool bfloat16, float scale,
                       int device, uintptr_t stream) {
  const hmar::AttentionForwardParams params{
      pointer<const void>(q),
      pointer<const void>(k),
      pointer<const void>(v),
      pointer<void>(out),
      pointer<float>(lse),
      pointer<const int32_t>(key_start),
      pointer<const int32_t>(key_end),
      pointer<const int32_t>(plan),
      strides(q_strides),
      strides(k_strides),
      strides(v_strides),
      strides(out_strides),
      batch_size,
      num_heads,
      num_queries,
      num_tiles,
      scale,
  };
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_attention_forward(params, type_of(bfloat16), head_dim, tile_rows,
                                                    reinterpret_cast<cudaStream_t>(stream)),
                     "attention_forward");
}

#ifdef HMAR_HOPPER
using View = std::pair<uintptr_t, StrideTuple>;  // address and strides

hmar::HopperTensor tensor(const View& view) { return {pointer<const void>(view.first), strides(view.second)}; }

// What every pass is told, in this order: bfloat16, head_dim, batch_size, num_heads, num_queries, num_keys, key_start,
// key_end, scale.
using ShapeTuple = std::tuple<bool, int, int, int, int, int, uintptr_t, uintptr_t, float>;
// Of the plan of the pass: jobs, num_jobs, tail_heads, next_item, set_zero.
using PlanTuple = std::tuple<uintptr_t, int, int, uintptr_t, bool>;

hmar::HopperShape hopper_shape(const ShapeTuple& shape, const PlanTuple& plan) {
  const auto [bfloat16, head_dim, batch_size, num_heads, num_queries, num_keys, key_start, key_end, scale] = shape;
  const auto [jobs, num_jobs, tail_heads, next_item, set_zero] = plan;
  return {type_of(bfloat16),
          head_dim,
          batch_size,
          num_heads,
          num_queries,
          num_keys,
          pointer<const int32_t>(key_start),
          pointer<const int32_t>(key_end),
          pointer<const int32_t>(jobs),
          num_jobs,
          tail_heads,
          pointer<int32_t>(next_item),
          set_zero,
          scale};
}

void hopper_forward(int tile, const ShapeTuple& shape, const PlanTuple& plan, const View& q, const View& k, const View& v,
                    const View& out, uintptr_t lse_log2, uintptr_t head_bounds, float logit_bound, int device,
                    uintptr_t stream) {
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_hopper_forward(tile, hopper_shape(shape, plan), tensor(q), tensor(k), tensor(v),
                                                 tensor(out), pointer<float>(lse_log2), pointer<const float>(head_bounds), logit_bound,
                                                 reinterpret_cast<cudaStream_t>(stream)),
                     "hopper_forward");
}

void hopper_dq(int tile, const ShapeTuple& shape, const PlanTuple& plan, const View& q, const View& k, const View& v,
               const View& out, const View& d_out, uintptr_t lse_log2, uintptr_t d_lse_log2, const View& dq, uintptr_t delta,
               bool overlap, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  DeviceGuard::check(
      hmar::launch_hopper_dq(tile, hopper_shape(shape, plan), tensor(q), tensor(k), tensor(v), tensor(out), tensor(d_out),
                             pointer<const float>(lse_log2), pointer<const float>(d_lse_log2), tensor(dq),
                             pointer<float>(delta), overlap, reinterpret_cast<cudaStream_t>(stream)),
      "hopper_dq");
}

void hopper_dkdv(int tile, const ShapeTuple& shape, const PlanTuple& plan, const View& q, const View& k, const View& v,
                 const View& d_out, uintptr_t lse_log2, uintptr_t delta, const View& dk, const View& dv, int device,
                 uintptr_t stream) {
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_hopper_dkdv(tile, hopper_shape(shape, plan), tensor(q), tensor(k), tensor(v),
                                              tensor(d_out), pointer<const float>(lse_log2), pointer<const float>(delta),
                                              tensor(dk), tensor(dv), reinterpret_cast<cudaStream_t>(stream)),
                     "hopper_dkdv");
}

void hopper_backward(int tile, const ShapeTuple& shape, const PlanTuple& plan, const View& q, const View& k, const View& v,
                     const View& out, const View& d_out, uintptr_t lse_log2, uintptr_t d_lse_log2, const View& dq, const View& dk,
                     const View& dv, uintptr_t statistics, int num_slots, int num_last_heads, int device, uintptr_t stream) {
  const DeviceGuard guard(device);
  DeviceGuard::check(
      hmar::launch_hopper_backward(tile, hopper_shape(shape, plan), tensor(q), tensor(k), tensor(v), tensor(out),
                                   tensor(d_out), pointer<const float>(lse_log2), pointer<const float>(d_lse_log2), tensor(dq),
                                   tensor(dk), tensor(dv), pointer<hmar::RowStatistics>(statistics), num_slots, num_last_heads,
                                   reinterpret_cast<cudaStream_t>(stream)),
      "hopper_backward");
}

// bfloat16, images, height, width, input and output channels.
using ConvShapeTuple = std::tuple<bool, int, int, int, int, int>;

void hopper_conv(int tile, const ConvShapeTuple& shape, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t factors,
                 uintptr_t offsets, uintptr_t residual, uintptr_t shift, uintptr_t out, uintptr_t means, uintptr_t deviations,
                 int device, uintptr_t stream) {
  const auto [bfloat16, num_images, height, width, in_channels, out_channels] = shape;
  const hmar::HopperConvShape conv_shape{bfloat16 ? hmar::DType::kBFloat16 : hmar::DType::kFloat16,
                                         num_images,
                                         height,
                                         width,
                                         in_channels,
                                         out_channels};
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_hopper_conv(tile, conv_shape,
                                              {pointer<const void>(x), pointer<const void>(weight),
                                               pointer<const void>(bias), pointer<const float>(factors),
                                               pointer<const float>(offsets), pointer<const void>(residual),
                                               pointer<const void>(shift)},
                                              {pointer<void>(out), pointer<float>(means), pointer<float>(deviations)},
                                              reinterpret_cast<cudaStream_t>(stream)),
                     "hopper_conv");
}

// Of a norm: statistics of x, scale and shift, their strides, eps; zeros for none.
using RowsNormTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, float>;

void linear_rows(uintptr_t x, const RowsNormTuple& norm, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t gate,
                 uintptr_t y, uintptr_t statistics, int64_t gate_stride, int num_rows, int num_inputs, int num_outputs,
                 int image_rows, bool float_x, bool float_residual, bool gelu, int kernel_rows, bool bfloat16, bool overlap,
                 int device, uintptr_t stream) {
  const auto [x_statistics, scale, shift, scale_stride, shift_stride, eps] = norm;
  const hmar::LinearRows call{type_of(bfloat16),
                              pointer<const void>(x),
                              {pointer<const hmar::TileStatistics>(x_statistics), pointer<const void>(scale),
                               pointer<const void>(shift), scale_stride, shift_stride, eps},
                              pointer<const void>(weight),
                              pointer<const void>(bias),
                              pointer<const void>(residual),
                              pointer<const void>(gate),
                              pointer<void>(y),
                              pointer<hmar::TileStatistics>(statistics),
                              gate_stride,
                              num_rows,
                              num_inputs,
                              num_outputs,
                              image_rows,
                              float_x,
                              float_residual,
                              gelu};
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_linear_rows(call, kernel_rows, overlap, reinterpret_cast<cudaStream_t>(stream)),
                     "linear_rows");
}

void norm_rows(uintptr_t x, uintptr_t scale, uintptr_t shift, uintptr_t h, int64_t scale_stride, int64_t shift_stride,
               int num_rows, int num_inputs, int image_rows, float eps, bool float_x, bool bfloat16, bool overlap,
               int device, uintptr_t stream) {
  const hmar::NormRowsParams params{
      pointer<const void>(x), pointer<const void>(scale), pointer<const void>(shift), pointer<void>(h), scale_stride,
      shift_stride,           num_inputs,                 image_rows,                 eps,              float_x,
  };
  const DeviceGuard guard(device);
  DeviceGuard::check(
      hmar::launch_norm_rows(params, type_of(bfloat16), num_rows, overlap, reinterpret_cast<cudaStream_t>(stream)),
      "norm_rows");
}

// Addresses of a block's qkv, proj, fc1 and fc2, of their biases, and of q_bias, v_bias and log_scale.
using BlockTuple = std::array<uintptr_t, 2 * hmar::NUM_BLOCK_LAYERS + 3>;

// What lies where `block_rows` is told that the table is.
py::bytes describe_blocks(const std::vector<BlockTuple>& blocks, int width, int hidden_width, bool bfloat16, int device) {
  const DeviceGuard guard(device);
  std::vector<hmar::BlockWeights> table(blocks.size());
  for (size_t i = 0; i < blocks.size(); ++i) {
    hmar::BlockTensors tensors;
    for (int layer = 0; layer < hmar::NUM_BLOCK_LAYERS; ++layer) {
      tensors.weights[layer] = pointer<const void>(blocks[i][layer]);
      tensors.biases[layer] = pointer<const void>(blocks[i][hmar::NUM_BLOCK_LAYERS + layer]);
    }
    const auto* rest = blocks[i].data() + 2 * hmar::NUM_BLOCK_LAYERS;
    tensors.q_bias = pointer<const float>(rest[0]), tensors.v_bias = pointer<const float>(rest[1]);
    tensors.log_scale = pointer<const float>(rest[2]);
    DeviceGuard::check(hmar::describe_block(&table[i], type_of(bfloat16), tensors, width, hidden_width), "describe_blocks");
  }
  return py::bytes(reinterpret_cast<const char*>(table.data()), table.size() * sizeof(hmar::BlockWeights));
}

void block_rows(uintptr_t table, const std::vector<std::array<uintptr_t, hmar::NUM_BLOCK_VECTORS>>& vectors, uintptr_t x,
                uintptr_t y, uintptr_t statistics, uintptr_t between, uintptr_t counters, int64_t vector_stride,
                float max_log_scale, float eps, int num_rows, int image_rows, int width, int hidden_width, int kernel_rows,
                bool bfloat16, int device, uintptr_t stream) {
  if (vectors.size() > hmar::kMaxRowBlocks) throw std::runtime_error("block_rows: more blocks than a launch takes");
  hmar::BlockRowsParams params{};
  params.weights = pointer<const hmar::BlockWeights>(table);
  for (size_t i = 0; i < vectors.size(); ++i) {
    for (int j = 0; j < hmar::NUM_BLOCK_VECTORS; ++j) params.vectors[i][j] = pointer<const void>(vectors[i][j]);
  }
  params.x = pointer<const float>(x), params.y = pointer<float>(y);
  params.statistics = pointer<hmar::TileStatistics>(statistics);
  params.qkv = pointer<void>(between), params.hidden = pointer<void>(between + 2 * uintptr_t(3 * width) * num_rows);
  params.counters = pointer<int32_t>(counters);
  params.vector_stride = vector_stride, params.max_log_scale = max_log_scale, params.eps = eps;
  params.num_rows = num_rows, params.image_rows = image_rows, params.num_blocks = int(vectors.size());
  params.width = width, params.hidden_width = hidden_width;
  const DeviceGuard guard(device);
  DeviceGuard::check(hmar::launch_block_rows(params, type_of(bfloat16), kernel_rows, reinterpret_cast<cudaStream_t>(stream)),
                     "block_rows");
}

// addresses: logits, unconditional, guidance, seeds, positions, places, codes, confidence, nonfinite; 0 where there is none.
// row_strides: of the first two; strides: of the last five; all in elements.
void sample_rows(const std::array<uintptr_t, 9>& addresses, const std::array<std::array<int64_t, 3>, 2>& row_strides,
                 int64_t seed_stride, const std::array<std::array<int64_t, 2>, 5>& strides, const std::array<int, 3>& shape,
                 int logit_type, int step, float inverse_temperature, int top_k, int64_t wanted_share, bool greedy,
                 bool marks_only, bool whole_loads, bool overlap, int device, uintptr_t stream) {
  const auto [logits, unconditional, guidance, seeds, positions, places, codes, confidence, nonfinite] = addresses;
  hmar::SampleRowsParams params{};
  params.logits = pointer<const void>(logits), params.unconditional = pointer<const void>(unconditional);
  params.guidance = pointer<const float>(guidance), params.seeds = pointer<const int64_t>(seeds);
  params.positions = pointer<const int64_t>(positions), params.places = pointer<const int64_t>(places);
  params.codes = pointer<int64_t>(codes), params.confidence = pointer<float>(confidence);
  params.nonfinite = pointer<bool>(nonfinite);
  std::copy(row_strides[0].begin(), row_strides[0].end(), params.logits_strides);
  std::copy(row_strides[1].begin(), row_strides[1].end(), params.unconditional_strides);
  int64_t* const of_rows[] = {params.positions_strides, params.places_strides, params.codes_strides, params.confidence_strides,
                              params.nonfinite_strides};
  for (size_t i = 0; i < strides.size(); ++i) std::copy(strides[i].begin(), strides[i].end(), of_rows[i]);
  params.seed_stride = seed_stride;
  params.num_images = shape[0], params.num_tokens = shape[1], params.num_codes = shape[2];
  params.step = step, params.inverse_temperature = inverse_temperature, params.top_k = top_k;
  params.wanted_share = wanted_share, params.greedy = greedy, params.marks_only = marks_only;
  params.whole_loads = whole_loads;
  const DeviceGuard guard(device);
  DeviceGuard::check(
      hmar::launch_sample_rows(params, hmar::LogitType(logit_type), overlap, reinterpret_cast<cudaStream_t>(stream)),
      "sample_rows");
}

// (doubled, blocks, stages, map stages) of each kernel.
py::list hopper_conv_tiles() {
  py::list rows;
  for (const auto& kernel : hmar::hopper_conv_kernels()) {
    rows.append(py::make_tuple(kernel.doubled, kernel.blocks, kernel.stages, kernel.map_stages));
  }
  return rows;
}

// (head dim, warpgroups, columns a block, stages, row stages, overlap, blocks an SM) of each kernel of a pass.
py::list hopper_tiles(const std::vector<hmar::HopperTile>& tiles) {
  py::list rows;
  for (const auto& tile : tiles) {
    rows.append(py::make_tuple(tile.head_dim, tile.groups, tile.block_cols, tile.stages, tile.row_stages, tile.overlap,
                               tile.blocks_per_sm));
  }
  return rows;
}

std::string hopper_load_error(int device) {
  const DeviceGuard guard(device);
  const cudaError_t error = hmar::load_hopper();
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

void bind_hopper(py::module_& module) {
  module.attr("hopper_forward_tiles") = hopper_tiles(hmar::hopper_forward_tiles());
  module.attr("hopper_dq_tiles") = hopper_tiles(hmar::hopper_dq_tiles());
  module.attr("hopper_dkdv_tiles") = hopper_tiles(hmar::hopper_dkdv_tiles());
  module.attr("hopper_backward_tiles") = hopper_tiles(hmar::hopper_backward_tiles());
  module.def("hopper_forward", &hopper_forward);
  module.def("hopper_dq", &hopper_dq);
  module.def("hopper_dkdv", &hopper_dkdv);
  module.def("hopper_backward", &hopper_backward);
  module.attr("hopper_conv_tiles") = hopper_conv_tiles();
  module.def("hopper_conv", &hopper_conv);
  module.attr("linear_rows_kernels") = py::cast(hmar::linear_rows_kernels());
  module.def("linear_rows", &linear_rows, py::kw_only(), py::arg("x"), py::arg("norm"), py::arg("weight"), py::arg("bias"),
             py::arg("residual"), py::arg("gate"), py::arg("y"), py::arg("statistics"), py::arg("gate_stride"),
             py::arg("num_rows"), py::arg("num_inputs"), py::arg("num_outputs"), py::arg("image_rows"), py::arg("float_x"),
             py::arg("float_residual"), py::arg("gelu"), py::arg("kernel_rows"), py::arg("bfloat16"), py::arg("overlap"),
             py::arg("device"), py::arg("stream"), "Puts a linear layer of few rows on a stream.");
  module.def("norm_rows", &norm_rows, py::kw_only(), py::arg("x"), py::arg("scale"), py::arg("shift"), py::arg("h"),
             py::arg("scale_stride"), py::arg("shift_stride"), py::arg("num_rows"), py::arg("num_inputs"),
             py::arg("image_rows"), py::arg("eps"), py::arg("float_x"), py::arg("bfloat16"), py::arg("overlap"),
             py::arg("device"), py::arg("stream"), "Puts the norm of a few rows on a stream.");
  module.attr("block_rows_kernels") = py::cast(hmar::block_rows_kernels());
  module.def("describe_blocks", &describe_blocks, py::kw_only(), py::arg("blocks"), py::arg("width"), py::arg("hidden_width"),
             py::arg("bfloat16"), py::arg("device"), "Weights of transformer blocks as block_rows reads them.");
  module.def("block_rows", &block_rows, py::kw_only(), py::arg("table"), py::arg("vectors"), py::arg("x"), py::arg("y"),
             py::arg("statistics"), py::arg("between"), py::arg("counters"), py::arg("vector_stride"),
             py::arg("max_log_scale"), py::arg("eps"), py::arg("num_rows"), py::arg("image_rows"), py::arg("width"),
             py::arg("hidden_width"), py::arg("kernel_rows"), py::arg("bfloat16"), py::arg("device"), py::arg("stream"),
             "Puts transformer blocks of few rows on a stream.");
  module.attr("max_sampled_codes") = hmar::kMaxSampledCodes;
  module.def("sample_rows", &sample_rows, py::kw_only(), py::arg("addresses"), py::arg("row_strides"), py::arg("seed_stride"),
             py::arg("strides"), py::arg("shape"), py::arg("logit_type"), py::arg("step"), py::arg("inverse_temperature"),
             py::arg("top_k"), py::arg("wanted_share"), py::arg("greedy"), py::arg("marks_only"), py::arg("whole_loads"),
             py::arg("overlap"), py::arg("device"), py::arg("stream"), "Puts the drawing of codes on a stream.");
  module.def("hopper_load_error", &hopper_load_error, py::arg("device"),
             "Why this build's sm_90a kernels cannot run on a device; empty when they can.");
}
#endif

std::string load_error(int device) {
  const DeviceGuard guard(device);
  const cudaError_t error = hmar::load_attention_forward();
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of hmar_kernels; call them through its operators.";
  module.attr("__version__") = HMAR_VERSION;
  module.attr("architectures") = HMAR_ARCHITECTURES;
  module.attr("cuda_version") =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  py::dict tiles;
  for (const auto& tile : hmar::attention_forward_tiles()) {
    tiles[py::make_tuple(tile.head_dim, tile.tile_rows)] = tile.block_keys;
  }
  module.attr("attention_forward_tiles") = tiles;
  module.def("attention_forward", &attention_forward, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("out"), py::arg("lse"), py::arg("key_start"), py::arg("key_end"), py::arg("plan"),
             py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("out_strides"),
             py::arg("batch_size"), py::arg("num_heads"), py::arg("num_queries"), py::arg("num_tiles"),
             py::arg("head_dim"), py::arg("tile_rows"), py::arg("bfloat16"), py::arg("scale"), py::arg("device"),
             py::arg("stream"), "Puts the forward kernel on a stream; raises RuntimeError when the launch fails.");
#ifdef HMAR_HOPPER
  bind_hopper(module);
#endif
  module.def("load_error", &load_error, py::arg("device"),
             "Why this build cannot run on a device (no code for its architecture, ...); empty when it can.");
}
