// Drawing codes for sm_90a: guidance, truncation, draw and confidence of a row of logits by one block, which keeps the row in
// registers. What is computed is stated in hmar_kernels/sampling/reference.py.
//
// Nothing is sorted. Codes are counted in bins of equal width in a table in shared memory; sums over the bins, from above, tell
// which of them has the k-th likeliest code, and the few codes of that bin are compared with each other. The threshold of top-p
// is found in the same way, with masses in the place of counts: integers, so that any order gives the same sum. Where a bin has
// many codes (logits far apart, or equal ones) it is divided again, then by the bits of the floats, ten in a turn.
// A block meets about twelve times in all, where a search by halves, as in sampling/triton.py, meets thirty times.
//
// Read next: sample_rows.h, hopper_ptx.cuh.
#pragma once

#include "hopper_ptx.cuh"
#include "sample_rows.h"

namespace hmar {

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / 32;
constexpr int kBins = 2 * kSampleThreads;  // two a thread
constexpr int kMembers = 128;              // of a bin, that are compared with each other
constexpr int kMassBits = 40;              // a weight of 1 is a mass of 2^40
constexpr int kShareBits = 31;
constexpr int kLimbs = 3, kLimbBits = 14;  // of a mass, added up one by one: shared memory adds words of 32 bits
static_assert(kLimbs * kLimbBits > kMassBits && int64_t{kMaxSampledCodes} << kLimbBits < int64_t{1} << 32);
static_assert(kMembers <= kSampleThreads && kSampleWarps <= 32);
constexpr int kLowestKey = INT32_MIN, kHighestKey = INT32_MAX, kInfiniteKey = 0x7f800000;

// Where a search ends: the last code that is needed of all in order, larger keys first, of equal ones larger codes.
struct Threshold {
  int key, code;
  int64_t reached;  // what the codes up to it amount to
};

// Of the bin in which it lies.
struct FoundBin {
  int bin;
  int64_t above, amount;
};

struct SampleShared {
  uint32_t counts[kBins];  // zero before a search begins
  uint32_t limbs[kLimbs][kBins];
  int64_t sums[kSampleWarps];
  int lowest[kSampleWarps], highest[kSampleWarps];
  int member_keys[kMembers], member_codes[kMembers];
  int64_t member_masses[kMembers];
  int num_members, lowest_member, highest_member;
  FoundBin found;
  Threshold threshold;
};

// Integers that order as the floats do: of a float that is not -0, and back.
__device__ __forceinline__ int key_of(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & kHighestKey);
}
__device__ __forceinline__ float value_of_key(int key) { return __int_as_float(key ^ (key >> 31 & kHighestKey)); }

