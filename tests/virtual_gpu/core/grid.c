// A launch: some CTAs are under way at once, and their warps take turns, in an order drawn from a seed.

#include <stdlib.h>

#include "layout.inc"

#include "warp.h"

// SplitMix64.
static u64_t draw(u64_t *state) {
  u64_t z = (*state += 0x9E3779B97F4A7C15);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

static void fill(u8_t *memory, int bytes, u64_t noise) {
  for (int k = 0; k + 8 <= bytes; k += 8) memcpy(memory + k, &noise, 8);
}

static void set_special(const Launch *s, Warp *w, int special, u32_t first, u32_t step) {
  if (s->specials[special] < 0) return;
  for (int l = 0; l < 32; l++) set_register(w->frame, s->specials[special], 4, l, first + step * l);
}

static void begin_warp(Launch *s, Warp *w, int number, const u32_t *cta, u64_t *random) {
  // What no instruction has set may be anything, but hardly 0.
  if (s->flags & FLAG_NOISE) fill(w->frame, s->variables_size, draw(random) | 0x0101010101010101);
  set_special(s, w, SPECIAL_TID_X, 32 * number, 1);
  set_special(s, w, SPECIAL_LANEID, 0, 1);
  set_special(s, w, SPECIAL_WARPID, number, 0);
  for (int k = 0; k < 3; k++) {
    set_special(s, w, SPECIAL_CTAID_X + k, cta[k], 0);
    set_special(s, w, SPECIAL_NCTAID_X + k, s->grid[k], 0);
  }
  w->live = number == s->num_warps - 1 ? ALL_LANES >> (32 - s->threads_of_last_warp) : ALL_LANES;
  w->groups[0] = (Group){0, w->live};
  w->num_groups = 1;
  w->waiting = 0;
  w->syncs = 0;
  w->runs = 0;
}

static void begin_cta(Launch *s, Cta *c, u32_t number, u64_t *random) {
  c->number = number;
  c->active = 1;
  c->first_epoch = ++c->epoch;
  if (s->flags & FLAG_NOISE) fill(c->shared, s->shared_size, draw(random));
  u32_t place[3] = {number % s->grid[0], number / s->grid[0] % s->grid[1], number / s->grid[0] / s->grid[1]};
  for (int k = 0; k < s->num_warps; k++) begin_warp(s, &c->warps[k], k, place, random);
}

static void end_cta(Launch *s, Cta *c) {
  u64_t total = 0, longest = 0;
  for (int k = 0; k < s->num_warps; k++) {
    u64_t runs = c->warps[k].runs;
    total += runs;
    if (runs > longest) longest = runs;
  }
  s->cta_total[c->number] = (u32_t)total;
  s->cta_longest[c->number] = (u32_t)longest;
  c->active = 0;
}

// All warps that have not ended wait.
static void open_barrier(Launch *s, Cta *c) {
  Warp *first = NULL;
  for (int k = 0; k < s->num_warps && !first; k++)
    if (c->warps[k].waiting) first = &c->warps[k];
  for (int k = 0; k < s->num_warps; k++) {
    Warp *w = &c->warps[k];
    Context context = {s, c, w, k, first->barrier_at};
    if (!w->waiting) report(&context, KIND_EXITED_AT_BARRIER, 0, 0, 0, 0);
    else if (w->barrier_at != first->barrier_at) report(&context, KIND_UNEVEN_BARRIER, 0, w->barrier_at, 0, 0);
    w->waiting = 0;
  }
  c->epoch++;
}

// Runs one warp for a while; returns whether there is more to do.
static int advance(Launch *s, Cta *c, u64_t *random) {
  int runnable[MAX_WARPS], num_runnable = 0, num_waiting = 0;
  for (int k = 0; k < s->num_warps; k++) {
    Warp *w = &c->warps[k];
    if (w->waiting) num_waiting++;
    else if (w->num_groups) runnable[num_runnable++] = k;
  }
  if (num_runnable) {
    int k = s->flags & FLAG_SHUFFLE ? runnable[draw(random) % num_runnable] : runnable[0];
    // With no limit to its turn, a warp still has to end where the budget does.
    u64_t turn = s->quantum ? 1 + draw(random) % s->quantum : s->budget - s->issued + 1;
    run_warp(s, c, k, turn);
    return 1;
  }
  if (num_waiting) open_barrier(s, c);
  return num_waiting > 0;
}

static u32_t *order_of_ctas(const Launch *s, u32_t num_ctas, u64_t *random) {
  u32_t *order = malloc(num_ctas * sizeof(u32_t));
  if (!order) return NULL;
  for (u32_t k = 0; k < num_ctas; k++) order[k] = k;
  if (s->flags & FLAG_SHUFFLE)
    for (u32_t k = num_ctas; k > 1; k--) {
      u32_t j = draw(random) % k, swapped = order[j];
      order[j] = order[k - 1];
      order[k - 1] = swapped;
    }
  return order;
}

static int allocate_cta(const Launch *s, Cta *c) {
  c->warps = calloc(s->num_warps, sizeof(Warp));
  c->shared = calloc(1, s->shared_size + 8);
  c->cells = s->flags & FLAG_CHECK ? calloc((s->shared_size >> s->shared_shift) + 2, sizeof(Cell)) : NULL;
  if (!c->warps || !c->shared || (s->flags & FLAG_CHECK && !c->cells)) return 0;
  for (int k = 0; k < s->num_warps; k++) {
    u8_t *frame = aligned_alloc(64, (s->frame_size + 63) / 64 * 64 + 64);
    if (!frame) return 0;
    memcpy(frame, s->frame, s->frame_size);
    c->warps[k].frame = frame;
  }
  return 1;
}

static void free_cta(const Launch *s, Cta *c) {
  for (int k = 0; k < s->num_warps && c->warps; k++) free(c->warps[k].frame);
  free(c->warps);
  free(c->shared);
  free(c->cells);
}

static void run_grid(Launch *s, Cta *ctas, u32_t window, const u32_t *order, u32_t num_ctas, u64_t *random) {
  u32_t next = 0, running = 0;
  for (;;) {
    for (u32_t k = 0; k < window; k++)
      if (!ctas[k].active && next < num_ctas) {
        begin_cta(s, &ctas[k], order[next++], random);
        running++;
      }
    if (!running) return;
    u32_t k = s->flags & FLAG_SHUFFLE ? draw(random) % window : 0;
    while (!ctas[k].active) k = (k + 1) % window;
    if (!advance(s, &ctas[k], random)) {
      end_cta(s, &ctas[k]);
      running--;
    }
    if (s->issued > s->budget) {
      Context context = {s, &ctas[k], NULL, 0, 0};
      report(&context, KIND_ENDLESS, 0, 0, s->issued, 0);
      return;
    }
  }
}

// Runs a launch of at least one CTA; returns whether there was enough memory for it.
int run_launch(Launch *s) {
  u64_t random = s->seed;
  u32_t num_ctas = s->grid[0] * s->grid[1] * s->grid[2];
  u32_t window = (u32_t)s->window < num_ctas ? (u32_t)s->window : num_ctas;
  u32_t *order = order_of_ctas(s, num_ctas, &random);
  Cta *ctas = calloc(window, sizeof(Cta));
  int enough = order && ctas;
  for (u32_t k = 0; k < window && enough; k++) enough = allocate_cta(s, &ctas[k]);
  if (enough) run_grid(s, ctas, window, order, num_ctas, &random);
  for (u32_t k = 0; k < window && ctas; k++) free_cta(s, &ctas[k]);
  free(ctas);
  free(order);
  return enough;
}
