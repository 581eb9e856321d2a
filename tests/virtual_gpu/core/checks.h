// Reports of what is wrong, and how it is found out: of each granule of global memory and each cell of shared memory is
// kept who accessed it last.

#ifndef CHECKS_H
#define CHECKS_H

#include "memory.h"

#define REPORTS_OF_A_PLACE 3

static void report(const Context *c, int kind, u32_t lane, u64_t address, u64_t detail, u32_t other) {
  Launch *s = c->launch;
  s->kinds[kind]++;
  int same = 0;
  for (int k = 0; k < s->num_reports; k++) same += s->reports[k].kind == kind && s->reports[k].place == c->place;
  if (same < REPORTS_OF_A_PLACE && s->num_reports < s->max_reports)
    s->reports[s->num_reports++] =
        (Report){kind, c->place, c->cta->number, c->warp_number, lane, other, address, detail};
}

// ---- Global memory

// When a warp does something: the epoch of its CTA, and which warp. SEVERAL stands for several CTAs or warps.
#define SEVERAL 0xFFFFFFFFu
#define WARP_BITS 7
#define SEVERAL_WARPS ((1u << WARP_BITS) - 1)

static inline u32_t now(const Context *c) {
  return (c->cta->epoch - c->cta->first_epoch) << WARP_BITS | c->warp_number;
}

// Whether nothing orders an earlier access and one of this CTA now: they are of different CTAs, or of different warps
// with no barrier between.
static inline int unordered(Access earlier, u32_t cta, u32_t when) {
  if (earlier.cta == 0) return 0;
  if (earlier.cta != cta) return 1;
  return earlier.when >> WARP_BITS == when >> WARP_BITS && earlier.when != when;
}

static inline void remember(Access *access, u32_t cta, u32_t when) {
  if (access->cta == cta) {
    int other_warp = access->when >> WARP_BITS == when >> WARP_BITS && access->when != when;
    access->when = other_warp ? when | SEVERAL_WARPS : when;
  } else if (access->cta == 0) {
    *access = (Access){cta, when};
  } else {
    access->cta = SEVERAL;
  }
}

// What kind of earlier access a race is with.
enum { WITH_WRITE = 1, WITH_READ, WITH_ATOMIC };

static void note_global(const Context *c, Allocation *a, int op, int lane, u64_t address, int bytes,
                        const u8_t *memory, const u8_t *value) {
  u32_t cta = c->cta->number + 1, when = now(c), other = 0;
  u64_t store = c->launch->issued * 32 + lane;
  int race = 0, clash = 0;
  u64_t from = OFFSET_OF(address) - a->granules_from;
  for (u64_t k = from >> a->granule_shift; k <= (from + bytes - 1) >> a->granule_shift; k++) {
    Granule *g = &a->granules[k];
    if (unordered(g->write, cta, when)) race = WITH_WRITE, other = g->write.cta;
    if (op != OP_LOAD && unordered(g->read, cta, when)) race = WITH_READ, other = g->read.cta;
    if (op != OP_ATOMIC && unordered(g->atomic, cta, when)) race = WITH_ATOMIC, other = g->atomic.cta;
    if (op == OP_LOAD) {
      remember(&g->read, cta, when);
    } else if (op == OP_ATOMIC) {
      remember(&g->atomic, cta, when);
    } else {
      clash |= g->store / 32 == store / 32 && g->store != store;
      g->write = (Access){cta, when};
      g->store = store;
    }
  }
  if (!race && !clash) return;
  int same = op == OP_STORE && !memcmp(memory, value, bytes);
  if (race) report(c, same ? KIND_SAME_VALUE_GLOBAL : KIND_GLOBAL_RACE, lane, address, race, other - 1);
  if (clash && !same) report(c, KIND_LANE_CLASH, lane, address, bytes, 0);
}

static void count_atomics(Allocation *a, u64_t address, int bytes) {
  u64_t from = OFFSET_OF(address) - a->granules_from;
  for (u64_t k = from >> a->granule_shift; k <= (from + bytes - 1) >> a->granule_shift; k++) a->granules[k].atomics++;
}

