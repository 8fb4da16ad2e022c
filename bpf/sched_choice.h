/* SPDX-License-Identifier: GPL-2.0 */
/* Waiting for a turn, and the choice of the cgroup whose turn it is. */
#ifndef AGENTCG_SCHED_CHOICE_H
#define AGENTCG_SCHED_CHOICE_H

#include "sched_pay.h"

/* --- Waiting --- */

/*
 * The time at which to look for long waits next: each waiting task of the cgroup gets a turn within
 * wait_max_ns. Counts no more than RESCUED_MOST tasks, so that a fork bomb gains nothing.
 */
static __always_inline u64 rescue_at(struct node *node, u64 now)
{
	u32 tasks = node->tasks < RESCUED_MOST ? node->tasks : RESCUED_MOST;

	return now + control.wait_max_ns / (tasks ?: 1);
}

/* Add a cgroup to ORDER_BOOST, or remove it from there. Returns 0. */
__noinline int set_boost(u32 slot, u32 boost, u64 now)
{
	struct guard *guard = guard_of(GUARD_BOOST);

	if (!guard || !slot)
		return 0;
	bpf_spin_lock(&guard->lock);
	if (!boost)
		order_drop(ORDER_BOOST, slot);
	else if (node_of(slot)->tasks && !link_of(slot, ORDER_BOOST)->linked)
		order_add(ORDER_BOOST, slot, now);
	bpf_spin_unlock(&guard->lock);
	return 0;
}

/*
 * Count a task more that waits in a cgroup's queue. Returns whether it may go ahead of others. The
 * caller calls settle_up() afterwards.
 */
__noinline int begin_waiting(u32 slot, u64 now)
{
	struct node *node = node_of(slot);
	int boost = may_boost(slot, now);

	/* One instruction: let_go(), which calls this too, can be interrupted. */
	__sync_fetch_and_add(&counts[my_row()].waiting, 1);
	if (!__sync_fetch_and_add(&node->tasks, 1)) {
		if (before(node->own_vtime, node->vtime_now))
			node->own_vtime = node->vtime_now;
		node->rescue_at_ns = now + control.wait_max_ns;
	}
	if (boost && !link_of(slot, ORDER_BOOST)->linked)
		set_boost(slot, true, now);
	return boost;
}

/* Count a task less that waits. Returns 0. The caller calls settle_up() afterwards. */
__noinline int end_waiting(u32 slot)
{
	struct node *node = node_of(slot);
	u32 tasks = __sync_fetch_and_add(&node->tasks, -1);

	counts[my_row()].waiting--;
	if (tasks == 1 && link_of(slot, ORDER_BOOST)->linked)
		set_boost(slot, false, 0);
	return 0;
}

/* Set the time at which to look for long waits next; 0: the usual time after a rescue. Returns 0.
 */
__noinline int rescue_again(u32 slot, u64 at, u64 now)
{
	struct node *node = node_of(slot);

	node->rescue_at_ns = at ?: rescue_at(node, now);
	return 0;
}

/* Cgroups whose queues are to be looked at, as the timer has found them. */
struct to_look_at {
	u32 slots[RESCUED_MOST];
	u32 first;
	u32 end; /* first and end only grow */
};

static struct to_look_at rescues; /* for tasks that may have waited for too long */
static struct to_look_at paused;  /* paused ones, for tasks that are in the kernel */

static __always_inline bool is_full(struct to_look_at *list)
{
	return list->end - READ_ONCE(list->first) >= RESCUED_MOST;
}

static __always_inline void add_to(struct to_look_at *list, u32 slot)
{
	list->slots[MASKED(list->end, RESCUED_MOST - 1)] = slot;
	full_barrier(&list->end);
	list->end++;
}

/* Whether there is such a cgroup. */
static __always_inline bool has_any(struct to_look_at *list)
{
	return READ_ONCE(list->first) != READ_ONCE(list->end);
}

/* Take one of them; 0: there is none. */
static __always_inline u32 take_from(struct to_look_at *list)
{
	u32 first = READ_ONCE(list->first), slot;

	if (first == READ_ONCE(list->end))
		return 0;
	slot = list->slots[MASKED(first, RESCUED_MOST - 1)];
	return __sync_val_compare_and_swap(&list->first, first, first + 1) == first ? slot : 0;
}

/*
 * Look at some cgroups, each time at others, for tasks that may have waited for too long, and for
 * tasks of paused ones that are in the kernel. Called by the timer alone. Returns 0.
 */
__noinline int look_at_queues(u64 now)
{
	static u32 cursor;
	u32 left = READ_ONCE(looked_at), slot = cursor;

	while (left-- && can_loop) {
		struct node *node;

		if (++slot >= fresh_slot)
			slot = READ_ONCE(from_zero);
		node = node_of(slot);
		if (!slot || !node->tasks)
			continue;
		/* Twice: a task may have been on its way into the queue when it was looked at. */
		if (node->inside && !is_full(&paused) && is_held(slot, now)) {
			node->inside--;
			add_to(&paused, slot);
		}
		if (is_full(&rescues))
			break;
		if (before(now, node->rescue_at_ns))
			continue;
		node->rescue_at_ns = rescue_at(node, now);
		add_to(&rescues, slot);
	}
	cursor = slot;
	return 0;
}

