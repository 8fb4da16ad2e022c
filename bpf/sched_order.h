/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The scheduler's entry of each cgroup, and orders of cgroups. An entry is named by its slot. An
 * order is a skip list in plain memory, whose links are slots. The holder of the order's lock calls
 * the functions here.
 *
 * A cgroup can be in four orders at once: in one it stands among its siblings by virtual time, in
 * the others among all cgroups by the time at which something is due. Slot 0 is the root cgroup,
 * which is in no order, so 0 ends a list.
 */
#ifndef AGENTCG_SCHED_ORDER_H
#define AGENTCG_SCHED_ORDER_H

#ifdef SCHED_MACHINE_H
#include SCHED_MACHINE_H
#else
#include "sched_machine.h"
#endif

#define SLOTS	   ABI_SCHED_CGROUPS
#define SLOT_BITS  14
#define LEVELS	   4 /* each level holds an eighth of the one below: enough for 8^5 */
#define LEVEL_BITS 3
#define STRIPES	   4
#define DICE	   0x9e3779b97f4a7c15ULL /* Fibonacci hashing, Knuth, vol. 3, 6.4 */

enum order {
	ORDER_TREE = 0,	 /* siblings with something to run, by virtual time */
	ORDER_BOOST = 1, /* cgroups that may go ahead of others, first come first served */
	ORDER_PAUSE = 2, /* paused cgroups, by the time at which the pause ends */
	ORDERS = 4,	 /* one more, as a power of two is needed */
};

/* A cgroup's place in an order. */
struct link {
	u64 place;	  /* see place_of() */
	u32 height;	  /* levels of the list that it is in */
	u32 linked;	  /* 1: it is in the order */
	u32 next[LEVELS]; /* slot after it, by level; 0: it is the last */
};

/*
 * What the scheduler knows of a cgroup. Times are in ns; virtual times are the ns that a cgroup
 * with weight 100 would have run.
 */
struct node {
	/* Seldom written. */
	u32 parent; /* slot */
	u32 depth;
	u32 weight;
	u32 penalty;	   /* factor by which it pays for its CPU time; 0, 1: none */
	u64 paused_ns;	   /* since when it is paused; 0: it is not */
	u64 period_usec;   /* of cpu.max */
	u64 quota_usec;	   /* of cpu.max; 0: no limit */
	u64 burst_usec;	   /* cpu.max.burst */
	u64 active_weight; /* of its children that are active */
	u32 has_lane;	   /* 1: a task of it has waited in a lane */
	u32 for_memory;	   /* 1: paused for its memory, 0: for cpu.max */

	/* Written at each switch between its tasks. */
	u64 vtime __line; /* its virtual time in the competition among its siblings */
	u64 own_vtime;	  /* virtual time of its own tasks in the competition with its children */
	u64 task_vtime;	  /* the highest virtual time of an own task that was given a CPU */
	u64 flat;	  /* its CPU time by its part of the whole tree: see sched_lane.h */
	u64 put_off;	  /* flat time by which its tasks in lanes come later: see lane_passed() */
	u64 rescue_at_ns; /* when to look for long waits in its queue */
	u32 tasks;	  /* waiting in its own queue */
	u32 runnable;	  /* own tasks that run or wait */
	u32 parked;	  /* tasks in its own queue that belong into a lane */
	u32 barrier;	  /* see full_barrier */

	/* Read by everyone who comes along in an order. */
	struct link links[ORDERS] __line;

	u64 vtime_now __line; /* virtual time that the competition among its children has reached */
	u64 tokens_at_ns;     /* when tokens were last added */
	s64 tokens_ns;	      /* CPU time that is left of cpu.max; below 0: to be paid back */
	u64 budget_at_ns;     /* when the budget was last computed */
	s64 budget_ns;	      /* CPU time that may be taken ahead of others */
	u32 active;	      /* 1: it or a cgroup below it has such tasks */
	u32 counted;	      /* weight with which it is in its parent's active_weight */
	u32 inside; /* looks that are due for tasks in its own queue that are in the kernel */
} __line;

static struct node nodes[SLOTS];
/*
 * Heads of the lists. Siblings are in several, by their slot, so that CPUs which move different
 * siblings do not wait for each other: see group_of().
 */
