/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The choice of the cgroup whose turn it is: the tree of cgroups with virtual times, budgets and
 * pauses. Tasks are only counted here, and CPUs only numbered.
 *
 * Each order has a lock: that of siblings, a lock of their parent's; so CPUs that switch between
 * calls of different sessions meet only where they choose the session. A function that takes a lock
 * does so for one level of the tree, and is not static: the verifier checks such a function once,
 * instead of at every place that calls it and with every loop around it. Between two levels no lock
 * is held, and the tree is right then too: a cgroup whose parent is not linked yet is not found
 * yet, and every function that changes what settle() depends on calls it afterwards. Virtual times
 * are added to without a lock, and a cgroup is put where it belongs when its turn seems to have
 * come (see choose_at): they only grow, so it is never found too late.
 *
 * At each level, siblings compete by virtual time: CPU time over weight. A cgroup that begins to
 * wait gets at least the virtual time that the competition has reached. So it keeps no claim from
 * the time in which it did not run, and a thousand cgroups that wake at once are no better off than
 * one. The time of the competition is that of the last choice, so one that ran while no other
 * waited is not behind those that come later.
 */
#ifndef AGENTCG_SCHED_TREE_H
#define AGENTCG_SCHED_TREE_H

#include "sched_order.h"

#define DEPTH_MAX	   16 /* levels; deeper cgroups share the entry of an ancestor */
#define RESCUED_MOST	   64
#define WEIGHT_DEFAULT	   100
#define NSEC_PER_USEC	   1000ULL
#define NSEC_PER_MSEC	   1000000ULL
#define REFILL_MOST_USEC   10000000ULL /* time that is counted at most, against overflow */
#define QUOTA_MOST_USEC	   1000000000ULL
#define PENALTY_PAUSE_MOST (100 * NSEC_PER_MSEC)
#define SLACK_SLICES	   2 /* that a cgroup with something to run may be behind, for its weight */
#define GRAINS		   8 /* of a slice: see first_child() */
#define SEEN		   4
#define SEEN_TIMES	   8
#define FLAT_MOST_NS	   10000000000ULL
#define GATHER_NS	   (2 * NSEC_PER_MSEC)
#define INSIDE_LOOKS	   2 /* at the queue of a paused cgroup: see look_at_queues() */

struct sched_control control;
struct sched_cgroup cgroups[SLOTS];

static u32 fresh_slot = 1;  /* the first slot that was never used; 0 is the root's */
static u32 own_groups = 1;  /* CPUs, or STRIPES if those are fewer */
static u32 looked_at = 256; /* cgroups that look_at_queues() looks at */

static u32 at_once = 32; /* cgroups that a call resumes, puts in place, ... at most */

/* Counts of each CPU, which the timer adds up in `control`. */
static struct {
	s64 waiting; /* tasks that began to wait in queues on this CPU, less those that ended */
	s64 in_lanes;
	u64 picks;
} __line counts[ABI_SCHED_CPUS];

/* Reason of a turn. */
enum turn {
	TURN_NONE = 0,
	TURN_TREE = 1,	 /* the least virtual time */
	TURN_BOOST = 2,	 /* a budget for going first */
	TURN_RESCUE = 3, /* too long a wait */
	TURN_KEEP = 4,	 /* the CPU stays with the cgroup whose task was running on it */
};

/* A turn as one number: its reason, and the slot of the cgroup. */
#define TURN(how, slot) ((u64)(how) << 32 | (slot))

static __always_inline u64 my_row(void)
{
	return MASKED(this_cpu(), ABI_SCHED_CPUS - 1);
}

static __always_inline struct sched_cgroup *cgroup_of(u32 slot)
{
	return &cgroups[within(slot)];
}

/* --- In the tree, and out of it --- */

/* Whether a child of a cgroup is in ORDER_TREE. */
static __always_inline bool has_children(u32 slot)
{
	u32 group = slot * STRIPES;

	return order_first(ORDER_TREE, group) || order_first(ORDER_TREE, group + 1) ||
	       order_first(ORDER_TREE, group + 2) || order_first(ORDER_TREE, group + 3);
}

/* Whether a cgroup belongs into ORDER_TREE: not paused, and with something to run. */
static __always_inline bool wants(u32 slot)
{
	struct node *node = node_of(slot);

	return !READ_ONCE(node->paused_ns) && (READ_ONCE(node->tasks) || has_children(slot));
}

/* Whether a cgroup is in ORDER_TREE exactly if it belongs there. */
static __always_inline bool is_settled(u32 slot)
{
	return !READ_ONCE(link_of(slot, ORDER_TREE)->linked) == !wants(slot);
}

/* Virtual time that a cgroup is charged for CPU time. */
static __always_inline u64 charged(struct node *node, u64 ran)
{
	return ran * WEIGHT_DEFAULT / (node->weight ?: 1);
}

