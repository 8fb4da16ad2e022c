/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The scheduler's entry of each cgroup, and orders of cgroups. An entry is named by its slot. An
 * order is a skip list in plain memory, whose links are slots. One spin lock guards all of it; its
 * holder calls the functions here.
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

enum order {
	ORDER_TREE = 0,	  /* siblings with something to run, by virtual time */
	ORDER_BOOST = 1,  /* cgroups that may go ahead of others, first come first served */
	ORDER_PAUSE = 2,  /* paused cgroups, by the time at which the pause ends */
	ORDER_RESCUE = 3, /* cgroups with waiting tasks, by the time to look for long waits */
	ORDERS = 4,
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
	u32 parent; /* slot */
	u32 depth;
	u32 weight;
	u32 tasks;	   /* waiting in its own queue */
	u64 vtime;	   /* its virtual time in the competition among its siblings */
	u64 own_vtime;	   /* virtual time of its own tasks in the competition with its children */
	u64 vtime_now;	   /* virtual time that the competition among its children has reached */
	u64 task_vtime;	   /* the highest virtual time of an own task that was given a CPU */
	u64 paused_ns;	   /* since when it is paused; 0: it is not */
	u64 period_usec;   /* of cpu.max */
	u64 quota_usec;	   /* of cpu.max; 0: no limit */
	u64 burst_usec;	   /* cpu.max.burst */
	u64 tokens_at_ns;  /* when tokens were last added */
	s64 tokens_ns;	   /* CPU time that is left of cpu.max; below 0: to be paid back */
	u64 budget_at_ns;  /* when the budget was last computed */
	s64 budget_ns;	   /* CPU time that may be taken ahead of others */
	u32 penalty;	   /* factor by which it pays for its CPU time; 0, 1: none */
	u32 for_memory;	   /* 1: paused for its memory, 0: for cpu.max */
	u64 flat;	   /* its CPU time by its part of the whole tree: see sched_lane.h */
	u64 active_weight; /* of its children that are active */
	u32 runnable;	   /* own tasks that run or wait */
	u32 active;	   /* 1: it or a cgroup below it has such tasks */
	u32 counted;	   /* weight with which it is in its parent's active_weight */
	u32 has_lane;	   /* 1: a task of it has waited in a lane */
	u32 parked;	   /* tasks in its own queue that belong into a lane */
	u32 reserved;
	u32 children[LEVELS]; /* heads of ORDER_TREE among its children */
	struct link links[ORDERS];
};

static struct node nodes[SLOTS];
static struct {
	u32 next[LEVELS];
} heads[ORDERS];
static u32 dice = 2463534242; /* xorshift, "Xorshift RNGs", Marsaglia 2003 */
_Static_assert(SLOTS == 1 << SLOT_BITS, "a slot in a place");

/*
 * A variable, so that the verifier does not know its value: with a constant it would check a loop
 * anew for each value that the loop's variable can have.
 */
static u32 top_level = LEVELS - 1;

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

/**
 * next_of - the link that leads to the next cgroup of an order
 * @order: the order
 * @parent: for ORDER_TREE, the cgroup whose children are meant
 * @at: slot after which to look; 0: at the head
 * @level: level of the skip list
 *
 * Return: the address of the link.
 */
static __always_inline u32 *next_of(u32 order, u32 parent, u32 at, u32 level)
{
	u64 row = MASKED(level, LEVELS - 1);

	if (at)
		return &link_of(at, order)->next[row];
	if (order == ORDER_TREE)
		return &node_of(parent)->children[row];
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

/* The slot that is first in an order (ORDER_TREE: among the children of `parent`); 0: none. */
static __always_inline u32 order_first(u32 order, u32 parent)
{
	return *next_of(order, parent, 0, 0);
}

/* Add a cgroup that is not in an order to it, at the place of a key. Returns 0. */
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

/* Remove a cgroup that is in an order from it. Returns 0. */
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
