// What rules of integers call.

#ifndef INTEGERS_H
#define INTEGERS_H

#include "types.h"

static inline u64_t low_bits(u32_t length) { return length >= 64 ? ~(u64_t)0 : ((u64_t)1 << length) - 1; }

static inline u64_t extract_unsigned(u64_t a, u32_t at, u32_t length, u32_t bits) {
  return at >= bits ? 0 : a >> at & low_bits(length);
}

// The sign is that of the last bit, or of the whole number where the field reaches over its end.
static inline u64_t extract_signed(s64_t a, u32_t at, u32_t length, u32_t bits) {
  if (length == 0) return 0;
  u32_t last = at + length - 1 < bits - 1 ? at + length - 1 : bits - 1;
  u32_t kept = at >= bits ? 0 : bits - at < length ? bits - at : length;
  u64_t field = kept ? (u64_t)a >> at & low_bits(kept) : 0;
  u64_t sign = a >> last & 1;
  return sign ? field | ~low_bits(kept) : field;
}

static inline u64_t insert_bits(u64_t a, u64_t b, u32_t at, u32_t length, u32_t bits) {
  if (at >= bits) return b;
  u64_t mask = low_bits(length) << at;
  return (b & ~mask) | (a << at & mask);
}

static inline u64_t reverse_bits(u64_t a) {
  u64_t reversed = 0;
  for (int k = 0; k < 64; k++) reversed |= (a >> k & 1) << (63 - k);
  return reversed;
}

static inline u32_t permute_bytes(u32_t a, u32_t b, u32_t selectors) {
  u64_t bytes = (u64_t)b << 32 | a;
  u32_t result = 0;
  for (int k = 0; k < 4; k++) {
    u32_t selector = selectors >> 4 * k & 15;
    u32_t byte = bytes >> 8 * (selector & 7) & 255;
    if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign in every bit
    result |= byte << 8 * k;
  }
  return result;
}

static inline u32_t look_up(u32_t a, u32_t b, u32_t c, u32_t table) {
  u32_t result = 0;
  for (int k = 0; k < 8; k++)
    if (table >> k & 1) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  return result;
}

#endif