static void note_sectors(Allocation *a, int op, u64_t address, int bytes) {
  u64_t from = OFFSET_OF(address) - a->granules_from;
  for (u64_t k = from / 32; k <= (from + bytes - 1) / 32; k++) {
    if (op != OP_STORE) a->sectors[k] |= SECTOR_READ;
    if (op != OP_LOAD) a->sectors[k] |= SECTOR_WRITTEN;
  }
}

static int add_to_set(u64_t *set, int size, u64_t x) {
  for (int k = size - 1; k >= 0; k--)
    if (set[k] == x) return size;
  set[size] = x;
  return size + 1;
}

// An access of a lane has 32 bytes at most, and so touches two sectors at most.
static void count_sectors(Count *count, const u64_t *addresses, u32_t mask, int bytes) {
  u64_t sectors[64], lines[64];
  int num_sectors = 0, num_lines = 0;
  LANES_IN(mask) {
    u64_t first = addresses[l] / 32, last = (addresses[l] + bytes - 1) / 32;
    for (u64_t sector = first; sector <= last; sector++) {
      num_sectors = add_to_set(sectors, num_sectors, sector);
      num_lines = add_to_set(lines, num_lines, sector / 4);
    }
  }
  count->sectors += num_sectors;
  count->lines += num_lines;
}

static void count_clashes(Count *count, const u64_t *addresses, u32_t mask) {
  u64_t different[32];
  int num_different = 0;
  LANES_IN(mask) num_different = add_to_set(different, num_different, addresses[l]);
  count->clashes += __builtin_popcount(mask) - num_different;
}

// ---- Shared memory

#define SEVERAL_IN_CELL 255  // warps

static void note_shared(const Context *c, int op, int lane, u64_t address, int bytes, const u8_t *value) {
  Cta *cta = c->cta;
  u32_t issue = (u32_t)c->launch->issued;
  int race = 0, unset = 0, hazard = 0, clash = 0, shift = c->launch->shared_shift;
  for (u64_t k = address >> shift; k <= (address + bytes - 1) >> shift; k++) {
    Cell *cell = &cta->cells[k];
    int set = cell->written >= cta->first_epoch;
    if (set && cell->written == cta->epoch && !(op == OP_ATOMIC && cell->atomic)) {
      if (cell->writer != c->warp_number) race = WITH_WRITE;
      else if (op == OP_LOAD && cell->lane != lane && cell->syncs == c->warp->syncs) hazard = 1;
      else if (op == OP_STORE && cell->lane != lane && cell->issue == issue) clash = 1;
    }
    if (op != OP_STORE && !set) unset = 1;
    if (op == OP_LOAD) {
      int another = cell->read == cta->epoch && cell->reader != c->warp_number;
      cell->reader = another ? SEVERAL_IN_CELL : c->warp_number;
      cell->read = cta->epoch;
    } else {
      int another = set && cell->written == cta->epoch && cell->atomic && cell->writer != c->warp_number;
      if (cell->read == cta->epoch && cell->reader != c->warp_number) race = WITH_READ;
      cell->writer = another && op == OP_ATOMIC ? SEVERAL_IN_CELL : c->warp_number;
      cell->written = cta->epoch;
      cell->syncs = c->warp->syncs;
      cell->issue = issue;
      cell->lane = lane;
      cell->atomic = op == OP_ATOMIC;
    }
  }
  if (unset) report(c, KIND_SHARED_UNSET, lane, address, bytes, 0);
  if (hazard && !race) report(c, KIND_WARP_HAZARD, lane, address, bytes, 0);
  if (!race && !clash) return;
  int same = op == OP_STORE && !memcmp(cta->shared + address, value, bytes);
  if (race) report(c, same ? KIND_SAME_VALUE_SHARED : KIND_SHARED_RACE, lane, address, race, 0);
  if (clash && !same) report(c, KIND_LANE_CLASH, lane, address, bytes, 0);
}

#endif