/* --- Choosing --- */

/* The first cgroup that may go ahead of others; 0: none. */
__noinline u32 boost_due(u64 now)
{
	u32 left = READ_ONCE(at_once), slot;

	while (left-- && can_loop) {
		slot = order_first(ORDER_BOOST, 0);
		if (!slot || may_boost(slot, now))
			return slot;
		set_boost(slot, false, now);
	}
	return 0;
}

/* Whether a cgroup in ORDER_TREE stands where it was before it was charged last. */
static __always_inline bool is_stale(u32 slot)
{
	u64 vtime = READ_ONCE(node_of(slot)->vtime);

	return READ_ONCE(link_of(slot, ORDER_TREE)->place) != place_of(vtime, slot);
}

/* Whether a cgroup stands before another one of the same order, or so much behind it; 0: none. */
static __always_inline bool is_before(u32 slot, u32 than, u64 behind)
{
	return !than || before(READ_ONCE(link_of(slot, ORDER_TREE)->place),
			       READ_ONCE(link_of(than, ORDER_TREE)->place) + behind);
}

/* Put the first of a group where it belongs, until the first one is. Returns 0. */
__noinline int put_in_place(u32 group)
{
	struct guard *guard = guard_of(group);
	u32 left = READ_ONCE(at_once), slot;

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	while (left-- && can_loop) {
		slot = order_first(ORDER_TREE, group);
		if (!slot || !is_stale(slot))
			break;
		order_move(ORDER_TREE, slot, node_of(slot)->vtime);
	}
	bpf_spin_unlock(&guard->lock);
	return 0;
}

/* Where the least of all groups stood when a CPU looked last, by the depth of their parent. */
static struct {
	struct {
		u32 at;
		u32 left; /* times that this may be used again */
		u64 place;
	} of[SEEN];
} __line seen[ABI_SCHED_CPUS];

/*
 * The least of the groups of siblings that a CPU takes first, or of all groups; 0: there is none.
 */
__noinline u32 least_of(u32 at, u32 begin, u32 step)
{
	u32 stripe = begin, best = 0;

	while (stripe < STRIPES && can_loop) {
		u32 slot = order_first(ORDER_TREE, at * STRIPES + stripe);

		if (slot && is_before(slot, best, 0))
			best = slot;
		stripe += step;
	}
	return best;
}

/*
 * The child of a cgroup with the least virtual time, or nearly: each CPU has groups of its own, and
 * takes a child from them if that is no more than a grain of time behind the least. CPUs that all
 * want the same child wait for each other, and what others write to is slow to read: so where the
 * least stands is looked at only now and then. 0: there is none.
 */
__noinline u32 first_child(u32 at)
{
	u64 row = my_row(), column = MASKED(node_of(at)->depth, SEEN - 1);
	u64 grain = (control.slice_ns / GRAINS) << SLOT_BITS;
	u32 left = READ_ONCE(at_once), best = 0;

	while (left-- && can_loop) {
		u32 own = least_of(at, row % own_groups, own_groups);
		u64 least;

		if (seen[row].of[column].at != at || !seen[row].of[column].left) {
			best = least_of(at, 0, 1);
			seen[row].of[column].at = at;
			seen[row].of[column].left = SEEN_TIMES;
			seen[row].of[column].place = READ_ONCE(link_of(best, ORDER_TREE)->place);
		}
		least = seen[row].of[column].place + grain;
		if (own && before(READ_ONCE(link_of(own, ORDER_TREE)->place), least))
			best = own;
		else if (!best)
			best = least_of(at, 0, 1);
		/* Where the others stand is no later than where they belong. */
		if (!best || !is_stale(best))
			break;
		put_in_place(group_of(best));
		best = 0;
	}
	if (seen[row].of[column].left)
		seen[row].of[column].left--;
	return best;
}

/**
 * choose_at - choose at one level of the tree
 * @at: the cgroup whose children and own tasks compete
 * @mine: the child that contains the task which ran on the CPU and could go on; 0: none
 * @keep: whether that task is one of the cgroup's own
 *
 * The time of the competition follows what is chosen, and nothing holds it back: a cgroup that is
 * passed over because its tasks cannot be had is no reason to stop the others' time.
 *
 * Return: TURN(TURN_NONE, child) for a child; TURN(TURN_TREE, at) for the cgroup's own tasks; 0:
 * there is nothing to run here.
 */
