/* SPDX-License-Identifier: GPL-2.0 */
/* Moves of waiting tasks: to a CPU, and between queues and lanes. */
#ifndef AGENTCG_SCHED_MOVES_H
#define AGENTCG_SCHED_MOVES_H

#include "sched_task.h"

/* Whether a task that waits may be given a CPU. */
static __always_inline bool may_run_on(struct task_struct *p, u32 cpu)
{
	if (is_fixed(p) && scx_bpf_task_cpu(p) != (s32)cpu)
		return false;
	return bpf_cpumask_test_cpu(cpu, fields(p)->cpus_ptr);
}

#define NONE_MOVED	0 /* results of move_oldest(); any other is a time to look again */
#define MOVED_HERE	1
#define MOVED_ELSEWHERE 2

/**
 * move_oldest - give the task that has waited longest in a queue or lane a CPU
 * @queue: the DSQ
 * @now: the time
 *
 * Only tasks count that have waited for half of wait_max_ns. A task that may not run on this CPU
 * gets one that it may run on. In a queue with very many tasks the first ones are looked at.
 *
 * Return: see above; a time if none has waited for that long yet.
 */
__noinline u64 move_oldest(u64 queue, u64 now)
{
	u32 cpu = bpf_get_smp_processor_id(), left = looked_most;
	u64 long_ns = control.wait_max_ns / 2, oldest = now, result = NONE_MOVED;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;
	s32 pid = 0;

	if (!bpf_iter_scx_dsq_new(&it, queue, 0)) {
		while (left-- && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);

			if (task && task->since_ns && before(task->since_ns, oldest)) {
				oldest = task->since_ns;
				pid = p->pid;
			}
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	if (!pid)
		return NONE_MOVED;
	if (before(now, oldest + long_ns))
		return oldest + long_ns;
	if (!bpf_iter_scx_dsq_new(&it, queue, 0)) {
		while ((p = bpf_iter_scx_dsq_next(&it))) {
			s32 there = scx_bpf_task_cpu(p);

			if (p->pid != pid)
				continue;
			if (may_run_on(p, cpu)) {
				if (scx_bpf_dsq_move(&it, p, DSQ_LOCAL, 0))
					result = MOVED_HERE;
				break;
			}
			if (!may_run_on(p, there))
				there = bpf_cpumask_any_distribute(fields(p)->cpus_ptr);
			if (may_run_on(p, there) &&
			    scx_bpf_dsq_move(&it, p, DSQ_LOCAL_ON | there, 0))
				result = MOVED_ELSEWHERE;
			break;
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return result;
}

/* Add up what a CPU has counted, and have it choose if it is idle and may have a task. */
static long visit(u32 cpu, u64 *sums)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);

	sums[0] += counts[at].waiting;
	sums[1] += counts[at].in_lanes;
	sums[2] += counts[at].picks;
	if (running_on[at].slot || control.stall_on_purpose)
		return 0;
	if (wants(0) || scx_bpf_dsq_nr_queued(LANE(cpu)) > 0)
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	return 0;
}

/* Visit all CPUs: one may have become idle just when a task was queued. */
static __always_inline void visit_all(void)
{
	u64 sums[3] = {};

	bpf_loop(scx_bpf_nr_cpu_ids(), visit, sums, 0);
	control.waiting = sums[0];
	control.in_lanes = sums[1];
	control.picks = sums[2];
}

/* Let the running task go on for a slice, unless one in its queue has a lower virtual time. */
static __always_inline bool keep(struct task_struct *prev, struct task *task, u32 slot)
{
	struct task_struct *head = scx_bpf_dsq_peek(QUEUE(slot));

	if (head && before(fields(head)->scx.dsq_vtime, task->vtime))
		return false;
	scx_bpf_task_set_slice(prev, slice_of(slot));
	return true;
}

/* Note that the task that was running on a CPU goes on; no other callback tells that. */
static __always_inline void keep_on(u64 at, u64 now)
{
	running_on[at].next = TURN_NONE;
	running_on[at].turn = TURN_KEEP;
	running_on[at].since_ns = now;
	running_on[at].taken = 0;
}

/* --- Lanes --- */

/* Put a task of a paused cgroup, found in a lane, into the cgroup's queue until that goes on. */
static __always_inline void park(struct bpf_iter_scx_dsq *it, struct task_struct *p,
				 struct task *task, u64 now)
{
	u32 slot = within(task->queued);

	if (__sync_val_compare_and_swap(&task->place, PLACE_LANE, PLACE_PARKED) != PLACE_LANE)
		return;
	counts[my_row()].in_lanes--;
	__sync_fetch_and_add(&node_of(slot)->parked, 1);
	begin_waiting(slot, now);
	settle_up(slot, false);
	scx_bpf_dsq_move_set_vtime(it, task->vtime);
	scx_bpf_dsq_move_vtime(it, p, QUEUE(slot), 0);
}

/* Move tasks that are parked in a cgroup's queue to lanes, at most `parked_most`. Returns 0. */
__noinline int unpark(u32 slot)
{
	u32 left = parked_most;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	if (!bpf_iter_scx_dsq_new(&it, QUEUE(slot), 0)) {
		while (left-- && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);
			u32 cpu;

			if (!task || __sync_val_compare_and_swap(&task->place, PLACE_PARKED,
								 PLACE_LANE) != PLACE_PARKED)
				continue;
			leave(task, PLACE_PARKED);
			counts[my_row()].in_lanes++;
			cpu = MASKED(lane_for(p), ABI_SCHED_CPUS - 1);
			scx_bpf_dsq_move_set_vtime(&it, lane_enter(slot, &task->stay, cpu));
			scx_bpf_dsq_move_vtime(&it, p, LANE(cpu), 0);
			scx_bpf_kick_cpu(cpu, KICK_IDLE);
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return 0;
}

/* Result of lane_turn(). */
enum lane_turn {
	LANE_NOT = 0, /* it is the turn of the tree's choice, or there is nothing in the lane */
	LANE_MOVED = 1,
	LANE_KEEP = 2, /* the task that was running, which would be in the lane, goes on */
};

/**
 * lane_turn - give a CPU to the first task of its lane, if that comes before the tree's choice
 * @cpu: the CPU
 * @rival: slot, plus one, of the tree's choice; 0: there is none
 * @prev: slot, plus one, of the task that ran on the CPU, would be in the lane and could go on; 0:
 *        there is none
 * @prev_key: the key of that task
 * @now: the time
 *
 * Return: enum lane_turn.
 */
__noinline int lane_turn(u32 cpu, u32 rival, u32 prev, u64 prev_key, u64 now)
{
	u32 at = MASKED(cpu, ABI_SCHED_CPUS - 1), left = lane_tries;
	int result = LANE_NOT;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	if (!bpf_iter_scx_dsq_new(&it, LANE(at), 0)) {
		while (left-- && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);
			u32 slot, other;
			bool boost;
			u64 key;

			if (!task)
				continue;
			slot = within(task->queued);
			if (is_held(slot, now)) {
				park(&it, p, task, now);
				continue;
			}
			if (!may_run_on(p, at)) {
				other = MASKED(lane_for(p), ABI_SCHED_CPUS - 1);
				scx_bpf_dsq_move_set_vtime(&it,
							   lane_enter(slot, &task->stay, other));
				scx_bpf_dsq_move_vtime(&it, p, LANE(other), 0);
				continue;
			}
			boost = task->boosted && may_boost(slot, now);
			key = lane_key_of(slot, &task->stay);
			if (!boost && prev && !before(key, prev_key))
				break;
			if (!boost && rival && !lane_first(slot, rival - 1)) {
				task->boosted = 0;
				key = lane_passed(at, slot, key);
				task->stay.offset = key - node_of(slot)->flat;
				scx_bpf_dsq_move_set_vtime(&it, key);
				scx_bpf_dsq_move_vtime(&it, p, LANE(at), 0);
				continue;
			}
			/* Set before the move, during which the kernel may call running(). */
			running_on[at].next = boost ? TURN_BOOST : TURN_TREE;
			if (scx_bpf_dsq_move(&it, p, DSQ_LOCAL, 0)) {
				lane_taken(at, slot, key);
				lend(at, slot);
				result = LANE_MOVED;
				break;
			}
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	if (result == LANE_NOT && prev && (!rival || lane_first(prev - 1, rival - 1))) {
		lane_taken(at, prev - 1, prev_key);
		result = LANE_KEEP;
	}
	return result;
}

/* Take the first task of another CPU's lane, if that may run here. Returns whether it was moved. */
__noinline int steal_from(u32 cpu, u32 from, u64 now)
{
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;
	bool moved = false;

	if (scx_bpf_dsq_nr_queued(LANE(from)) <= 0)
		return false;
	if (!bpf_iter_scx_dsq_new(&it, LANE(from), 0)) {
		p = bpf_iter_scx_dsq_next(&it);
		if (p) {
			struct task *task = task_of(p);

			if (task && may_run_on(p, cpu) && !is_held(task->queued, now))
				moved = scx_bpf_dsq_move(&it, p, DSQ_LOCAL, 0);
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return moved;
}

/* Look into some lanes of other CPUs, each time into others. Returns whether a task was moved. */
__noinline int steal(u32 cpu, u64 now)
{
	u32 at = MASKED(cpu, ABI_SCHED_CPUS - 1), cpus = scx_bpf_nr_cpu_ids();
	u32 from = running_on[at].steal_from, left = stolen_most < cpus ? stolen_most : cpus;
	bool moved = false;

	running_on[at].next = TURN_TREE;
	while (left-- && !moved && can_loop) {
		if (++from >= cpus)
			from = 0;
		if (from != at)
			moved = steal_from(at, from, now);
	}
	running_on[at].steal_from = from;
	return moved;
}

/* Look for long waits in a lane when it is time. Returns whether a task was moved to this CPU. */
__noinline int rescue_in_lane(u32 cpu, u32 of, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1), lane = MASKED(of, ABI_SCHED_CPUS - 1), moved;

	if (before(now, running_on[lane].look_ns) || scx_bpf_dsq_nr_queued(LANE(lane)) <= 0)
		return false;
	running_on[at].next = TURN_RESCUE;
	moved = move_oldest(LANE(lane), now);
	running_on[lane].look_ns = now + control.wait_max_ns / RESCUED_MOST;
	return moved == MOVED_HERE;
}

/*
 * Look for long waits in a CPU's own lane and in that of one other, each time of another one, which
 * may be a CPU that serves none of our tasks or is offline. Returns whether a task was moved to
 * this CPU.
 */
__noinline int rescue_in_lanes(u32 cpu, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 other = running_on[at].look_at + 1;

	if (other >= scx_bpf_nr_cpu_ids())
		other = 0;
	running_on[at].look_at = other;
	return rescue_in_lane(at, at, now) || rescue_in_lane(at, other, now);
}

/* Give the task that has waited longest in a cgroup's queue a turn. Returns whether on this CPU. */
__noinline int rescue(u32 cpu, u32 slot, u64 now)
{
	u64 found, again = 0;

	running_on[MASKED(cpu, ABI_SCHED_CPUS - 1)].next = TURN_RESCUE;
	found = move_oldest(QUEUE(slot), now);
	if (found == NONE_MOVED)
		again = now + control.slice_ns;
	else if (found != MOVED_HERE && found != MOVED_ELSEWHERE)
		again = found;
	rescue_again(slot, again, now);
	return found == MOVED_HERE;
}

#endif
