// Instructions that only compute: the generated cases, one loop over the lanes each, which the compiler vectorises.

#ifndef COMPUTE_H
#define COMPUTE_H

#include <string.h>

#include "floats.h"
#include "integers.h"
#include "types.h"

// The results of all lanes, into a place of 32 numbers.
static void compute_all(const Instruction *i, u8_t *frame, void *into) {
#define AT(place) ((const void *)(frame + (place)))
  switch (i->op) {
#include "rules.inc"
  }
#undef AT
}

// Every lane computes; those that do not take part keep what they have.
static void compute(const Instruction *i, u8_t *frame, const u32_t *lanes, int all) {
  u8_t *destination = frame + i->d;
  if (all) {
    compute_all(i, frame, destination);
    return;
  }
  u64_t results[32];
  compute_all(i, frame, results);
#define BLEND(type)                                                                    \
  {                                                                                    \
    type *d = (type *)destination;                                                     \
    const type *r = (const type *)results;                                             \
    LANES d[l] = lanes[l] ? r[l] : d[l];                                               \
  }
  if (i->size == 2) BLEND(u16_t)
  else if (i->size == 4) BLEND(u32_t)
  else BLEND(u64_t)
#undef BLEND
}

#endif
