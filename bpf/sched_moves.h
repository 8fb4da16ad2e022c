/* SPDX-License-Identifier: GPL-2.0 */
/* Moves of waiting tasks: to a CPU, and between queues and lanes. */
#ifndef AGENTCG_SCHED_MOVES_H
#define AGENTCG_SCHED_MOVES_H

#include "sched_hold.h"

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
	u32 cpu = bpf_get_smp_processor_id(), left = READ_ONCE(looked_most);
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

/* What the timer finds. */
struct visits {
	u64 waiting;
	u64 in_lanes;
	u64 picks;
	u64 filled; /* bits: the sets in whose lanes tasks wait */
	u64 front;
	bool is_due; /* whether tasks are to be moved that wait elsewhere */
};

/* Add up what a CPU has counted, and have it choose if it is idle and may have a task. */
static long visit(u32 cpu, struct visits *all)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);

	all->waiting += counts[at].waiting;
	all->in_lanes += counts[at].in_lanes;
	all->picks += counts[at].picks;
	lane_nearer(at, &all->front);
	if (running_on[at].slot || control.stall_on_purpose)
		return 0;
	if (all->is_due || wants(0) || sets_of[at] & all->filled ||
	    scx_bpf_dsq_nr_queued(LANE(cpu)) > 0)
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	return 0;
}

static long visit_set(u32 set, struct visits *all)
{
	lane_nearer(SET_LANE(set), &all->front);
	if (scx_bpf_dsq_nr_queued(LANE(SET_LANE(set))) > 0)
		all->filled |= 1ULL << set;
	return 0;
}

/* Visit all sets and CPUs: one may have become idle just when a task was queued. */
static __always_inline void visit_all(u64 now)
{
	struct visits all = { .front = lane_front };
	struct task_struct *head = scx_bpf_dsq_peek(AT_EXEC);

	all.is_due = has_any(&paused) || (head && before(fields(head)->scx.dsq_vtime, now));
	bpf_loop(SETS, visit_set, &all, 0);
	bpf_loop(scx_bpf_nr_cpu_ids(), visit, &all, 0);
	lane_front = all.front;
	control.waiting = all.waiting;
	control.in_lanes = all.in_lanes;
	control.picks = all.picks;
}

