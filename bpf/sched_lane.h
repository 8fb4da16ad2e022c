/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Lanes: one for each CPU, with the tasks that may not run on every CPU. They are not in the tree,
 * because a CPU that looks there would have to pass over what it may not run, and that can be any
 * number of cgroups.
 *
 * In a lane, tasks are sorted by a key: the flat time of their cgroup (see flat_time) and an
 * offset. A task that comes into a lane begins at the time that the lane has reached; from then on
 * its key follows what its cgroup gets, on this CPU and on others. So the tasks of one CPU share it
 * by the weights of their cgroups, however far the rest of the machine has come meanwhile.
 *
 * Between the first of the lane and the choice of the tree, the virtual times of their ancestors
 * that are siblings decide. A cgroup whose tasks wait for a CPU that serves none falls behind its
 * siblings by LANE_BEHIND_NS at most.
 */
#ifndef AGENTCG_SCHED_LANE_H
#define AGENTCG_SCHED_LANE_H

#include "sched_choice.h"

#define LANE_BEHIND_NS (500 * NSEC_PER_MSEC)  /* of virtual time */
#define LANE_BOOST_NS  (1000 * NSEC_PER_MSEC) /* by which the key of one that goes first is less */

static struct {
	u64 key; /* the highest one of a task that was given the CPU */
} lanes[ABI_SCHED_CPUS];

/* A task's place in a lane. */
struct stay {
	u32 lane; /* CPU, plus one, of the lane that it was in last; 0: none */
	u32 reserved;
	u64 offset;
};

static __always_inline u64 *lane_key(u32 cpu)
{
	return &lanes[MASKED(cpu, ABI_SCHED_CPUS - 1)].key;
}

/*
 * The key of a task that begins to wait in a CPU's lane. What it is ahead of the others in the lane
 * that it comes from, it is ahead here too.
 */
static __always_inline u64 lane_enter(u32 slot, struct stay *stay, u32 cpu)
{
	struct node *node = node_of(slot);
	u64 now = *lane_key(cpu), key = now;
	s64 ahead = 0;

	if (stay->lane)
		ahead = node->flat + stay->offset - *lane_key(stay->lane - 1);
	if (ahead > 0)
		key += ahead;
	node->has_lane = 1;
	stay->lane = cpu + 1;
	stay->offset = key - node->flat;
	return key;
}

/* The key that a running task would have in its lane now. */
static __always_inline u64 lane_key_of(u32 slot, struct stay *stay)
{
	return node_of(slot)->flat + stay->offset;
}

/* The child of a cgroup that another one below it lies in, or is. */
__noinline u32 child_towards(u32 above, u32 slot)
{
	while (slot && node_of(slot)->parent != above && can_loop)
		slot = node_of(slot)->parent;
	return slot;
}

/*
 * Whether the CPU's turn is a cgroup's in its lane, before the one that the tree has chosen. Of the
 * same cgroup the one in the lane, which has no other CPU. Where one lies above the other, its own
 * tasks compete with its children, as in choose_at().
 */
__noinline int lane_first(u32 slot, u32 rival)
{
	u64 pair = siblings_of(rival, slot);
	u32 above = (u32)pair;

	if (pair >> 32 != above)
		return !comes_before(rival, slot, 0);
	if (slot == rival)
		return true;
	if (above == rival)
		return before(node_of(child_towards(above, slot))->vtime,
			      node_of(above)->own_vtime);
	return !before(node_of(child_towards(above, rival))->vtime, node_of(above)->own_vtime);
}

/*
 * Note that a task in a lane is given the CPU. Its cgroup and those above it may not be too far
 * behind their siblings, for whom the time goes on. Returns 0.
 */
__noinline int lane_taken(u32 cpu, u32 slot, u64 key)
{
	if (before(*lane_key(cpu), key))
		*lane_key(cpu) = key;
	while (slot && can_loop) {
		struct node *node = node_of(slot), *parent = node_of(node->parent);
		u64 least = parent->vtime_now - LANE_BEHIND_NS;

		if (before(node->vtime, least))
			node->vtime = least;
		if (before(parent->vtime_now, node->vtime))
			parent->vtime_now = node->vtime;
		slot = node->parent;
	}
	return 0;
}

/* The key of a task whose turn in a lane passes, because its cgroup has had more than its share. */
static __always_inline u64 lane_passed(u32 cpu, u32 slot, u64 key)
{
	u64 later = key + flat_time(slot, control.slice_ns);

	if (before(*lane_key(cpu), key))
		*lane_key(cpu) = key;
	return later;
}

#endif