__noinline u64 choose_at(u32 at, u32 mine, u32 keep)
{
	struct node *node = node_of(at);
	bool own = keep || READ_ONCE(node->tasks);
	u64 vtime = node->own_vtime;
	u32 best = first_child(at);

	if (mine && (!best || before(node_of(mine)->vtime, node_of(best)->vtime)))
		best = mine;
	if (own && (!best || !before(node_of(best)->vtime, vtime)))
		best = 0;
	else
		own = false;
	if (best)
		vtime = node_of(best)->vtime;
	/* Not each time: others read it all the time. */
	if ((own || best) && before(node->vtime_now + control.slice_ns / GRAINS / 4, vtime))
		node->vtime_now = vtime;
	return own ? TURN(TURN_TREE, at) : TURN(TURN_NONE, best);
}

/**
 * descend - choose from the root down, by the least virtual time
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 *
 * Return: a turn: TURN_TREE, or TURN_KEEP if it comes to that task's own cgroup; TURN_NONE: there
 * is nothing to run.
 */
__noinline u64 descend(u32 prev)
{
	bool along = prev > 0;
	u32 at = 0, last = within(prev - 1);
	u64 turn;

	while (can_loop) {
		bool keep = along && at == last;
		u32 mine = 0;

		if (along && !keep) {
			mine = last;
			while (node_of(mine)->parent != at && mine && can_loop)
				mine = node_of(mine)->parent;
		}
		turn = choose_at(at, mine, keep);
		if (turn >> 32)
			return keep ? TURN(TURN_KEEP, at) : turn;
		if (!turn)
			break;
		at = turn;
		if (at != mine)
			along = false;
	}
	return TURN(TURN_NONE, at);
}

/**
 * choose - choose the cgroup that a CPU is to serve next
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 * @now: the time
 *
 * Return: a turn. A rescue comes first, then a boost (of a waiting task before one of the task that
 * ran here), then the least virtual time. TURN_NONE with a slot: another CPU has just taken the
 * last task below that cgroup.
 */
__noinline u64 choose(u32 prev, u64 now)
{
	u32 slot;

	slot = take_from(&rescues);
	if (slot)
		return TURN(TURN_RESCUE, slot);
	slot = boost_due(now);
	if (slot)
		return TURN(TURN_BOOST, slot);
	if (prev && may_boost(prev - 1, now))
		return TURN(TURN_KEEP, within(prev - 1));
	return descend(prev);
}

/* Two cgroups as one number, and the parts of it. */
#define PAIR(a, b) ((u64)(a) << 32 | (b))

/*
 * The ancestors of two cgroups, or they themselves, that are siblings, as a PAIR; the same slot
 * twice: one of the two is the other's ancestor, or they are the same.
 */
__noinline u64 siblings_of(u32 a, u32 b)
{
	while (node_of(a)->depth > node_of(b)->depth && can_loop)
		a = node_of(a)->parent;
	while (node_of(b)->depth > node_of(a)->depth && can_loop)
		b = node_of(b)->parent;
	while (a != b && node_of(a)->parent != node_of(b)->parent && can_loop) {
		a = node_of(a)->parent;
		b = node_of(b)->parent;
	}
	return PAIR(a, b);
}

/**
 * comes_before - whether a cgroup that begins to wait comes before one that has a task running
 * @waiting: the first
 * @running: the second
 * @ran: CPU time in ns that the running task has not paid for yet
 *
 * Return: whether it does, by the virtual times of their ancestors that are siblings; false if one
 * is an ancestor of the other.
 */
__noinline int comes_before(u32 waiting, u32 running, u64 ran)
{
	u64 pair = siblings_of(waiting, running);
	struct node *node = node_of((u32)pair);

	waiting = pair >> 32;
	if (waiting == (u32)pair)
		return false;
	return before(node_of(waiting)->vtime, node->vtime + charged(node, ran));
}

/*
 * Have a cgroup pass its turn on for once, because none of its waiting tasks can be had here: it
 * and those above it are charged some time that they did not run. Returns 0.
 */
__noinline int give_way(u32 slot, u64 ns)
{
	while (slot && can_loop) {
		struct node *node = node_of(slot);

		__sync_fetch_and_add(&node->vtime, charged(node, ns));
		slot = node->parent;
	}
	return 0;
}

/*
 * Set a cgroup's weight. What it is ahead of its siblings counts by the new one: it would wait for
 * long otherwise, after a rise. Returns 0.
 */
__noinline int set_weight(u32 slot, u32 weight)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	struct guard *guard = guard_of(group_of(slot));
	s64 ahead;

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	ahead = node->vtime - parent->vtime_now;
	if (ahead > 0 && weight)
		node->vtime = parent->vtime_now + (u64)ahead * node->weight / weight;
	node->weight = weight;
	if (link_of(slot, ORDER_TREE)->linked)
		order_move(ORDER_TREE, slot, node->vtime);
	if (node->active) {
		__sync_fetch_and_add(&parent->active_weight, (weight ?: 1) - (u64)node->counted);
		node->counted = weight ?: 1;
	}
	bpf_spin_unlock(&guard->lock);
	return 0;
}

#endif