__device__ __forceinline__ int64_t sum_of_warp(int64_t x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Of the whole block, which meets twice.
__device__ __forceinline__ int64_t sum_of_block(SampleShared& shared, int64_t x) {
  x = sum_of_warp(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = x;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll 2  // more at once spill
  for (int warp = 0; warp < kSampleWarps; ++warp) sum += shared.sums[warp];
  return sum;
}

// What one number for each warp gives, for every thread.
__device__ __forceinline__ int max_of_warps(const int (&of_warps)[kSampleWarps]) {
  const int lane = threadIdx.x % 32;
  return __reduce_max_sync(0xffffffffu, lane < kSampleWarps ? of_warps[lane] : kLowestKey);
}
__device__ __forceinline__ int min_of_warps(const int (&of_warps)[kSampleWarps]) {
  const int lane = threadIdx.x % 32;
  return __reduce_min_sync(0xffffffffu, lane < kSampleWarps ? of_warps[lane] : kHighestKey);
}

// --- noise ---------------------------------------------------------------------------------------------------------

// Four words of Philox4x32-10 (Salmon et al., SC 2011).
struct Words {
  uint32_t word[4];
};
__device__ __forceinline__ Words philox(uint64_t seed, uint32_t group, uint32_t position, uint32_t step) {
  uint32_t c[] = {group, position, step, 0}, key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t old1 = c[1], old3 = c[3];
    c[0] = uint32_t(second >> 32) ^ old1 ^ key0, c[1] = uint32_t(second);
    c[2] = uint32_t(first >> 32) ^ old3 ^ key1, c[3] = uint32_t(first);
    key0 += 0x9E3779B9, key1 += 0xBB67AE85;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Exponential noise of rate 1, rounded as the reference rounds.
__device__ __forceinline__ float exponential_of(uint32_t word) {
  constexpr float kUnit = 1.0f / (int64_t{1} << 32), kMost = 1.0f - 1.0f / (1 << 24);
  const float v = fminf(__fmul_rn(__fadd_rn(__uint2float_rn(word), 0.5f), kUnit), kMost);
  float series = __fadd_rn(0.3333333333333333f, __fmul_rn(v, 0.25f));
  series = __fadd_rn(0.5f, __fmul_rn(v, series));
  series = __fmul_rn(v, __fadd_rn(1.0f, __fmul_rn(v, series)));
  return v < 0.00390625f ? series : -logf(__fsub_rn(1.0f, v));
}

// --- logits --------------------------------------------------------------------------------------------------------

template <LogitType kLogitType>
__device__ __forceinline__ float logit_at(const void* logits, int64_t index) {
  if constexpr (kLogitType == LogitType::kFloat32) {
    return static_cast<const float*>(logits)[index];
  } else {
    constexpr auto kType = kLogitType == LogitType::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
    float value, nothing;
    unpack<kType>(static_cast<const uint16_t*>(logits)[index], value, nothing);
    return value;
  }
}

// Four codes from `code` on, of a token whose logits begin there; zeros beyond the last code.
template <LogitType kLogitType>
__device__ __forceinline__ void load_four(float* x, const void* logits, int64_t begin, int64_t stride, int code, int num_codes,
                                          bool whole) {
  if (whole && code + 4 <= num_codes) {
    if constexpr (kLogitType == LogitType::kFloat32) {
      const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(logits) + begin + code);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
      constexpr auto kType = kLogitType == LogitType::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
      const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(logits) + begin + code);
      unpack<kType>(four.x, x[0], x[1]), unpack<kType>(four.y, x[2], x[3]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = code + j < num_codes ? logit_at<kLogitType>(logits, begin + (code + j) * stride) : 0.0f;
}

__device__ __forceinline__ float weight_of(int key, float top_value) { return expf(__fsub_rn(value_of_key(key), top_value)); }
__device__ __forceinline__ int64_t mass_of(float weight) {
  return static_cast<int64_t>(__fmul_rn(weight, float(int64_t{1} << kMassBits)));
}

// --- truncation ----------------------------------------------------------------------------------------------------

// Which bin a key of [low, top] lies in; larger keys never in lower ones.
struct Bins {
  int low;
  uint32_t span;
  bool by_value;  // equal parts of the values, else of the keys
  float low_value, scale;
  int shift;

  __device__ __forceinline__ Bins(int low, int top, bool by_value)
      : low(low), span(uint32_t(top) - uint32_t(low)), by_value(by_value), low_value(value_of_key(low)) {
    // NOTE: of an infinite distance the scale is 0, and all keys at a finite one share a bin: it is divided by bits.
    scale = fminf(kBins / (value_of_key(top) - low_value), 3.0e38f);
    shift = max(0, 32 - __clz(span) - (31 - __clz(kBins)));
  }
  __device__ __forceinline__ bool hold(int key) const { return uint32_t(key) - uint32_t(low) <= span; }
  __device__ __forceinline__ int bin(int key) const {
    if (!by_value) return (uint32_t(key) - uint32_t(low)) >> shift;
    return static_cast<int>(fminf((value_of_key(key) - low_value) * scale, float(kBins - 1)));
  }
};

// Which code number i of a thread's is.
__device__ __forceinline__ int code_of(int i) { return 4 * (i / 4 * kSampleThreads + int(threadIdx.x)) + i % 4; }

// The threshold with a key in [low, top], for all threads. kMasses: what a code amounts to is its mass; else it is 1, and the
// result's key alone counts. wanted_of: from the sum over [low, top] to the wanted amount, in (0, sum].
template <bool kMasses, int kCodes, class Wanted>
__device__ __forceinline__ Threshold find_threshold(SampleShared& shared, const int (&keys)[kCodes],
                                                    const float (&weights)[kCodes], int low, int top, Wanted wanted_of) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int upper_bin = kBins - 1 - 2 * thread;  // and the one below: earlier threads have what is likelier
  int64_t above = 0, wanted = 0;
#pragma unroll 1
  for (bool first = true;; first = false) {
    const Bins bins(low, top, first);
    if (!first) {
      if constexpr (kMasses) {
        for (int limb = 0; limb < kLimbs; ++limb) shared.limbs[limb][upper_bin] = shared.limbs[limb][upper_bin - 1] = 0;
      } else {
        shared.counts[upper_bin] = shared.counts[upper_bin - 1] = 0;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (!bins.hold(keys[i])) continue;
      const int bin = bins.bin(keys[i]);
      if constexpr (kMasses) {
        const int64_t mass = mass_of(weights[i]);
#pragma unroll
        for (int limb = 0; limb < kLimbs; ++limb) {
          const auto part = static_cast<uint32_t>(mass >> (limb * kLimbBits)) & ((1u << kLimbBits) - 1);
          if (part) atomicAdd(&shared.limbs[limb][bin], part);
        }
      } else {
        atomicAdd(&shared.counts[bin], 1u);
      }
    }
    if (thread == 0) shared.num_members = 0, shared.lowest_member = kHighestKey, shared.highest_member = kLowestKey;
    __syncthreads();

    // what lies in bins above
    int64_t amounts[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (kMasses) {
        amounts[j] = 0;
#pragma unroll
        for (int limb = kLimbs - 1; limb >= 0; --limb) {
          amounts[j] = (amounts[j] << kLimbBits) + shared.limbs[limb][upper_bin - j];
        }
      } else {
        amounts[j] = shared.counts[upper_bin - j];
      }
    }
    const int64_t own = amounts[0] + amounts[1];
    int64_t before = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t of_earlier = __shfl_up_sync(0xffffffffu, before, distance);
      before += lane >= distance ? of_earlier : 0;
    }
    if (lane == 31) shared.sums[warp] = before;
    before -= own;
    __syncthreads();
    int64_t total = 0;
#pragma unroll 2
    for (int other = 0; other < kSampleWarps; ++other) {
      before += other < warp ? shared.sums[other] : 0;
      total += shared.sums[other];
    }
    if (first) wanted = wanted_of(total);
    before += above;
    if (before < wanted && wanted <= before + own) {
      const bool lower = wanted > before + amounts[0];
      shared.found = {upper_bin - lower, lower ? before + amounts[0] : before, lower ? amounts[1] : amounts[0]};
    }
    __syncthreads();

    // the codes of the bin
    const FoundBin found = shared.found;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (!bins.hold(keys[i]) || bins.bin(keys[i]) != found.bin) continue;
      const int member = atomicAdd(&shared.num_members, 1);
      if (member < kMembers) {
        shared.member_keys[member] = keys[i];
        if constexpr (kMasses) shared.member_codes[member] = code_of(i), shared.member_masses[member] = mass_of(weights[i]);
      }
    }
    __syncthreads();
    const int num_members = shared.num_members;
    if (num_members <= kMembers) {
      if (thread < num_members) {
        const int key = shared.member_keys[thread], code = kMasses ? shared.member_codes[thread] : 0;
        int64_t earlier = found.above, reached = found.above;
        for (int other = 0; other < num_members; ++other) {
          const int its_key = shared.member_keys[other];
          if constexpr (kMasses) {
            const bool comes_first = its_key > key || (its_key == key && shared.member_codes[other] > code);
            earlier += comes_first ? shared.member_masses[other] : 0;
          } else {
            earlier += its_key > key, reached += its_key >= key;
          }
        }
        if constexpr (kMasses) reached = earlier + shared.member_masses[thread];
        // Of counted codes those with equal keys write the same.
        if (earlier < wanted && wanted <= reached) shared.threshold = {key, code, reached};
      }
      __syncthreads();
      return shared.threshold;
    }
    if (low == top) {
      if constexpr (!kMasses) {
        __syncthreads();  // all have read how many members there are
        return {low, 0, wanted};
      }
      // Equal codes, of as much each: the largest code from which on there are as many as are needed.
      const int64_t amount = found.amount / num_members, needed = (wanted - found.above + amount - 1) / amount;
      int begin = 0;
      for (int end = kCodes * kSampleThreads; end - begin > 1;) {
        const int middle = begin + (end - begin) / 2;
        int64_t num_tied = 0;
#pragma unroll
        for (int i = 0; i < kCodes; ++i) num_tied += keys[i] == low && code_of(i) >= middle;
        (sum_of_block(shared, num_tied) >= needed ? begin : end) = middle;
      }
      return {low, begin, found.above + needed * amount};
    }
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (!bins.hold(keys[i]) || bins.bin(keys[i]) != found.bin) continue;
      atomicMin(&shared.lowest_member, keys[i]);
      atomicMax(&shared.highest_member, keys[i]);
    }
    __syncthreads();
    low = shared.lowest_member, top = shared.highest_member, above = found.above;
  }
}

// --- the kernel ----------------------------------------------------------------------------------------------------

// Of up to 4 kGroups kSampleThreads codes; a thread has groups of four of them.
template <LogitType kLogitType, int kGroups>
__global__ void __launch_bounds__(kSampleThreads, kGroups > 2 ? 1 : 2)
    sample_rows_kernel(const __grid_constant__ SampleRowsParams params) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<SampleShared*>(shared_memory);
  constexpr int kCodes = 4 * kGroups;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int image = blockIdx.x / params.num_tokens, token = blockIdx.x % params.num_tokens;

  // what does not depend on logits
  for (int bin = thread; bin < kBins; bin += kSampleThreads) {
    if (params.top_k > 0) shared.counts[bin] = 0;
    for (int limb = 0; limb < kLimbs && params.wanted_share > 0; ++limb) shared.limbs[limb][bin] = 0;
  }
  float noise[kCodes];
  if (!params.greedy) {
    const auto seed = static_cast<uint64_t>(params.seeds[image * params.seed_stride]);
    const auto position =
        static_cast<uint32_t>(params.positions[image * params.positions_strides[0] + token * params.positions_strides[1]]);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const Words words = philox(seed, group * kSampleThreads + thread, position, params.step);
#pragma unroll
      for (int j = 0; j < 4; ++j) noise[4 * group + j] = exponential_of(words.word[j]);
    }
  }
  wait_for_previous();

  // guided logits
  float x[kCodes];
  const int64_t begin = image * params.logits_strides[0] + token * params.logits_strides[1];
