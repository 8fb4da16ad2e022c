/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Lanes: queues of the tasks that may not run on every CPU, one for each set of CPUs. They are not
 * in the tree, because a CPU that looks there would have to pass over what it may not run, and that
 * can be any number of cgroups. A CPU looks at the first task of each lane that it serves: of its
 * own, and of those of the sets that it is in.
 *
 * Each CPU has a lane for the tasks that are bound to it alone. For sets of several CPUs there are
 * SETS lanes, each given to a set while tasks with it come. When there are more sets than that,
 * tasks of the others wait in the lane of one CPU that they may run on.
 *
 * In a lane, tasks are sorted by a key: the flat time of their cgroup (see flat_time) and an
 * offset. A task that comes into a lane begins at the time that the lane has reached; from then on
 * its key follows what its cgroup gets, here and elsewhere. So the tasks of a lane share it by the
 * weights of their cgroups, however far the rest of the machine has come meanwhile.
 *
 * Between two lanes the keys decide as well, with the base of each. Where CPUs are scarce, lanes
 * fall behind others for whom there are more; that tells a CPU of both which comes first. What a
 * lane is behind shrinks all the time by a part, so it is bounded, and the order stays.
 *
 * Between the first of the lanes and the choice of the tree, the virtual times of their ancestors
 * that are siblings decide. A cgroup whose tasks wait for a CPU that serves none falls behind its
 * siblings by `behind_most` at most.
 */
#ifndef AGENTCG_SCHED_LANE_H
#define AGENTCG_SCHED_LANE_H

#include "sched_choice.h"

#define SETS	       64
#define LANES	       (2 * ABI_SCHED_CPUS) /* of the CPUs, then of the sets; a power of two */
#define SET_LANE(set)  (ABI_SCHED_CPUS + (set))
#define SET_UNUSED_NS  (1000 * NSEC_PER_MSEC) /* after which another set may have the lane */
#define LANE_BEHIND_NS (50 * NSEC_PER_MSEC)   /* of virtual time, or more: see begin_order() */
#define LANE_BOOST_NS  (1000 * NSEC_PER_MSEC) /* by which the key of one that goes first is less */
#define LANE_NEARER    32 /* part by which a lane comes nearer to the first one every few ms */
#define CPU_WORDS      (ABI_SCHED_CPUS / 64)

static struct {
	u64 key;     /* the highest one of a task that was given a CPU */
	u64 base;    /* to be added to keys, to compare those of several lanes */
	u64 look_ns; /* when to look for long waits in it */
} __line lanes[LANES];

static struct {
	u64 id;	     /* of its CPUs: see id_of(); 0: free */
	u64 used_ns; /* when a task last came into its lane */
} sets[SETS];

static u64 sets_of[ABI_SCHED_CPUS]; /* bits: the sets that a CPU is in */
static u64 lane_front;		    /* how far the first lane had come, base included */
static u64 behind_most = LANE_BEHIND_NS;

/* CPUs that a task may run on. */
struct cpu_set {
	u64 words[CPU_WORDS];
};

/* A task's place in a lane. */
struct stay {
	u32 lane; /* the one that it was in last, plus one; 0: none */
	u32 set;  /* that it had last */
	u64 offset;
};

/*
 * Set what depends on the number of CPUs. As each of them may run a slice of the same cgroup that
 * has not paid yet, siblings may be that far apart and yet have their shares.
 */
static __always_inline void begin_order(u32 cpus)
{
	u64 apart = 2 * control.slice_ns * cpus;

	own_groups = cpus < STRIPES ? cpus : STRIPES;
	behind_most = apart > LANE_BEHIND_NS ? apart : LANE_BEHIND_NS;
}

/* The key of the first task in a lane. Returns whether there is one. */
static __always_inline bool lane_head(u32 lane, u64 *key);

static __always_inline u32 in_lanes(u32 lane)
{
	return MASKED(lane, LANES - 1);
}

/* How far a key is, to be compared with that of another lane. */
static __always_inline u64 lane_place(u32 lane, u64 key)
{
	return key + lanes[in_lanes(lane)].base;
}

/* Note how far a lane has come. */
static __always_inline void lane_reach(u32 lane, u64 key)
{
	if (before(lanes[in_lanes(lane)].key, key))
		lanes[in_lanes(lane)].key = key;
}

