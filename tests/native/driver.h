/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Calls of the order for simulated tasks, as sched.bpf.c makes them for real ones: a queue for each
 * cgroup, first in, first out, and a lane for each CPU, sorted by key.
 */
#ifndef AGENTCG_NATIVE_DRIVER_H
#define AGENTCG_NATIVE_DRIVER_H

#include "../../bpf/sched_lane.h"

#define START	   1000000000000ULL
#define TRIES	   8
#define LANE_TRIES 8

struct task {
	u32 cgroup, slot, cpu, cpus, last_cpu;
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
} lists[ABI_SCHED_CPUS];
static u32 driver_cpus;

static bool may_run(struct task *task, u32 cpu)
{
	return (cpu + driver_cpus - task->cpu) % driver_cpus < task->cpus;
}

static void driver_begin(void)
{
	nodes[0].weight = WEIGHT_DEFAULT;
}

static void driver_start(u32 cpus, u64 slice)
{
	driver_cpus = cpus;
	own_groups = cpus < STRIPES ? cpus : STRIPES;
	control.slice_ns = slice;
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
static void lane_insert(u32 cpu, struct task *task)
{
	struct task **link = &lists[cpu].first;

	while (*link && !before(task->key, (*link)->key))
		link = &(*link)->next;
	task->next = *link;
	*link = task;
	lists[cpu].count++;
}

static struct task *lane_pop(u32 cpu)
{
	struct task *task = lists[cpu].first;

	lists[cpu].first = task->next;
	lists[cpu].count--;
	return task;
}

/* The CPU of a task that is not free: where it was, or where fewer wait. */
static u32 lane_for(struct task *task)
{
	u32 other = (task->cpu + rand() % task->cpus) % driver_cpus;

	if (!may_run(task, task->last_cpu))
		return other;
	return lists[other].count < lists[task->last_cpu].count ? other : task->last_cpu;
}

/* A task has to wait; `idle` is a CPU that has nothing to do and may run it, -1: there is none. */
static void driver_enqueue(struct task *task, u64 now, bool woke, int idle)
{
	u32 cpu;

	if (woke && !node_of(task->slot)->runnable++)
		activate_up(task->slot);
	if (task->cpus < driver_cpus) {
		cpu = idle >= 0 ? (u32)idle : lane_for(task);
		task->key = lane_enter(task->slot, &task->stay, cpu);
		lane_insert(cpu, task);
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

/* The task of a CPU's lane that comes before the tree's choice; NULL: there is none. */
static struct task *take_from_lane(u32 cpu, u64 turn)
{
	for (u32 left = LANE_TRIES; left && lists[cpu].first; left--) {
		struct task *task = lane_pop(cpu);

		if (turn >> 32 == TURN_NONE || lane_first(task->slot, turn)) {
			lane_taken(cpu, task->slot, task->key);
			return task;
		}
		task->key = lane_passed(cpu, task->slot, task->key);
		lane_insert(cpu, task);
	}
	return NULL;
}

/* The first task of another CPU's lane that may run on this one; NULL: none of those looked at. */
static struct task *steal(u32 cpu)
{
	for (u32 other = 0; other < driver_cpus; other++) {
		if (other != cpu && lists[other].first && may_run(lists[other].first, cpu)) {
			struct task *task = lane_pop(other);

			lane_taken(other, task->slot, task->key);
			return task;
		}
	}
	return NULL;
}

static struct task *driver_dispatch(u32 cpu, struct task *prev, u64 now)
{
	struct task *task = NULL;

	if (prev)
		driver_enqueue(prev, now, false, prev->cpus < driver_cpus ? (int)cpu : -1);
	for (u32 left = TRIES; left && !task; left--) {
		u64 turn = choose(0, now);

		task = take_from_lane(cpu, turn);
		if (!task && turn >> 32 != TURN_NONE)
			task = take(turn);
	}
	if (!task)
		task = steal(cpu);
	if (task) {
		task->last_cpu = cpu;
		lend(cpu, task->slot);
	}
	return task;
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
