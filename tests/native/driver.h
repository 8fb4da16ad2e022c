/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Calls of the order for simulated tasks, as sched.bpf.c makes them for real ones: a queue for each
 * cgroup, first in, first out.
 */
#ifndef AGENTCG_NATIVE_DRIVER_H
#define AGENTCG_NATIVE_DRIVER_H

#include "../../bpf/sched_tree.h"

#define START 1000000000000ULL
#define TRIES 64

struct task {
	u32 cgroup, slot, cpu, cpus;
	u64 wakes, to, run, sleep, left;
	bool waits, awake;
	struct task *next;
};

_Thread_local u64 loop_steps, locks_taken;
static struct {
	struct task *first, *last;
} queues[SLOTS];
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
	control.slice_ns = slice;
	control.wait_max_ns = 1000000000000;
	control.boost_lead_ns = 20 * NSEC_PER_MSEC;
	control.penalty_most = 8;
	lead_slices = 2 * cpus + 8;
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

static void driver_enqueue(struct task *task, u64 now)
{
	task->next = NULL;
	if (queues[task->slot].first)
		queues[task->slot].last->next = task;
	else
		queues[task->slot].first = task;
	queues[task->slot].last = task;
	begin_waiting(task->slot, now);
	settle_up(task->slot);
}

/* The first task of a queue that may run on a CPU leaves it; NULL: there is none. */
static struct task *take(u32 slot, u32 cpu)
{
	struct task **link = &queues[slot].first, *before = NULL, *task;

	for (; (task = *link); link = &task->next, before = task) {
		if (!may_run(task, cpu))
			continue;
		*link = task->next;
		if (queues[slot].last == task)
			queues[slot].last = before;
		end_waiting(slot);
		settle_up(slot);
		return task;
	}
	return NULL;
}

static struct task *driver_dispatch(u32 cpu, struct task *prev, u64 now)
{
	u32 left = TRIES;

	if (prev)
		driver_enqueue(prev, now);
	forget_tried(cpu);
	while (left--) {
		u64 turn = choose(0, now, cpu);
		struct task *task;

		if (turn >> 32 == TURN_NONE)
			return NULL;
		task = take(turn, cpu);
		if (task)
			return task;
		mark_tried(cpu, turn);
	}
	return NULL;
}

static void driver_charge(u32 cpu, struct task *task, u64 ran, u64 now)
{
	pay_up(task->slot, ran, now, false);
}

static void driver_stop(u32 cpu, struct task *task, u64 now)
{
}

#endif