/* Let the running task go on for a slice, unless one in its queue has a lower virtual time. */
static __always_inline bool keep(struct task_struct *prev, struct task *task, u32 slot)
{
	struct task_struct *head = scx_bpf_dsq_peek(QUEUE(slot));

	if (head && before(fields(head)->scx.dsq_vtime, task->vtime))
		return false;
	went_on(task);
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

/* --- A CPU for a task that wakes --- */

/**
 * can_take - whether a CPU's task has to make room for one that wakes
 * @at: the CPU
 * @slot: cgroup of the task that wakes
 * @boost: whether that task may go ahead of others
 * @now: the time
 *
 * It has to if it is a task of this scheduler that does not itself go ahead of others. If @boost is
 * false, it must also have had a quarter of its slice, and its cgroup must come after @slot. Times
 * are compared with their sign: another CPU may have switched since @now was read.
 */
__noinline int can_take(u32 at, u32 slot, u32 boost, u64 now)
{
	u64 cpu = MASKED(at, ABI_SCHED_CPUS - 1), unpaid = 0;
	u32 running = running_on[cpu].slot;

	if (!running || running_on[cpu].turn == TURN_BOOST || running_on[cpu].taken)
		return false;
	if (boost)
		return true;
	if ((s64)(now - running_on[cpu].since_ns) <= (s64)(control.slice_ns / PROTECTED_PART))
		return false;
	if (before(running_on[cpu].paid_ns, now))
		unpaid = now - running_on[cpu].paid_ns;
	return comes_before(slot, running - 1, unpaid);
}

/*
 * Find such a CPU among those that a task may run on, beginning at its own. Returns the CPU, plus
 * one; 0: none of those looked at.
 */
static __noinline u32 find_victim(struct task_struct *p, u32 slot, u32 boost, u64 now)
{
	u32 cpus = scx_bpf_nr_cpu_ids(), cpu = scx_bpf_task_cpu(p), left = READ_ONCE(victims);

	while (left-- && can_loop) {
		if (bpf_cpumask_test_cpu(cpu, fields(p)->cpus_ptr) &&
		    can_take(cpu, slot, boost, now))
			return cpu + 1;
		if (++cpu >= cpus)
			cpu = 0;
	}
	return 0;
}

/* Have a CPU choose that can take a task which was just queued: an idle one, or for one that woke
 * another. The kernel carries out a kick after this callback, when the task is in its queue. */
static __always_inline void find_cpu(struct task_struct *p, u32 slot, u32 boost, u64 now,
				     u64 enq_flags)
{
	s32 idle = -1;
	u32 victim;

	if (is_fixed(p))
		scx_bpf_kick_cpu(scx_bpf_task_cpu(p), KICK_IDLE);
	else
		idle = scx_bpf_pick_idle_cpu(fields(p)->cpus_ptr, 0);
	if (idle >= 0) {
		scx_bpf_kick_cpu(idle, KICK_IDLE);
		return;
	}
	victim = enq_flags & ENQ_WAKEUP ? find_victim(p, slot, boost, now) : 0;
	if (!victim)
		return;
	running_on[MASKED(victim - 1, ABI_SCHED_CPUS - 1)].taken = 1;
	__sync_fetch_and_add(&control.preempted, 1);
	scx_bpf_kick_cpu(victim - 1, KICK_PREEMPT);
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

/* Move a task from its cgroup's queue, where it is at a place, to its lane. Returns whether it was.
 */
static __always_inline bool to_lane(struct bpf_iter_scx_dsq *it, struct task_struct *p,
				    struct task *task, u32 place, u64 now)
{
	u32 slot = within(task->queued), lane;

	if (__sync_val_compare_and_swap(&task->place, place, PLACE_LANE) != place)
		return false;
	leave(task, place);
	counts[my_row()].in_lanes++;
	lane = lane_for(p, task, now);
	scx_bpf_dsq_move_set_vtime(it,
				   lane_enter(slot, &task->stay, lane, scx_bpf_task_cpu(p), true));
	scx_bpf_dsq_move_vtime(it, p, LANE(lane), 0);
	scx_bpf_kick_cpu(scx_bpf_task_cpu(p), KICK_IDLE);
	return true;
}

/*
 * Move tasks that are parked in a cgroup's queue to lanes, at most `parked_most`, of the first
 * `looked_most`. Returns how many.
 */
__noinline int unpark(u32 slot, u64 now)
{
	u32 seen = READ_ONCE(from_zero), moved = READ_ONCE(from_zero);
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	if (!bpf_iter_scx_dsq_new(&it, QUEUE(slot), 0)) {
		while (seen++ < looked_most && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);

			if (!task || !to_lane(&it, p, task, PLACE_PARKED, now))
				continue;
			if (++moved >= parked_most)
				break;
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return moved;
}

/*
 * Move tasks of a paused cgroup that may be in the kernel to lanes, at most `parked_most`, of the
 * first `looked_most` in its queue. Returns 0.
 */
__noinline int unpark_inside(u32 slot, u64 now)
{
	u32 seen = READ_ONCE(from_zero), moved = READ_ONCE(from_zero), place;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	if (!bpf_iter_scx_dsq_new(&it, QUEUE(slot), 0)) {
		while (seen++ < looked_most && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);

			if (!task)
				continue;
			place = READ_ONCE(task->place);
			if ((place != PLACE_QUEUE && place != PLACE_PARKED) || may_stop(p, task))
				continue;
			to_lane(&it, p, task, place, now);
			if (++moved >= parked_most) {
				node_of(slot)->inside = INSIDE_LOOKS;
				break;
			}
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return 0;
}

/* --- Programs that are held at their exec --- */

/*
 * Let a program that waits at its exec run: put it into its cgroup's queue, or into a lane. Returns
 * whether it was there.
 */
static __always_inline bool let_run(struct bpf_iter_scx_dsq *it, struct task_struct *p,
				    struct task *task, u64 now)
{
	u32 slot = within(task->queued), lane;
	bool bound = is_bound(p);

	if (__sync_val_compare_and_swap(&task->place, PLACE_AT_EXEC,
					bound ? PLACE_LANE : PLACE_QUEUE) != PLACE_AT_EXEC)
		return false;
	if (bound) {
		/* One instruction, as in begin_waiting(). */
		__sync_fetch_and_add(&counts[my_row()].in_lanes, 1);
		lane = lane_for(p, task, now);
		scx_bpf_dsq_move_set_vtime(
			it, lane_enter(slot, &task->stay, lane, scx_bpf_task_cpu(p), true));
		scx_bpf_dsq_move_vtime(it, p, LANE(lane), 0);
	} else {
		begin_waiting(slot, now);
		settle_up(slot, false);
		scx_bpf_dsq_move_set_vtime(it, task->vtime);
		scx_bpf_dsq_move_vtime(it, p, QUEUE(slot), 0);
	}
	find_cpu(p, slot, may_boost(slot, now), now, ENQ_WAKEUP);
	return true;
}

/*
 * Let programs run whose time at their exec is over, or that are on their way into a freeze or to
 * their end: of the first `parked_most`, by the end of their times. Returns 0.
 */
__noinline int end_exec_holds(u64 now)
{
	u32 seen = READ_ONCE(from_zero);
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	if (scx_bpf_dsq_nr_queued(AT_EXEC) <= 0)
		return 0;
	if (!bpf_iter_scx_dsq_new(&it, AT_EXEC, 0)) {
		while (seen++ < parked_most && (p = bpf_iter_scx_dsq_next(&it))) {
			struct task *task = task_of(p);
			bool over;

			if (!task)
				continue;
			over = task->held_until_ns && !is_at_exec(task, now);
			if (is_at_exec(task, now) && !is_leaving(p))
				continue;
			if (let_run(&it, p, task, now) && over)
				__sync_fetch_and_add(&control.exec_holds_over, 1);
		}
	}
	bpf_iter_scx_dsq_destroy(&it);
	return 0;
}

/* Let a program that waits at its exec run, if it is there. */
static __always_inline void end_exec_hold(struct task_struct *p, struct task *task, u64 now)
{
	struct bpf_iter_scx_dsq it;

	/* The iterator is the way to name the queue that a task is moved from. */
	if (!bpf_iter_scx_dsq_new(&it, AT_EXEC, 0))
		let_run(&it, p, task, now);
	bpf_iter_scx_dsq_destroy(&it);
}

/* Result of lane_turns(). */
enum lane_turn {
	LANE_NOT = 0, /* it is the turn of the tree's choice, or nothing waits in a lane */
	LANE_MOVED = 1,
	LANE_KEEP = 2,	/* the task that was running, which would be in a lane, goes on */
	LANE_AGAIN = 3, /* the first task was put elsewhere */
};

/* See lane_turns(), for the first task of one lane. */
__noinline int lane_turn(u32 cpu, u32 lane, u32 rival, u64 now)
{
	u32 at = MASKED(cpu, ABI_SCHED_CPUS - 1), prev = running_on[at].prev, slot, other;
	int result = LANE_AGAIN;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;
	struct task *task;
	bool boost;
	u64 key;

	if (bpf_iter_scx_dsq_new(&it, LANE(lane), 0))
		goto out;
	p = bpf_iter_scx_dsq_next(&it);
	if (!p)
		goto out;
	task = task_of(p);
	if (!task)
		goto out;
	slot = within(task->queued);
	key = fields(p)->scx.dsq_vtime;
	if (task->stop != STOP_ASKED && is_held(slot, now) && may_stop(p, task)) {
		park(&it, p, task, now);
		goto out;
	}
	if (!may_run_on(p, at)) {
		other = MASKED(one_cpu(p), ABI_SCHED_CPUS - 1);
		scx_bpf_dsq_move_set_vtime(&it, lane_enter(slot, &task->stay, other, other, true));
		scx_bpf_dsq_move_vtime(&it, p, LANE(other), 0);
		goto out;
	}
	boost = task->boosted && may_boost(slot, now);
	if (task->boosted && !boost) {
		task->boosted = 0;
		scx_bpf_dsq_move_set_vtime(&it, lane_key_of(slot, &task->stay));
		scx_bpf_dsq_move_vtime(&it, p, LANE(lane), 0);
		goto out;
	}
	if (!boost && prev && !before(lane_place(lane, key), running_on[at].prev_key)) {
		result = LANE_NOT;
		goto out;
	}
	if (!boost && rival && !lane_first(slot, rival - 1)) {
		scx_bpf_dsq_move_set_vtime(&it, lane_passed(slot, rival - 1, &task->stay, key));
		scx_bpf_dsq_move_vtime(&it, p, LANE(lane), 0);
		goto out;
	}
	/* Set before the move, during which the kernel may call running(). */
	running_on[at].next = boost ? TURN_BOOST : TURN_TREE;
	if (scx_bpf_dsq_move(&it, p, DSQ_LOCAL, 0)) {
		lane_taken(lane, at, slot, key);
		lend(at, slot);
		result = LANE_MOVED;
	}
out:
	bpf_iter_scx_dsq_destroy(&it);
	return result;
}

/**
 * lane_turns - give a CPU to the first task of its lanes, if that comes before the tree's choice
 * @cpu: the CPU; its `prev` is the slot, plus one, of the task that ran on it, would be in a lane
 *	 and could go on (0: there is none), and `prev_key` that task's key with the lane's base
 * @rival: slot, plus one, of the tree's choice; 0: there is none
 * @now: the time
 *
 * Return: enum lane_turn, but not LANE_AGAIN.
 */
__noinline int lane_turns(u32 cpu, u32 rival, u64 now)
{
	u32 at = MASKED(cpu, ABI_SCHED_CPUS - 1), prev = running_on[at].prev;
	u32 left = READ_ONCE(lane_tries), lane;
	int result = LANE_AGAIN;

	while (left-- && result == LANE_AGAIN && can_loop) {
		lane = first_lane(at);
		if (!lane)
			break;
		result = lane_turn(at, lane - 1, rival, now);
	}
	if (result == LANE_MOVED)
		return result;
	if (!prev || (rival && !lane_first(prev - 1, rival - 1)))
		return LANE_NOT;
	lane_taken(at, at, prev - 1, running_on[at].prev_key - lanes[at].base);
	return LANE_KEEP;
}

/* Look for long waits in a lane when it is time. Returns whether a task was moved to this CPU. */
__noinline int rescue_in_lane(u32 cpu, u32 of, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1), lane = in_lanes(of), moved;

	if (before(now, lanes[lane].look_ns) || scx_bpf_dsq_nr_queued(LANE(lane)) <= 0)
		return false;
	running_on[at].next = TURN_RESCUE;
	moved = move_oldest(LANE(lane), now);
	lanes[lane].look_ns = now + control.wait_max_ns / RESCUED_MOST;
	return moved == MOVED_HERE;
}

/*
 * Look for long waits in a CPU's own lane and in one other, each time in another one, which may be
 * that of a CPU that serves none of our tasks or is offline. Returns whether a task was moved to
 * this CPU.
 */
__noinline int rescue_in_lanes(u32 cpu, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 other = running_on[at].look_at + 1;

	if (other >= SET_LANE(SETS))
		other = 0;
	else if (other >= scx_bpf_nr_cpu_ids() && other < SET_LANE(0))
		other = SET_LANE(0);
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
