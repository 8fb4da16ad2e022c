/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Calls of the order for simulated tasks, as sched.bpf.c makes them for real ones: a queue for each
 * cgroup, first in, first out, and lanes, sorted by key.
 */
#ifndef AGENTCG_NATIVE_DRIVER_H
#define AGENTCG_NATIVE_DRIVER_H

#include "../../bpf/sched_lane.h"

#define START	   1000000000000ULL
#define TRIES	   8
#define LANE_TRIES 8

struct task {
	u32 cgroup, slot, count, last_cpu;
	struct cpu_set cpus;
	u64 wakes, to, run, sleep, left, key;
	bool waits, awake;
	struct stay stay;
	struct task *next;
};

_Thread_local u64 loop_steps, locks_taken;
_Thread_local u32 this_thread;
static struct {
	struct task *first, *last;
} queues[SLOTS];
static struct {
	struct task *first;
	u32 count;
} lists[LANES];
static u32 driver_cpus;

static bool may_run(struct task *task, u32 cpu)
{
	return task->cpus.words[cpu / 64] >> cpu % 64 & 1;
}

static __always_inline bool lane_head(u32 lane, u64 *key)
{
	struct task *first = lists[lane].first;

	if (first)
		*key = first->key;
	return first;
}

static void driver_begin(void)
{
	nodes[0].weight = WEIGHT_DEFAULT;
}

static void driver_start(u32 cpus, u64 slice)
{
	driver_cpus = cpus;
	control.slice_ns = slice;
	begin_order(cpus);
	control.wait_max_ns = 1000000000000;
	control.boost_lead_ns = 20 * NSEC_PER_MSEC;
	control.penalty_most = 8;
}

static u32 driver_cgroup(u32 parent, u32 weight)
{
	u32 slot = take_slot();

	node_of(slot)->parent = parent;
	node_of(slot)->depth = node_of(parent)->depth + 1;
	node_of(slot)->weight = weight;
	cgroup_of(slot)->cgroup_id = slot;
	return slot;
}

/* Put a task with a key into a lane, behind those with the same. */
static void lane_insert(u32 lane, struct task *task)
{
	struct task **link = &lists[lane].first;

	while (*link && !before(task->key, (*link)->key))
		link = &(*link)->next;
	task->next = *link;
	*link = task;
	lists[lane].count++;
}

static struct task *lane_pop(u32 lane)
{
	struct task *task = lists[lane].first;

	lists[lane].first = task->next;
	lists[lane].count--;
	return task;
}

static u32 any_cpu(struct task *task)
{
	u32 cpu = rand() % driver_cpus;

	while (!may_run(task, cpu))
		cpu = (cpu + 1) % driver_cpus;
	return cpu;
}

/* The CPU for which a task is to wait if no lane is left for its set. */
static u32 one_cpu(struct task *task)
{
	u32 other = any_cpu(task);

	return lists[other].count < lists[task->last_cpu].count ? other : task->last_cpu;
}

static u32 lane_for(struct task *task, u64 now)
{
	u32 set = 0;

	if (task->count > 1)
		set = find_set(&task->cpus, driver_cpus, task->stay.set, now);
	if (!set)
		return one_cpu(task);
	task->stay.set = set - 1;
	return SET_LANE(set - 1);
}

/* A task has to wait. */
static void driver_enqueue(struct task *task, u64 now, bool woke)
{
	u32 lane;

	if (woke && !node_of(task->slot)->runnable++)
		activate_up(task->slot);
	if (task->count < driver_cpus) {
		if (!may_run(task, task->last_cpu))
			task->last_cpu = any_cpu(task);
		lane = lane_for(task, now);
		task->key = lane_enter(task->slot, &task->stay, lane, task->last_cpu, woke);
		lane_insert(lane, task);
		return;
	}
	task->next = NULL;
	if (queues[task->slot].first)
		queues[task->slot].last->next = task;
	else
		queues[task->slot].first = task;
	queues[task->slot].last = task;
	begin_waiting(task->slot, now);
	settle_up(task->slot, !woke);
}

/* The first task of a queue leaves it; NULL: there is none. */
static struct task *take(u32 slot)
{
	struct task *task = queues[slot].first;

	if (!task)
		return NULL;
	queues[slot].first = task->next;
	end_waiting(slot);
	settle_up(slot, false);
	return task;
}

/* The task of a lane of a CPU's that comes before the tree's choice; NULL: there is none. */
static struct task *take_from_lane(u32 cpu, u64 turn)
{
	for (u32 left = LANE_TRIES, lane; left && (lane = first_lane(cpu)); left--) {
		struct task *task = lane_pop(--lane);

		if (!may_run(task, cpu)) {
			lane = one_cpu(task);
			task->key = lane_enter(task->slot, &task->stay, lane, cpu, true);
		} else if (turn >> 32 == TURN_NONE || lane_first(task->slot, turn)) {
			lane_taken(lane, cpu, task->slot, task->key);
			return task;
		} else {
			task->key = lane_passed(task->slot, turn, &task->stay, task->key);
		}
		lane_insert(lane, task);
	}
	return NULL;
}

static struct task *driver_dispatch(u32 cpu, struct task *prev, u64 now)
{
	struct task *task = NULL;

	if (prev)
		driver_enqueue(prev, now, false);
	for (u32 left = TRIES; left && !task; left--) {
		u64 turn = choose(0, now);

		task = take_from_lane(cpu, turn);
		if (!task && turn >> 32 != TURN_NONE)
			task = take(turn);
	}
	if (task) {
		task->last_cpu = cpu;
		lend(cpu, task->slot);
	}
	return task;
}

/* What the timer does to lanes. */
static void driver_tick(void)
{
	u64 most = lane_front;

	for (u32 lane = 0; lane < SET_LANE(SETS); lane++)
		if (lane < driver_cpus || lane >= SET_LANE(0))
			lane_nearer(lane, &most);
	lane_front = most;
}

static void driver_charge(u32 cpu, struct task *task, u64 ran, u64 now)
{
	pay_up(task->slot, ran, now, false, cpu);
}

/* A task that was running sleeps, or has ended. */
static void driver_stop(u32 cpu, struct task *task, u64 now)
{
	if (!--node_of(task->slot)->runnable)
		activate_up(task->slot);
}

#endif
