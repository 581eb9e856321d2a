// Registers, memory and atomic operations on it.

#ifndef MEMORY_H
#define MEMORY_H

#include <string.h>

#include "floats.h"
#include "types.h"

// Addresses of global memory are virtual: the number of an allocation, plus one, times 2^40, plus an offset. So an
// address that is computed from one allocation's does not get to another by chance.
#define ALLOCATION_BITS 40
#define OFFSET_OF(address) ((address) & (((u64_t)1 << ALLOCATION_BITS) - 1))

static inline u64_t load_number(const u8_t *from, int size) {
  switch (size) {
    case 1: return *from;
    case 2: {
      u16_t x;
      memcpy(&x, from, sizeof x);
      return x;
    }
    case 4: {
      u32_t x;
      memcpy(&x, from, sizeof x);
      return x;
    }
    default: {
      u64_t x;
      memcpy(&x, from, sizeof x);
      return x;
    }
  }
}

static inline void store_number(u8_t *into, int size, u64_t x) {
  switch (size) {
    case 1: *into = (u8_t)x; break;
    case 2: memcpy(into, &x, 2); break;
    case 4: memcpy(into, &x, 4); break;
    default: memcpy(into, &x, 8);
  }
}

static inline u64_t extend_sign(u64_t x, int size) {
  int unused = 64 - 8 * size;
  return (u64_t)((s64_t)(x << unused) >> unused);
}

static inline u64_t get_register(const u8_t *frame, int place, int size, int lane) {
  return load_number(frame + place + lane * size, size);
}

static inline void set_register(u8_t *frame, int place, int size, int lane, u64_t x) {
  store_number(frame + place + lane * size, size, x);
}

static inline void set_predicate(u8_t *frame, int place, int lane, int holds) {
  set_register(frame, place, 4, lane, holds ? ALL_LANES : 0);
}

// ---- Atomic operations, and those that combine lanes

static inline u64_t smaller(u64_t x, u64_t y, int size) {
  return (s64_t)extend_sign(x, size) < (s64_t)extend_sign(y, size) ? x : y;
}

static inline u64_t add_floats(u64_t x, u64_t y, int size) {
  return size == 4 ? bits_of_f32(canonical_f32(f32_of_bits(x) + f32_of_bits(y)))
                   : bits_of_f64(canonical_f64(f64_of_bits(x) + f64_of_bits(y)));
}

static inline u64_t add_flushed(u64_t x, u64_t y) {
  return bits_of_f32(canonical_f32(flush(flush(f32_of_bits(x)) + flush(f32_of_bits(y)))));
}

static inline u16_t add_f16(u16_t x, u16_t y) { return to_f16(from_f16(x) + from_f16(y)); }

static inline u16_t add_bf16(u16_t x, u16_t y) { return to_bf16(from_bf16(x) + from_bf16(y)); }

static u32_t combine_f32(int how, f32_t x, f32_t y) {
  int has_nan = x != x || y != y;
  switch (how) {
    case COMBINE_MIN_NAN: return has_nan ? 0x7FFFFFFF : bits_of_f32(min_f32(x, y));
    case COMBINE_MAX_NAN: return has_nan ? 0x7FFFFFFF : bits_of_f32(max_f32(x, y));
    case COMBINE_MIN_F: return bits_of_f32(canonical_f32(min_f32(x, y)));
    default: return bits_of_f32(canonical_f32(max_f32(x, y)));
  }
}

// What becomes of ``old`` by ``x``; of ``y`` too where it is compared with x and exchanged.
static u64_t combine(int how, int size, u64_t old, u64_t x, u64_t y) {
  switch (how) {
    case COMBINE_ADD: return old + x;
    case COMBINE_MIN_S: return smaller(old, x, size);
    case COMBINE_MAX_S: return smaller(old, x, size) == old ? x : old;
    case COMBINE_MIN_U: return old < x ? old : x;
    case COMBINE_MAX_U: return old > x ? old : x;
    case COMBINE_AND: return old & x;
    case COMBINE_OR: return old | x;
    case COMBINE_XOR: return old ^ x;
    case COMBINE_EXCHANGE: return x;
    case COMBINE_COMPARE: return old == x ? y : old;
    case COMBINE_ADD_F: return add_floats(old, x, size);
    case COMBINE_ADD_FLUSHED: return add_flushed(old, x);
    case COMBINE_ADD_F16: return add_f16(old, x);
    case COMBINE_ADD_BF16: return add_bf16(old, x);
    case COMBINE_ADD_F16X2: return (u32_t)add_f16(old >> 16, x >> 16) << 16 | add_f16(old, x);
    case COMBINE_ADD_BF16X2: return (u32_t)add_bf16(old >> 16, x >> 16) << 16 | add_bf16(old, x);
    default: return combine_f32(how, f32_of_bits(old), f32_of_bits(x));
  }
}

#endif
