// Numbers and vectors that all kernels share.

#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace {

// Formats of numbers in memory, as `capability.py` counts them.
enum Format : int64_t { kFloat, kBFloat16, kInt8, kFp8 };

struct BFloat16 {
  uint16_t bits;
};
struct Fp8 {
  uint8_t bits;
};

inline float number(float x) { return x; }
inline float number(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float number(int8_t x) { return x; }
inline float number(Fp8 x) {  // E4M3, whose exponents are 120 less than those of fp32
  const uint32_t magnitude = x.bits & 0x7f, sign = x.bits & 0x80;
  return std::bit_cast<float>(sign << 24 | magnitude << 20) * 0x1p120f;
}

inline void put(float& to, float x) { to = x; }
inline void put(BFloat16& to, float x) {  // to the nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = x == x ? rounded : 0x7fc0;
}

// exp(x) of x <= 0, to 2 units in the last place (the polynomial of Cephes).
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  constexpr int32_t kRounds = 0x4b400000;  // the bits of 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + std::bit_cast<float>(kRounds);
  const float whole = shifted - std::bit_cast<float>(kRounds);
  const float r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(shifted) - kRounds + 127) << 23);
}

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
// Of so many numbers, the compiler makes vector instructions of the processor at hand.
typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float UnalignedVec __attribute__((vector_size(4 * kWidth), aligned(4)));

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }

}  // namespace
