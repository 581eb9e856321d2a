// What rules of floats call.

#ifndef FLOATS_H
#define FLOATS_H

#include <math.h>
#include <string.h>

#include "types.h"

static inline f32_t f32_of_bits(u32_t bits) {
  f32_t x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline u32_t bits_of_f32(f32_t x) {
  u32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline f64_t f64_of_bits(u64_t bits) {
  f64_t x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static inline u64_t bits_of_f64(f64_t x) {
  u64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The device's NaN has all bits but the sign.
static inline f32_t canonical_f32(f32_t x) { return x != x ? f32_of_bits(0x7FFFFFFF) : x; }

static inline f64_t canonical_f64(f64_t x) { return x != x ? f64_of_bits(0x7FFFFFFFFFFFFFFF) : x; }

static inline f32_t flush(f32_t x) {
  u32_t bits = bits_of_f32(x);
  return (bits & 0x7F800000) == 0 ? f32_of_bits(bits & 0x80000000) : x;
}

static inline f32_t saturate(f32_t x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// A number instead of a NaN; and -0 is less than +0.
#define DEFINE_MIN_AND_MAX(type)                               \
  static inline type##_t min_##type(type##_t a, type##_t b) {  \
    if (a != a) return b;                                      \
    if (b != b) return a;                                      \
    if (a == b) return signbit(a) ? a : b;                     \
    return a < b ? a : b;                                      \
  }                                                            \
  static inline type##_t max_##type(type##_t a, type##_t b) {  \
    if (a != a) return b;                                      \
    if (b != b) return a;                                      \
    if (a == b) return signbit(a) ? b : a;                     \
    return a > b ? a : b;                                      \
  }
DEFINE_MIN_AND_MAX(f32)
DEFINE_MIN_AND_MAX(f64)

static inline u64_t flush_upper_half(u64_t bits) {
  bits &= 0xFFFFFFFF00000000;
  return (bits & 0x7FF0000000000000) == 0 ? bits & 0x8000000000000000 : bits;
}

static inline f64_t reciprocal_of_upper_half(f64_t x) {
  f64_t reciprocal = 1 / f64_of_bits(flush_upper_half(bits_of_f64(x)));
  return f64_of_bits(flush_upper_half(bits_of_f64(canonical_f64(reciprocal))));
}

// ---- Two floats in one register

static inline f32_t low(u64_t x) { return f32_of_bits((u32_t)x); }

static inline f32_t high(u64_t x) { return f32_of_bits((u32_t)(x >> 32)); }

static inline u64_t pair(f32_t first, f32_t second) {
  return (u64_t)bits_of_f32(canonical_f32(second)) << 32 | bits_of_f32(canonical_f32(first));
}

// ---- Rounding to odd: towards 0, with the last bit set where that is not exact, so that rounding once more, to a
// format with at least two bits less, rounds correctly.

static inline f32_t odd_f32(f64_t x) {
  f32_t nearest = (f32_t)x;
  if (x != x || nearest == x) return nearest;
  u32_t bits = bits_of_f32(nearest);
  if (fabs((f64_t)nearest) > fabs(x)) bits--;
  return f32_of_bits(bits | 1);
}

// The product of two floats of 16 bits is exact in float64; its sum with a third need not be.
static inline f64_t fma_to_odd(f64_t a, f64_t b, f64_t c) {
  f64_t product = a * b, sum = product + c;
  if (!isfinite(sum)) return sum;
  f64_t rest = sum - product;
  f64_t error = (product - (sum - rest)) + (c - rest);
  if (error == 0) return sum;
  u64_t bits = bits_of_f64(sum);
  if (signbit(error) != signbit(sum)) bits--;
  return f64_of_bits(bits | 1);
}

// ---- Floats of 16 bits

static inline f32_t from_bf16(u16_t x) { return f32_of_bits((u32_t)x << 16); }

static inline u16_t to_bf16(f32_t x) {
  u32_t bits = bits_of_f32(x), last = bits >> 16 & 1;
  return x != x ? 0x7FFF : (bits + 0x7FFF + last) >> 16;
}

static inline f32_t from_f16(u16_t x) {
  u32_t sign = (u32_t)(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
  if (exponent == 31) return f32_of_bits(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) return f32_of_bits(sign | bits_of_f32(mantissa * 0x1p-24f));
  return f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

static inline u16_t to_f16(f32_t x) {
  u32_t bits = bits_of_f32(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (x != x) return 0x7FFF;
  if (size >= bits_of_f32(65520)) return sign | 0x7C00;
  if (size < bits_of_f32(0x1p-14f)) {
    // A multiple of 2^-24, the last bit of 1/2, rounded by adding that.
    f32_t sum = f32_of_bits(size) + 0.5f;
    return sign | (bits_of_f32(sum) - bits_of_f32(0.5f));
  }
  u32_t last = size >> 13 & 1;
  size += 0xFFF + last;
  return sign | ((size >> 13) - (112 << 10));
}

#endif