#pragma unroll
  for (int i = 0; i < kCodes; i += 4) {
    load_four<kLogitType>(x + i, params.logits, begin, params.logits_strides[2], code_of(i), params.num_codes,
                          params.whole_loads);
  }
  if (params.unconditional != nullptr) {
    const float strength = params.guidance[image], factor = __fadd_rn(1.0f, strength);
    const int64_t from = image * params.unconditional_strides[0] + token * params.unconditional_strides[1];
    float u[kCodes];
#pragma unroll
    for (int i = 0; i < kCodes; i += 4) {
      load_four<kLogitType>(u + i, params.unconditional, from, params.unconditional_strides[2], code_of(i), params.num_codes,
                         params.whole_loads);
    }
    // NOTE: every product is rounded, as in the reference: fused ones would order near ties in another way.
#pragma unroll
    for (int i = 0; i < kCodes; ++i) x[i] = __fsub_rn(__fmul_rn(factor, x[i]), __fmul_rn(strength, u[i]));
  }
  int keys[kCodes], low = kHighestKey, top = kLowestKey;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    if (!params.greedy) x[i] = __fmul_rn(x[i], params.inverse_temperature);
    // NOTE: adding 0 makes -0 to 0, which float comparison takes for equal and the order of bits does not.
    keys[i] = key_of(__fadd_rn(x[i], 0.0f));
    if (code_of(i) < params.num_codes) {
      low = min(low, keys[i]), top = max(top, keys[i]);
    } else {
      keys[i] = kLowestKey;
    }
  }
  low = __reduce_min_sync(0xffffffffu, low), top = __reduce_max_sync(0xffffffffu, top);
  if (lane == 0) shared.lowest[warp] = low, shared.highest[warp] = top;
  __syncthreads();
  low = min_of_warps(shared.lowest), top = max_of_warps(shared.highest);

  const auto write = [&](int64_t code, float confidence, bool bad) {
    int64_t place = token;
    if (params.places != nullptr) place = params.places[image * params.places_strides[0] + token * params.places_strides[1]];
    params.codes[image * params.codes_strides[0] + place * params.codes_strides[1]] = code;
    params.confidence[image * params.confidence_strides[0] + place * params.confidence_strides[1]] = confidence;
    if (bad || !params.marks_only) {
      params.nonfinite[image * params.nonfinite_strides[0] + token * params.nonfinite_strides[1]] = bad;
    }
  };
  // Keys of NaN are beyond those of the infinities.
  if (top >= kInfiniteKey || low <= -kInfiniteKey - 1) {
    if (thread == 0) write(0, __int_as_float(0x7fc00000), true);
    return;
  }

  // truncation
  const float top_value = value_of_key(top);
  float weights[kCodes];
