// Types that the whole engine uses. Python fills in or reads what is marked "shared", whose layout layout.py repeats
// and the generated header asserts.

#ifndef TYPES_H
#define TYPES_H

#include <stdint.h>


typedef int8_t s8_t;
typedef int16_t s16_t;
typedef int32_t s32_t;
typedef int64_t s64_t;
typedef uint8_t u8_t;
typedef uint16_t u16_t;
typedef uint32_t u32_t;
typedef uint64_t u64_t;
typedef float f32_t;
typedef double f64_t;

#define ALL_LANES 0xFFFFFFFFu

// A loop over the lanes of a warp, whose passes do not depend on each other.
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < 32; l++)

// A loop over the lanes in a mask, from the lowest one.
#define LANES_IN(mask) for (u32_t rest = (mask), l; rest && (l = __builtin_ctz(rest), 1); rest &= rest - 1)

// ---- Shared: a program

// Operands are places of registers in a warp's frame, in bytes, or -1.
typedef struct {
  s32_t op;              // an Op, or the number of a rule
  s32_t guard, negated;  // the predicate that lanes need, or need not to hold
  s32_t a, b, c, e, d;   // operands, and the destination
  s32_t parts[8];        // registers that a vector access loads or stores
  s32_t num_parts;
  s32_t size;            // of each part in memory, or of the destination of a computation, in bytes
  s32_t register_size;   // of each part in registers, in bytes
  s32_t address_size;    // of the register with the address, in bytes
  s32_t is_signed;       // whether loading extends the sign
  s32_t space;           // a Space
  s32_t how;             // a Combination, a Shuffle, a Vote; or whether matrices are transposed
  s32_t target;          // of a branch
  s64_t offset;          // added to an address
} Instruction;

// ---- Shared: memory of a launch

typedef struct {
  u64_t low, high;
} Extent;

// A class of accesses to a granule of memory: which CTA, by its number plus one, and when, see checks.h.
typedef struct {
  u32_t cta, when;
} Access;

// What is known of a few bytes of global memory.
typedef struct {
  Access write, read, atomic;
  u64_t store;  // the last one: 32 times the number of the instruction issued, plus the lane
  u32_t atomics, unused;
} Granule;

// The storage of tensors. Offsets count from the begin of its range of virtual addresses.
typedef struct {
  u8_t *memory;
  u64_t low, high;          // offsets of its begin and its end
  Extent *views;            // the parts of it that the kernel's arguments cover
  s32_t num_views;
  s32_t granule_shift;      // a granule has 2 to the power of this bytes
  u64_t granules_from;      // the offset that the first granule and the first sector begin at
  Granule *granules;        // or NULL
  u8_t *sectors;            // of 32 bytes each: SECTOR_READ and SECTOR_WRITTEN; or NULL
} Allocation;

// ---- Shared: what a launch finds out

// Of one instruction.
typedef struct {
  u64_t runs;     // by warps
  u64_t lanes;    // that took part
  u64_t sectors;  // of 32 bytes, summed over warps
  u64_t lines;    // of 128 bytes
  u64_t clashes;  // lanes whose atomic operation waits for another lane's
} Count;

typedef struct {
  s32_t kind;   // a Kind
  s32_t place;  // which instruction
  u32_t cta, warp, lane, other;
  u64_t address, detail;
} Report;

// ---- Shared: a launch

typedef struct {
  const Instruction *code;
  const u8_t *frame;         // a warp's registers at the begin: constants are set
  const u8_t *params;
  Allocation *allocations;
  Report *reports;
  Count *counts;             // of each instruction
  u32_t *cta_total;          // warp instructions of each CTA
  u32_t *cta_longest;        // those of its longest warp
  u64_t seed;
  u64_t budget;              // of warp instructions, after which a launch counts as endless
  u64_t issued;              // warp instructions
  s32_t frame_size, variables_size;  // bytes of a frame, and of those in it that are no constants
  s32_t params_size, shared_size;
  s32_t num_warps, threads_of_last_warp;
  s32_t num_allocations, max_reports, num_reports;
  s32_t flags, window, quantum;  // see device.py
  s32_t shared_shift;        // a cell of shared memory has 2 to the power of this bytes
  s32_t specials[NUM_SPECIALS];  // places of special registers in the frame
  u32_t grid[3];
  u32_t kinds[NUM_KINDS];    // how many reports of each kind
} Launch;

// ---- A running launch

// What is known of a few bytes of shared memory. Epochs of a CTA are what barriers separate.
typedef struct {
  u32_t written, read;  // in which epochs
  u32_t syncs;          // how often the warp that wrote it had synchronised its lanes
  u32_t issue;          // which issue of an instruction wrote it
  u8_t writer, lane, reader, atomic;
} Cell;

// Lanes at one place of the program.
typedef struct {
  u32_t pc, mask;
} Group;

typedef struct {
  u8_t *frame;
  Group groups[32];
  s32_t num_groups, waiting;
  u32_t live;        // lanes that have not ended
  u32_t barrier_at;  // where it waits
  u32_t syncs;
  u64_t runs;        // instructions
} Warp;

typedef struct {
  Warp *warps;
  u8_t *shared;
  Cell *cells;
  u32_t number, epoch, first_epoch;
  s32_t active;
} Cta;

// Where in a launch an instruction runs.
typedef struct {
  Launch *launch;
  Cta *cta;
  Warp *warp;
  u32_t warp_number;
  s32_t place;  // of the instruction
} Context;

#endif