static struct {
	u32 next[LEVELS];
} heads[ORDERS];
static struct {
	u32 next[LEVELS];
} groups[SLOTS * STRIPES] __line; /* those of one parent on one line */
_Static_assert(SLOTS == 1 << SLOT_BITS, "a slot in a place");

/*
 * A variable, so that the verifier does not know its value: with a constant it would check a loop
 * anew for each value that the loop's variable can have.
 */
static u32 top_level = LEVELS - 1;
/* The number from which loops count, read with READ_ONCE(), so that it is no constant either. */
static u32 from_zero;

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

/* The part of a cgroup's siblings that it is in a list with, and that has a lock. */
static __always_inline u32 group_of(u32 slot)
{
	return node_of(slot)->parent * STRIPES + slot % STRIPES;
}

/**
 * next_of - the link that leads to the next cgroup of an order
 * @order: the order
 * @group: for ORDER_TREE, the siblings that are meant, as group_of() has it
 * @at: slot after which to look; 0: at the head
 * @level: level of the skip list
 *
 * Return: the address of the link.
 */
static __always_inline u32 *next_of(u32 order, u32 group, u32 at, u32 level)
{
	u64 row = MASKED(level, LEVELS - 1);

	if (at)
		return &link_of(at, order)->next[row];
	if (order == ORDER_TREE)
		return &groups[MASKED(group, SLOTS * STRIPES - 1)].next[row];
	return &heads[MASKED(order, ORDERS - 1)].next[row];
}

/* Whether time or place `a` is earlier than `b`, across an overflow too. */
static __always_inline bool before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

/*
 * The number by which an order is sorted: the key (a time in ns) above the slot, so that no two are
 * equal. Keys in an order differ by less than 2^49 ns, which keeps before() right.
 */
static __always_inline u64 place_of(u64 key, u32 slot)
{
	return key << SLOT_BITS | slot;
}

/* Whether a cgroup's key in an order has been reached. */
static __always_inline bool is_due(u32 slot, u32 order, u64 now)
{
	return !before(place_of(now, SLOTS - 1), link_of(slot, order)->place);
}

/* The slot that is first in an order (ORDER_TREE: in a group of siblings); 0: none. */
static __always_inline u32 order_first(u32 order, u32 group)
{
	return READ_ONCE(*next_of(order, group, 0, 0));
}

/* Add a cgroup that is not in an order to it, at the place of a key. Returns 0. */
static __noinline int order_add(u32 order, u32 slot, u64 key)
{
	struct link *link = link_of(slot, order);
	u32 group = group_of(slot);
	u64 mine = place_of(key, slot);
	u32 height, at = 0, level = top_level, dice = mine * DICE >> 32;

	height = 1 + __builtin_ctz(dice | 1U << LEVEL_BITS * (LEVELS - 1)) / LEVEL_BITS;
	link->place = mine;
	link->height = height;
	link->linked = 1;
	while (can_loop) {
		u32 *to_next = next_of(order, group, at, level);
		u32 next = *to_next;

		if (next && before(link_of(next, order)->place, mine)) {
			at = next;
			continue;
		}
		if (level < height) {
			*next_of(order, group, slot, level) = next;
			*to_next = slot;
		}
		if (!level)
			break;
		level--;
	}
	return 0;
}

/* Remove a cgroup that is in an order from it. Returns 0. */
static __noinline int order_remove(u32 order, u32 slot)
{
	struct link *link = link_of(slot, order);
	u32 group = group_of(slot), at = 0, level = top_level;

	while (can_loop) {
		u32 *to_next = next_of(order, group, at, level);
		u32 next = *to_next;

		if (next && before(link_of(next, order)->place, link->place)) {
			at = next;
			continue;
		}
		if (next == slot)
			*to_next = *next_of(order, group, slot, level);
		if (!level)
			break;
		level--;
	}
	link->linked = 0;
	return 0;
}

/* Remove a cgroup from an order, if it is in it. */
static __always_inline void order_drop(u32 order, u32 slot)
{
	if (link_of(slot, order)->linked)
		order_remove(order, slot);
}

/* Put a cgroup at the place of a key, whether or not it is in the order. */
static __always_inline void order_move(u32 order, u32 slot, u64 key)
{
	order_drop(order, slot);
	order_add(order, slot, key);
}

#endif