/* --- The lane of a set --- */

/* A number that tells a set from others; of up to 64 CPUs exactly. */
static __always_inline u64 id_of(struct cpu_set *cpus, u32 words)
{
	u64 id = cpus->words[0];

	for (u32 i = 1; i < CPU_WORDS; i++)
		if (i < words)
			id = id * DICE + cpus->words[i];
	return id ?: 1;
}

/* Note which CPUs are in a set that was given a lane. Returns 0. */
__noinline int set_members(u32 set, struct cpu_set *cpus, u32 count)
{
	u64 bit = 1ULL << MASKED(set, SETS - 1);
	u32 cpu = READ_ONCE(from_zero), lane = SET_LANE(set);

	if (!cpus)
		return 0;
	while (cpu < count && can_loop) {
		u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);

		if (cpus->words[at / 64] & 1ULL << at % 64) {
			__sync_fetch_and_or(&sets_of[at], bit);
			lane_reach(lane,
				   lane_place(at, lanes[at].key) - lanes[in_lanes(lane)].base);
		} else
			__sync_fetch_and_and(&sets_of[at], ~bit);
		cpu++;
	}
	return 0;
}

/**
 * find_set - find the lane of a set of CPUs, or give it one
 * @cpus: the set
 * @count: CPUs of the machine
 * @hint: the lane's number, if it has not changed
 * @now: the time
 *
 * A task that waits in a lane which is given away, or which comes into it just then, is moved to
 * the lane of a CPU by the first CPU that finds it there.
 *
 * Return: the number, plus one; 0: all lanes are used by other sets.
 */
__noinline u32 find_set(struct cpu_set *cpus, u32 count, u32 hint, u64 now)
{
	struct guard *guard = guard_of(GUARD_SETS);
	u32 set = READ_ONCE(from_zero), unused = READ_ONCE(from_zero);
	u64 id, key;

	if (!cpus || !guard)
		return 0;
	id = id_of(cpus, (count + 63) / 64);
	hint = MASKED(hint, SETS - 1);
	if (sets[hint].id == id) {
		sets[hint].used_ns = now;
		return hint + 1;
	}
	while (set < SETS && can_loop) {
		u64 at = MASKED(set, SETS - 1);

		if (sets[at].id == id)
			return at + 1;
		if (!unused && (!sets[at].id || (before(sets[at].used_ns + SET_UNUSED_NS, now) &&
						 !lane_head(SET_LANE(at), &key))))
			unused = at + 1;
		set++;
	}
	if (!unused)
		return 0;
	set = MASKED(unused - 1, SETS - 1);
	bpf_spin_lock(&guard->lock);
	if (sets[set].id && before(now, sets[set].used_ns + SET_UNUSED_NS))
		unused = 0;
	if (unused) {
		sets[set].id = id;
		sets[set].used_ns = now;
	}
	bpf_spin_unlock(&guard->lock);
	if (unused)
		set_members(set, cpus, count);
	return unused;
}

static __always_inline bool is_in_set(u32 cpu, u32 set)
{
	return sets_of[MASKED(cpu, ABI_SCHED_CPUS - 1)] >> set & 1;
}

/* --- The order in a lane, and between lanes --- */

/* The time by which the tasks of a cgroup are sorted in lanes. */
__noinline u64 lane_time(u32 slot)
{
	u64 time = node_of(slot)->flat;

	while (slot && can_loop) {
		time += node_of(slot)->put_off;
		slot = node_of(slot)->parent;
	}
	return time;
}

/* The key that a task has in its lane now, if it runs or waits for long. */
static __always_inline u64 lane_key_of(u32 slot, struct stay *stay)
{
	return lane_time(slot) + stay->offset;
}

/**
 * lane_enter - the key of a task that begins to wait in a lane
 * @slot: its cgroup
 * @stay: its place in the lane where it was last
 * @lane: the lane
 * @cpu: the CPU that it ran on last
 * @woke: whether it slept; if it did not, it may be behind the others
 *
 * What it is ahead of the others in the lane that it comes from, it is ahead here too.
 */
