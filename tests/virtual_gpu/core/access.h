// Instructions that access memory.

#ifndef ACCESS_H
#define ACCESS_H

#include "checks.h"

// What a load out of bounds brings.
#define NOTHING_THERE 0xA5A5A5A5A5A5A5A5u
#define MAX_ACCESS 64  // bytes of one lane

static inline int covers(u64_t low, u64_t high, u64_t offset, int bytes) {
  return offset >= low && offset + bytes <= high;
}

// Which memory a virtual address stands for, and of which allocation; NULL where it stands for none.
static u8_t *find_global(const Context *c, int lane, u64_t address, int bytes, Allocation **found) {
  Launch *s = c->launch;
  u64_t number = (address >> ALLOCATION_BITS) - 1, offset = OFFSET_OF(address);
  Allocation *a = number < (u64_t)s->num_allocations ? &s->allocations[number] : NULL;
  if (!a || !covers(a->low, a->high, offset, bytes)) {
    report(c, KIND_OUT_OF_BOUNDS, lane, address, bytes, 0);
    return NULL;
  }
  int within = 0;
  for (int k = 0; k < a->num_views && !within; k++) within = covers(a->views[k].low, a->views[k].high, offset, bytes);
  if (!within) report(c, KIND_OUTSIDE_VIEW, lane, address, bytes, 0);
  if (address & (bytes - 1)) report(c, KIND_MISALIGNED, lane, address, bytes, 0);
  *found = a;
  return a->memory + (offset - a->low);
}

static u8_t *find_shared(const Context *c, int lane, u64_t address, int bytes) {
  if (address + bytes > (u64_t)c->launch->shared_size) {
    report(c, KIND_SHARED_BOUNDS, lane, address, bytes, 0);
    return NULL;
  }
  if (address & (bytes - 1)) report(c, KIND_MISALIGNED, lane, address, bytes, 0);
  return c->cta->shared + address;
}

static u8_t *find_param(const Context *c, int lane, u64_t address, int bytes) {
  if (address + bytes > (u64_t)c->launch->params_size) {
    report(c, KIND_PARAM_BOUNDS, lane, address, bytes, 0);
    return NULL;
  }
  return (u8_t *)c->launch->params + address;
}

static void load(const Instruction *i, u8_t *frame, int lane, const u8_t *memory) {
  for (int k = 0; k < i->num_parts; k++) {
    if (i->parts[k] < 0) continue;
    u64_t x = memory ? load_number(memory + k * i->size, i->size) : NOTHING_THERE;
    if (i->is_signed) x = extend_sign(x, i->size);
    set_register(frame, i->parts[k], i->register_size, lane, x);
  }
}

static void update(const Instruction *i, u8_t *frame, int lane, u8_t *memory) {
  u64_t old = load_number(memory, i->size), x = get_register(frame, i->b, i->register_size, lane);
  u64_t y = i->c >= 0 ? get_register(frame, i->c, i->register_size, lane) : 0;
  store_number(memory, i->size, combine(i->how, i->size, old, x, y));
  if (i->d >= 0) set_register(frame, i->d, i->register_size, lane, old);
}

// One lane after the other, as the device too brings their atomic operations into some order.
static void access_memory(const Context *c, const Instruction *i, u32_t mask) {
  Launch *s = c->launch;
  u8_t *frame = c->warp->frame;
  int bytes = i->size * i->num_parts;
  u64_t addresses[32];
  LANES_IN(mask) {
    u64_t address = get_register(frame, i->a, i->address_size, l) + i->offset;
    addresses[l] = i->space == SPACE_SHARED ? (u32_t)address : address;
  }
  LANES_IN(mask) {
    u64_t address = addresses[l];
    Allocation *a = NULL;
    u8_t *memory = i->space == SPACE_GLOBAL   ? find_global(c, l, address, bytes, &a)
                   : i->space == SPACE_SHARED ? find_shared(c, l, address, bytes)
                                              : find_param(c, l, address, bytes);
    u8_t value[MAX_ACCESS];
    if (i->op == OP_STORE)
      for (int k = 0; k < i->num_parts; k++)
        store_number(value + k * i->size, i->size, get_register(frame, i->parts[k], i->register_size, l));
    if (memory && i->space == SPACE_SHARED && s->flags & FLAG_CHECK) note_shared(c, i->op, l, address, bytes, value);
    if (a && s->flags & FLAG_CHECK) note_global(c, a, i->op, l, address, bytes, memory, value);
    if (a && s->flags & FLAG_COUNT) {
      note_sectors(a, i->op, address, bytes);
      if (i->op == OP_ATOMIC) count_atomics(a, address, bytes);
    }
    if (i->op == OP_LOAD) load(i, frame, l, memory);
    else if (memory && i->op == OP_STORE) memcpy(memory, value, bytes);
    else if (memory) update(i, frame, l, memory);
  }
  if (i->space == SPACE_GLOBAL && s->flags & FLAG_COUNT) {
    Count *count = &s->counts[c->place];
    count_sectors(count, addresses, mask, bytes);
    if (i->op == OP_ATOMIC) count_clashes(count, addresses, mask);
  }
}

// Matrices of eight rows of eight numbers of 16 bits, whose rows' addresses come from eight lanes each. A lane holds
// two neighbours of a row, or of a column where they are transposed.
static void move_matrices(const Context *c, const Instruction *i) {
  u8_t *frame = c->warp->frame;
  int loads = i->op == OP_LOAD_MATRICES, transposed = i->how;
  for (int matrix = 0; matrix < i->num_parts; matrix++)
    for (int lane = 0; lane < 32; lane++)
      for (int half = 0; half < 2; half++) {
        int first = lane / 4, second = lane % 4 * 2 + half;
        int row = transposed ? second : first, column = transposed ? first : second;
        u64_t base = get_register(frame, i->a, 4, 8 * matrix + row);
        u64_t address = (u32_t)(base + i->offset) + 2 * column;
        u8_t *number = frame + i->parts[matrix] + 4 * lane + 2 * half;
        u8_t *memory = find_shared(c, lane, address, 2);
        if (!memory) continue;
        if (c->launch->flags & FLAG_CHECK) note_shared(c, loads ? OP_LOAD : OP_STORE, lane, address, 2, number);
        if (loads) memcpy(number, memory, 2);
        else memcpy(memory, number, 2);
      }
}

#endif