#pragma unroll
  for (int i = 0; i < kCodes; ++i) weights[i] = weight_of(keys[i], top_value);
  if (params.top_k > 0) {
    low = find_threshold<false>(shared, keys, weights, low, top, [&](int64_t) { return params.top_k; }).key;
  }
  int64_t total;
  int first_tied = 0;  // of codes at `low`, those from here on are kept
  if (params.wanted_share > 0) {
    const Threshold threshold = find_threshold<true>(shared, keys, weights, low, top, [&](int64_t all) {
      const int64_t rest = (all & ((int64_t{1} << kShareBits) - 1)) * params.wanted_share;
      return (all >> kShareBits) * params.wanted_share + ((rest + (int64_t{1} << kShareBits) - 1) >> kShareBits);
    });
    low = threshold.key, first_tied = threshold.code, total = threshold.reached;
  } else {
    int64_t kept = 0;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) kept += keys[i] >= low ? mass_of(weights[i]) : 0;
    total = sum_of_block(shared, kept);
  }

  // draw: the largest score, and of equal ones the lowest code
  int best = kLowestKey, best_code = 0;
  float best_weight = 0.0f;
#pragma unroll
  for (int i = 0; i < kCodes; ++i) {
    const bool kept = keys[i] > low || (keys[i] == low && code_of(i) >= first_tied);
    const int score = !kept ? kLowestKey : params.greedy ? keys[i] : __float_as_int(__fdiv_rn(weights[i], noise[i]));
    if (score > best) best = score, best_code = code_of(i), best_weight = weights[i];
  }
  const int of_warp = __reduce_max_sync(0xffffffffu, best);
  const int code_of_warp = __reduce_min_sync(0xffffffffu, best == of_warp ? best_code : kHighestKey);
  if (lane == 0) shared.lowest[warp] = code_of_warp, shared.highest[warp] = of_warp;
  __syncthreads();
  const int of_block = max_of_warps(shared.highest);
  const bool leads = lane < kSampleWarps && shared.highest[lane] == of_block;
  const int code = __reduce_min_sync(0xffffffffu, leads ? shared.lowest[lane] : kHighestKey);
  if (best == of_block && best_code == code) {
    write(code, __fdiv_rn(best_weight, __fmul_rn(static_cast<float>(total), 1.0f / (int64_t{1} << kMassBits))), false);
  }
}

}  // namespace hmar