static __always_inline u64 lane_enter(u32 slot, struct stay *stay, u32 lane, u32 cpu, bool woke)
{
	struct node *node = node_of(slot);
	bool stays = stay->lane == lane + 1;
	s64 ahead = 0;
	u64 key;

	if (stay->lane)
		ahead = lane_key_of(slot, stay) - lanes[in_lanes(stay->lane - 1)].key;
	if (ahead < 0 && (woke || !stays))
		ahead = 0;
	/* Nobody may have come into it for long, while the CPU served others. */
	if (lane >= SET_LANE(0) && (woke || !stays) && is_in_set(cpu, lane - SET_LANE(0))) {
		key = lane_place(cpu, lanes[in_lanes(cpu)].key);
		lane_reach(lane, key - lanes[in_lanes(lane)].base);
	}
	key = lanes[in_lanes(lane)].key + ahead;
	node->has_lane = 1;
	stay->lane = lane + 1;
	stay->offset = key - lane_time(slot);
	return key;
}

/* The lane of a CPU's with the task that comes first, plus one; 0: no task waits in one. */
__noinline u32 first_lane(u32 cpu)
{
	u32 lane = MASKED(cpu, ABI_SCHED_CPUS - 1), set = READ_ONCE(from_zero),
	    best = READ_ONCE(from_zero);
	u64 left = sets_of[lane], least = 0, key;

	while (can_loop) {
		if (lane_head(lane, &key) && (!best || before(lane_place(lane, key), least))) {
			best = lane + 1;
			least = lane_place(lane, key);
		}
		while (left && !(left & 1) && can_loop) {
			left >>= 1;
			set++;
		}
		if (!left)
			break;
		lane = SET_LANE(set);
		left >>= 1;
		set++;
	}
	return best;
}

/*
 * Bring a lane nearer to the one that has come furthest; `most`: the furthest seen so far. Called
 * by the timer.
 */
static __always_inline void lane_nearer(u32 lane, u64 *most)
{
	u64 place = lane_place(lane, lanes[in_lanes(lane)].key);

	if (before(place, lane_front))
		lanes[in_lanes(lane)].base += (lane_front - place) / LANE_NEARER;
	if (before(*most, place))
		*most = place;
}

/*
 * The child of a cgroup that another one below it lies in, or is.
 */
__noinline u32 child_towards(u32 above, u32 slot)
{
	while (slot && node_of(slot)->parent != above && can_loop)
		slot = node_of(slot)->parent;
	return slot;
}

/*
 * Whether the turn is a cgroup's in a lane, before the one that the tree has chosen. Of the same
 * cgroup the one in the lane, which has fewer CPUs. Where one lies above the other, its own tasks
 * compete with its children, as in choose_at().
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
 * Note that a task in a lane is given a CPU. Its cgroup and those above it may not be too far
 * behind their siblings, for whom the time goes on. Returns 0.
 */
__noinline int lane_taken(u32 lane, u32 cpu, u32 slot, u64 key)
{
	lane_reach(lane, key);
	if (lane != cpu)
		lane_reach(cpu, lane_place(lane, key) - lanes[in_lanes(cpu)].base);
	while (slot && can_loop) {
		struct node *node = node_of(slot), *parent = node_of(node->parent);
		u64 least = parent->vtime_now - behind_most;

		if (before(node->vtime, least))
			node->vtime = least;
		if (before(parent->vtime_now, node->vtime))
			parent->vtime_now = node->vtime;
		slot = node->parent;
	}
	return 0;
}

/**
 * lane_passed - the key of a task whose turn in a lane passes, because its cgroup, or one above it,
 *		 has had more than its share
 * @slot: its cgroup
 * @rival: the cgroup that the tree has chosen
 * @stay: its place
 * @key: its key as it stands
 *
 * The cgroup's tasks come when its siblings will have had as much. All of them, not only this one:
 * so calls keep their shares of what their session gets.
 */
__noinline u64 lane_passed(u32 slot, u32 rival, struct stay *stay, u64 key)
{
	u64 pair = siblings_of(rival, slot), least = control.slice_ns / GRAINS, now;
	struct node *node = node_of((u32)pair);
	s64 lead = (node->vtime - node_of(pair >> 32)->vtime) * node->weight / WEIGHT_DEFAULT;

	if (!stay)
		return key;
	now = lane_key_of(slot, stay);
	if (before(now, key + least)) {
		__sync_fetch_and_add(&node->put_off,
				     flat_time(pair, lead > (s64)least ? lead : least));
		now = lane_key_of(slot, stay);
	}
	return before(now, key + least) ? key + least : now;
}

#endif
