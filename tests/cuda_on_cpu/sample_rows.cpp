// Runs csrc/sample_rows.cuh, as it stands, on the CPU; test_sampling.py loads this through ctypes.
#define HMAR_ON_CPU
#include "sample_rows.cuh"

#include <utility>

using namespace hmar;

namespace {

// What the kernel before writes.
struct Piece {
  uint8_t* begin;
  int64_t bytes;
};

template <LogitType kLogits>
void run(const SampleRowsParams& params, int groups) {
  if (groups == 2) {
    sample_rows_kernel<kLogits, 2>(params);
  } else {
    sample_rows_kernel<kLogits, 4>(params);
  }
}

}  // namespace

// Null, or what went wrong. groups: 2 or 4, of four codes a thread.
extern "C" const char* sample_rows_on_cpu(const SampleRowsParams* params, LogitType type, int groups, const Piece* pieces,
                                          int num_pieces, bool last_thread_first) {
  static Cluster cluster;
  cluster.failure.clear();
  cluster.previous.clear();
  for (int i = 0; i < num_pieces; ++i) {
    cluster.previous.push_back({pieces[i].begin, {pieces[i].begin, pieces[i].begin + pieces[i].bytes}});
  }
  cluster.kernel = [=] {
    if (type == LogitType::kFloat16) run<LogitType::kFloat16>(*params, groups);
    if (type == LogitType::kBFloat16) run<LogitType::kBFloat16>(*params, groups);
    if (type == LogitType::kFloat32) run<LogitType::kFloat32>(*params, groups);
  };
  for (int row = 0; row < params->num_images * params->num_tokens && cluster.failure.empty(); ++row) {
    run_cluster(cluster, row, 1, kSampleThreads, sizeof(SampleShared), {last_thread_first, last_thread_first});
  }
  return cluster.failure.empty() ? nullptr : cluster.failure.c_str();
}
