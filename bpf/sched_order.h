/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the scheduler keeps of each cgroup, and orders of cgroups: skip lists in plain memory, whose
 * links are slots. One spin lock guards all of it, and everything here is called with it held.
 *
 * A cgroup can be in four orders at once: among its siblings by virtual time, and among all cgroups
 * by the time at which something is due. Slot 0 is the root cgroup, which is in no order, so 0 ends
 * a list.
 */
#ifndef AGENTCG_SCHED_ORDER_H
#define AGENTCG_SCHED_ORDER_H

#include "compat.h"

#define SLOTS	   ABI_SCHED_CGROUPS
#define SLOT_BITS  14
#define LEVELS	   4 /* each level holds an eighth of the one below: enough for 8^5 */
#define LEVEL_BITS 3

enum order {
	ORDER_TREE = 0,	  /* siblings with something to run, by virtual time */
	ORDER_BOOST = 1,  /* leaves that may go ahead of the others, first come first served */
	ORDER_PAUSE = 2,  /* paused cgroups, by when they go on */
	ORDER_RESCUE = 3, /* leaves with waiting tasks, by when they have waited for too long */
	ORDERS = 4,
};

struct link {
	u64 place;
	u32 height;
	u32 linked;
	u32 next[LEVELS];
};

/* Times are in ns; virtual times in ns of a cgroup with weight 100. */
struct node {
	u32 parent;
	u32 depth;
	u32 weight;
	u32 tasks;	 /* waiting in its own queue */
	u64 vtime;	 /* in the competition among its siblings */
	u64 own_vtime;	 /* of its own tasks in the competition with its children */
	u64 vtime_now;	 /* of the competition among its children */
	u64 task_vtime;	 /* the latest of its own tasks that was given a CPU */
	u64 paused_ns;	 /* 0: it is not; else since when */
	u64 period_usec; /* cpu.max */
	u64 quota_usec;	 /* 0: no limit */
	u64 burst_usec;
	u64 tokens_at_ns;
	s64 tokens_ns;
	u64 budget_at_ns;
	s64 budget_ns;
	u32 penalty;	/* runs one part in so many; 0, 1: none */
	u32 for_memory; /* that is why it is paused */
	u32 children[LEVELS];
	struct link links[ORDERS];
};

static struct node nodes[SLOTS];
static struct {
	u32 next[LEVELS];
} heads[ORDERS];
static u32 dice = 2463534242; /* xorshift, "Xorshift RNGs", Marsaglia 2003 */
_Static_assert(SLOTS == 1 << SLOT_BITS, "a slot in a place");

/*
 * Numbers that the verifier is not to know: it would look at a loop anew for each value that its
 * variables can have.
 */
static u32 top_level = LEVELS - 1;

/*
 * A loop that the kernel ends should it not end by itself (may_goto, Linux 6.9): the compiler's
 * name for the instruction is younger than the instruction.
 */
#define can_loop                                                                         \
	({                                                                               \
		__label__ l_break, l_continue;                                           \
		bool going = true;                                                       \
		asm volatile goto("1:.byte 0xe5;.byte 0;"                                \
				  ".long ((%l[l_break] - 1b - 8) / 8) & 0xffff;.short 0" \
				  :                                                      \
				  :                                                      \
				  :                                                      \
				  : l_break);                                            \
		goto l_continue;                                                         \
	l_break:                                                                         \
		going = false;                                                           \
	l_continue:                                                                      \
		going;                                                                   \
	})

/* Masked in a way that the verifier sees and the compiler does not undo. */
#define MASKED(value, mask)                                          \
	({                                                           \
		u64 masked = (value);                                \
		asm volatile("%0 &= %1" : "+r"(masked) : "i"(mask)); \
		masked;                                              \
	})

static __always_inline u64 within(u32 slot)
{
	return MASKED(slot, SLOTS - 1);
}

static __always_inline struct node *node_of(u32 slot)
{
	return &nodes[within(slot)];
}

static __always_inline struct link *link_of(u32 slot, u32 order)
{
	return &node_of(slot)->links[MASKED(order, ORDERS - 1)];
}

/* Where the link to the next one is, after slot `at`, or at the head for 0. */
static __always_inline u32 *next_of(u32 order, u32 parent, u32 at, u32 level)
{
	u64 row = MASKED(level, LEVELS - 1);

	if (at)
		return &link_of(at, order)->next[row];
	if (order == ORDER_TREE)
		return &node_of(parent)->children[row];
	return &heads[MASKED(order, ORDERS - 1)].next[row];
}

static __always_inline bool before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

/* Keys differ by less than 2^49 ns; no two places are the same. */
static __always_inline u64 place_of(u64 key, u32 slot)
{
	return key << SLOT_BITS | slot;
}

static __always_inline bool is_due(u32 slot, u32 order, u64 now)
{
	return !before(place_of(now, SLOTS - 1), link_of(slot, order)->place);
}

/* The first of an order; of ORDER_TREE: among the children of `parent`. */
static __always_inline u32 order_first(u32 order, u32 parent)
{
	return *next_of(order, parent, 0, 0);
}

static __noinline int order_add(u32 order, u32 slot, u64 key)
{
	struct link *link = link_of(slot, order);
	u32 parent = node_of(slot)->parent;
	u64 mine = place_of(key, slot);
	u32 height, at = 0, level = top_level;

	dice ^= dice << 13;
	dice ^= dice >> 17;
	dice ^= dice << 5;
	height = 1 + __builtin_ctz(dice | 1U << LEVEL_BITS * (LEVELS - 1)) / LEVEL_BITS;
	link->place = mine;
	link->height = height;
	link->linked = 1;
	while (can_loop) {
		u32 *to_next = next_of(order, parent, at, level);
		u32 next = *to_next;

		if (next && before(link_of(next, order)->place, mine)) {
			at = next;
			continue;
		}
		if (level < height) {
			*next_of(order, parent, slot, level) = next;
			*to_next = slot;
		}
		if (!level)
			break;
		level--;
	}
	return 0;
}

static __noinline int order_remove(u32 order, u32 slot)
{
	struct link *link = link_of(slot, order);
	u32 parent = node_of(slot)->parent, at = 0, level = top_level;

	while (can_loop) {
		u32 *to_next = next_of(order, parent, at, level);
		u32 next = *to_next;

		if (next && before(link_of(next, order)->place, link->place)) {
			at = next;
			continue;
		}
		if (next == slot)
			*to_next = *next_of(order, parent, slot, level);
		if (!level)
			break;
		level--;
	}
	link->linked = 0;
	return 0;
}

static __always_inline void order_drop(u32 order, u32 slot)
{
	if (link_of(slot, order)->linked)
		order_remove(order, slot);
}

static __always_inline void order_move(u32 order, u32 slot, u64 key)
{
	order_drop(order, slot);
	order_add(order, slot, key);
}

#endif
