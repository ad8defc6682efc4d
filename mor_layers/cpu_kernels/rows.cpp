// What layers do to each row between their matrix products, in one pass over memory each.

#include <cmath>

#include "numbers.h"

namespace {

constexpr int64_t kWorthThreads = 1 << 16;  // numbers; starting threads costs as much as fewer take

// silu(x) * y
inline float gated(float x, float y) {
  const float e = exp_of(-std::fabs(x));
  return (x < 0.0f ? e : 1.0f) / (1.0f + e) * x * y;
}

template <typename Number>
void swiglu(const Number* gate, const Number* up, Number* out, int64_t num_rows, int64_t size,
            int64_t gate_stride, int64_t up_stride, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= kWorthThreads)
  for (int64_t r = 0; r < num_rows; ++r) {
    const Number *const x = gate + r * gate_stride, *const y = up + r * up_stride;
    Number* const to = out + r * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) put(to[i], gated(number(x[i]), number(y[i])));
  }
}

// A row has `num_heads` heads; all of them turn by the same angles.
template <typename Number>
void rotate(const Number* heads, const Number* cos, const Number* sin, Number* out,
            int64_t num_rows, int64_t num_heads, int64_t size, int64_t row_stride,
            int64_t num_threads) {
  const int64_t half = size / 2;
#pragma omp parallel for num_threads(num_threads) if (num_rows * num_heads * size >= kWorthThreads)
  for (int64_t r = 0; r < num_rows; ++r) {
    const Number *const c = cos + r * size, *const s = sin + r * size;
    for (int64_t h = 0; h < num_heads; ++h) {
      const Number* const x = heads + r * row_stride + h * size;
      Number* const to = out + (r * num_heads + h) * size;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float first = number(x[i]), second = number(x[half + i]);
        put(to[i], first * number(c[i]) + second * number(s[i]));
        put(to[half + i], second * number(c[half + i]) + first * number(s[half + i]));
      }
    }
  }
}

template <typename Number>
void rms_norm(const Number* rows, const Number* weight, Number* out, int64_t num_rows, int64_t size,
              int64_t stride, int64_t num_threads, float epsilon) {
#pragma omp parallel for num_threads(num_threads) if (num_rows * size >= kWorthThreads)
  for (int64_t r = 0; r < num_rows; ++r) {
    const Number* const x = rows + r * stride;
    Number* const to = out + r * size;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += number(x[i]) * number(x[i]);
    const float factor = 1.0f / std::sqrt(sum / size + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) put(to[i], number(x[i]) * factor * number(weight[i]));
  }
}

// Run a kernel for numbers of a format.
template <typename Run>
void in_format(int64_t format, Run run) {
  format == kFloat ? run(float{}) : run(BFloat16{});
}

}  // namespace

extern "C" {

void mor_swiglu(int64_t format, const void* gate, const void* up, void* out, int64_t num_rows,
                int64_t size, int64_t gate_stride, int64_t up_stride, int64_t num_threads) {
  in_format(format, [&]<typename T>(T) {
    swiglu((const T*)gate, (const T*)up, (T*)out, num_rows, size, gate_stride, up_stride,
           num_threads);
  });
}

void mor_rotate(int64_t format, const void* heads, const void* cos, const void* sin, void* out,
                int64_t num_rows, int64_t num_heads, int64_t size, int64_t row_stride,
                int64_t num_threads) {
  in_format(format, [&]<typename T>(T) {
    rotate((const T*)heads, (const T*)cos, (const T*)sin, (T*)out, num_rows, num_heads, size,
           row_stride, num_threads);
  });
}

void mor_rms_norm(int64_t format, const void* rows, const void* weight, void* out, int64_t num_rows,
                  int64_t size, int64_t stride, int64_t num_threads, float epsilon) {
  in_format(format, [&]<typename T>(T) {
    rms_norm((const T*)rows, (const T*)weight, (T*)out, num_rows, size, stride, num_threads,
             epsilon);
  });
}

}  // extern "C"
