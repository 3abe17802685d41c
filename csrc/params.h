// What a kernel is told: plain structs, filled by bindings.cpp and passed by value. Next: attention_forward.cuh.
#pragma once

#ifdef __CUDACC_RTC__  // compiled at run time (attention/nvrtc.py), where there are no standard headers
#define INFINITY __int_as_float(0x7f800000)
namespace hmar {
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace hmar
#else
#include <cstdint>
#endif

namespace hmar {

enum class DType : int32_t { kFloat16, kBFloat16 };

// In elements. The last dimension is contiguous; every row starts at a multiple of 16 bytes.
struct Strides {
  int64_t batch, head, row;
};

// Rows of the tile plan: int32 [num_tiles, PLAN_COLUMNS].
enum PlanColumn {
  ROW_BEGIN,   // query rows of the tile
  ROW_END,
  KEY_BEGIN,   // keys that at least one row sees lie in [KEY_BEGIN, KEY_END)
  KEY_END,
  FULL_BEGIN,  // keys in [FULL_BEGIN, FULL_END) are seen by every row
  FULL_END,
  PLAN_COLUMNS,
};

struct AttentionForwardParams {
  const void* q;             // [B, H, Lq, D]
  const void* k;             // [B, H, Lk, D]
  const void* v;             // [B, H, Lk, D]
  void* out;                 // [B, H, Lq, D]
  float* lse;                // [B, H, Lq], contiguous
  const int32_t* key_start;  // [Lq]
  const int32_t* key_end;    // [Lq]
  const int32_t* plan;       // [num_tiles, PLAN_COLUMNS]
  Strides q_strides, k_strides, v_strides, out_strides;
  int32_t batch_size, num_heads, num_queries, num_tiles;
  float scale;               // > 0
};

}  // namespace hmar