/* The least virtual time that a cgroup has which comes back: see settle(). */
static __always_inline u64 floor_of(struct node *node, u32 went_on)
{
	u64 now = node_of(node->parent)->vtime_now;

	return went_on ? now - charged(node, SLACK_SLICES * control.slice_ns) : now;
}

/**
 * settle - add a cgroup to ORDER_TREE or remove it, as it belongs
 * @slot: the cgroup
 * @went_on: whether the task that comes back had no more than its CPU taken, and did not sleep
 *
 * One that slept gets the virtual time that its siblings have reached. One whose only task was
 * running, so that nothing of it waited, may still be a little behind: it had its turn because it
 * was, and would lose that.
 *
 * Return: whether anything was changed.
 */
__noinline int settle(u32 slot, u32 went_on)
{
	struct node *node = node_of(slot);
	struct guard *guard = guard_of(group_of(slot));
	u32 changes = 0;
	u64 least;

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	/*
	 * Again, if what it depends on was changed meanwhile by one that saw it linked still, or
	 * not linked yet.
	 */
	while (!is_settled(slot) && can_loop) {
		if (link_of(slot, ORDER_TREE)->linked) {
			order_remove(ORDER_TREE, slot);
		} else {
			least = floor_of(node, went_on);
			if (before(node->vtime, least))
				node->vtime = least;
			order_add(ORDER_TREE, slot, node->vtime);
		}
		changes++;
		full_barrier(&node->barrier);
	}
	bpf_spin_unlock(&guard->lock);
	return changes;
}

/* Settle a cgroup and those above it, up to the first where nothing changes. Returns 0. */
__noinline int settle_up(u32 slot, u32 went_on)
{
	while (slot && can_loop) {
		if (is_settled(slot) || !settle(slot, went_on))
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/*
 * Note whether a cgroup is active: whether tasks of it, or of a cgroup below it, run or wait. One
 * that becomes active gets at least the virtual time that its siblings have reached. Returns
 * whether anything was changed.
 */
__noinline int activate(u32 slot)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	struct guard *guard = guard_of(group_of(slot));
	bool is_active, changed;

	if (!guard)
		return false;
	bpf_spin_lock(&guard->lock);
	is_active = READ_ONCE(node->runnable) || node->active_weight;
	changed = is_active != node->active;
	if (changed && is_active) {
		node->counted = node->weight ?: 1;
		__sync_fetch_and_add(&parent->active_weight, node->counted);
		if (before(node->vtime, parent->vtime_now) && !link_of(slot, ORDER_TREE)->linked)
			node->vtime = parent->vtime_now;
	} else if (changed) {
		__sync_fetch_and_sub(&parent->active_weight, node->counted);
	}
	node->active = is_active;
	bpf_spin_unlock(&guard->lock);
	return changed;
}

/* The same for those above it, up to the first where nothing changes. Returns 0. */
__noinline int activate_up(u32 slot)
{
	while (slot && can_loop) {
		if (!activate(slot))
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/*
 * CPU time of a cgroup, by the part of the tree's time that it gets while all that are active now
 * stay so: in the unit of virtual time at the highest level at which there is a choice.
 */
__noinline u64 flat_time(u32 slot, u64 ran)
{
	u64 flat = ran;

	while (slot && can_loop) {
		struct node *node = node_of(slot);
		u64 all = node_of(node->parent)->active_weight, weight = node->weight ?: 1;

		if (all > weight) {
			flat = ran * WEIGHT_DEFAULT / weight;
			ran = ran * all / weight;
			if (ran > FLAT_MOST_NS)
				ran = FLAT_MOST_NS;
		}
		slot = node->parent;
	}
	return flat;
}

/* --- Entries --- */

static u32 free_slots[SLOTS];
static u32 free_count;

/* Take a free slot; 0: there is none. */
__noinline u32 take_slot(void)
{
	struct guard *guard = guard_of(GUARD_SLOTS);
	u32 slot = 0;

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	if (free_count)
		slot = free_slots[within(--free_count)];
	else if (fresh_slot < SLOTS)
		slot = fresh_slot++;
	bpf_spin_unlock(&guard->lock);
	return slot;
}

/* Remove a cgroup from an order, if it is in it. Returns 0. */
__noinline int leave_order(u32 slot, u32 order, u32 lock)
{
	struct guard *guard = guard_of(lock);

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	order_drop(order, slot);
	bpf_spin_unlock(&guard->lock);
	return 0;
}

/*
 * Free a slot, whose cgroup has no tasks and no children any more. Returns 0. The caller has called
 * settle_up() before.
 */
__noinline int give_slot_back(u32 slot)
{
	struct guard *guard = guard_of(GUARD_SLOTS);

	leave_order(slot, ORDER_BOOST, GUARD_BOOST);
	leave_order(slot, ORDER_PAUSE, GUARD_PAUSE);
	leave_order(slot, ORDER_TREE, group_of(slot));
	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	if (slot && free_count < SLOTS)
		free_slots[within(free_count++)] = slot;
	bpf_spin_unlock(&guard->lock);
	return 0;
}

#endif
