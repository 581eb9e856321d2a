// A warp: its lanes run together where they are at one place. Where they are not, those at the lowest place go on,
// which brings them together again where their ways meet in the code that LLVM lays out.

#ifndef WARP_H
#define WARP_H

#include "access.h"
#include "compute.h"
#include "exchange.h"

static int lowest_group(const Warp *w) {
  int lowest = 0;
  for (int k = 1; k < w->num_groups; k++)
    if (w->groups[k].pc < w->groups[lowest].pc) lowest = k;
  return lowest;
}

static u32_t next_other_place(const Warp *w, int group) {
  u32_t next = ALL_LANES;
  for (int k = 0; k < w->num_groups; k++)
    if (k != group && w->groups[k].pc < next) next = w->groups[k].pc;
  return next;
}

static void merge_groups(Warp *w) {
  for (int k = 0; k < w->num_groups; k++)
    for (int j = w->num_groups - 1; j > k; j--)
      if (w->groups[j].pc == w->groups[k].pc) {
        w->groups[k].mask |= w->groups[j].mask;
        w->groups[j] = w->groups[--w->num_groups];
      }
}

static void spread(u32_t mask, u32_t *lanes) { LANES lanes[l] = -(mask >> l & 1); }

// Which of the lanes an instruction's guard lets take part; ``taking_part`` is the same, spread.
static u32_t guard(const Instruction *i, const u8_t *frame, const u32_t *lanes, u32_t *taking_part) {
  const u32_t *predicate = (const u32_t *)(frame + i->guard);
  u32_t flip = i->negated ? ALL_LANES : 0, mask = 0;
  LANES taking_part[l] = (predicate[l] ^ flip) & lanes[l];
  for (int l = 0; l < 32; l++) mask |= (taking_part[l] & 1) << l;
  return mask;
}

static void exchange(const Context *c, const Instruction *i, u32_t mask) {
  u8_t *frame = c->warp->frame;
  if (mask != c->warp->live) report(c, KIND_DIVERGED_EXCHANGE, 0, mask, c->warp->live, 0);
  switch (i->op) {
    case OP_SHUFFLE: shuffle(i, frame, mask); break;
    case OP_VOTE: vote(i, frame, mask); break;
    case OP_REDUCE: reduce(i, frame, mask); break;
    default: move_matrices(c, i);
  }
}

// What follows an instruction: the next one of the same lanes, another choice of lanes, or another warp.
enum { GO_ON, CHOOSE_LANES, LEAVE_WARP };

// A branch that some lanes take makes a group of them.
static int branch(Warp *w, Group *group, u32_t mask, const Instruction *i, u32_t *next) {
  if (mask == group->mask) *next = i->target;
  if (mask == group->mask || mask == 0) return GO_ON;
  group->mask &= ~mask;
  group->pc = *next;
  w->groups[w->num_groups++] = (Group){i->target, mask};
  return CHOOSE_LANES;
}

static int end_lanes(Warp *w, Group *group, u32_t mask) {
  w->live &= ~mask;
  group->mask &= ~mask;
  group->pc++;
  if (group->mask == 0) *group = w->groups[--w->num_groups];
  return CHOOSE_LANES;
}

static int wait_at_barrier(const Context *c, u32_t mask) {
  if (mask != c->warp->live) report(c, KIND_DIVERGED_BARRIER, 0, mask, c->warp->live, 0);
  c->warp->waiting = 1;
  c->warp->barrier_at = c->place;
  return LEAVE_WARP;
}

static int trap(const Context *c) {
  report(c, KIND_TRAP, 0, 0, 0, 0);
  c->warp->num_groups = 0;
  c->warp->live = 0;
  return LEAVE_WARP;
}

// Runs a warp until it waits at a barrier or ends, or for so many instructions.
static void run_warp(Launch *s, Cta *cta, int number, u64_t instructions) {
  Warp *w = &cta->warps[number];
  Context context = {s, cta, w, number, 0};
  u64_t stop = w->runs + instructions;
  while (w->num_groups) {
    merge_groups(w);
    int which = lowest_group(w);
    Group *group = &w->groups[which];
    u32_t meeting = next_other_place(w, which), lanes[32], guarded[32];
    spread(group->mask, lanes);
    for (;;) {
      const Instruction *i = &s->code[group->pc];
      u32_t mask = i->guard >= 0 ? guard(i, w->frame, lanes, guarded) : group->mask, next = group->pc + 1;
      int follows = GO_ON;
      context.place = group->pc;
      Count *count = &s->counts[context.place];
      count->runs++;
      count->lanes += __builtin_popcount(mask);
      w->runs++;
      s->issued++;
      if (mask) switch (i->op) {
        case OP_LOAD:
        case OP_STORE:
        case OP_ATOMIC: access_memory(&context, i, mask); break;
        case OP_SHUFFLE:
        case OP_VOTE:
        case OP_REDUCE:
        case OP_LOAD_MATRICES:
        case OP_STORE_MATRICES: exchange(&context, i, mask); break;
        case OP_BRANCH: follows = branch(w, group, mask, i, &next); break;
        case OP_EXIT: follows = end_lanes(w, group, mask); break;
        case OP_BARRIER: follows = wait_at_barrier(&context, mask); break;
        case OP_WARP_BARRIER: w->syncs++; break;
        case OP_TRAP: follows = trap(&context); break;
        case OP_NOTHING: break;
        default: compute(i, w->frame, i->guard >= 0 ? guarded : lanes, mask == ALL_LANES);
      }
      if (follows == CHOOSE_LANES) break;
      group->pc = next;
      if (follows == LEAVE_WARP || w->runs >= stop) return;
      if (next >= meeting) break;
    }
  }
}

#endif
