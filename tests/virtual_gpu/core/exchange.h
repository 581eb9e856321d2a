// Instructions by which the lanes of a warp exchange numbers.

#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "memory.h"

// The names of the numbers are those of PTX's own description of shfl.sync.
static void shuffle(const Instruction *i, u8_t *frame, u32_t mask) {
  u32_t sources[32], results[32];
  memcpy(sources, frame + i->a, sizeof sources);
  LANES_IN(mask) {
    u32_t bval = get_register(frame, i->b, 4, l) & 31, c = get_register(frame, i->c, 4, l);
    u32_t segment = c >> 8 & 31, cval = c & 31;
    int max_lane = (l & segment) | (cval & ~segment), min_lane = l & segment, from, inside;
    switch (i->how) {
      case SHUFFLE_UP:
        from = (int)l - (int)bval;
        inside = from >= max_lane;
        break;
      case SHUFFLE_DOWN:
        from = l + bval;
        inside = from <= max_lane;
        break;
      case SHUFFLE_BUTTERFLY:
        from = l ^ bval;
        inside = from <= max_lane;
        break;
      default:
        from = min_lane | (bval & ~segment);
        inside = from <= max_lane;
    }
    results[l] = sources[inside ? from : (int)l];
    if (i->e >= 0) set_predicate(frame, i->e, l, inside);
  }
  LANES_IN(mask) set_register(frame, i->d, 4, l, results[l]);
}

static void vote(const Instruction *i, u8_t *frame, u32_t mask) {
  u32_t holds = 0;
  LANES_IN(mask) holds |= (get_register(frame, i->a, 4, l) & 1) << l;
  LANES_IN(mask) {
    if (i->how == VOTE_BALLOT) set_register(frame, i->d, 4, l, holds);
    else if (i->how == VOTE_ANY) set_predicate(frame, i->d, l, holds != 0);
    else if (i->how == VOTE_ALL) set_predicate(frame, i->d, l, holds == mask);
    else set_predicate(frame, i->d, l, holds == 0 || holds == mask);
  }
}

static void reduce(const Instruction *i, u8_t *frame, u32_t mask) {
  u32_t first = __builtin_ctz(mask), result = get_register(frame, i->a, 4, first);
  LANES_IN(mask & (mask - 1)) result = combine(i->how, 4, result, get_register(frame, i->a, 4, l), 0);
  LANES_IN(mask) set_register(frame, i->d, 4, l, result);
}

#endif
