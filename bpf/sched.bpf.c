// SPDX-License-Identifier: GPL-2.0
/*
 * The CPU scheduler: a sched_ext scheduler for tasks of managed cgroups only. The daemon sets the
 * policy SCHED_EXT for each task that enters such a cgroup; children inherit it.
 *
 * Tasks wait in queues (DSQs), one for each cgroup, ordered by their own virtual time. The queue
 * that is served next is chosen in sched_tree.h: from the root down, at each level the cgroup that
 * has run least for its weight. Three kinds of cgroups come first: one with a task that has waited
 * for too long, one with a budget for going first, and one that is about to be frozen or killed, so
 * that its tasks release what they hold in the kernel.
 *
 * A task that may not run on every CPU waits in the lane of its set of CPUs (sched_lane.h). Lanes
 * are queues too. The tree has only tasks that any CPU may take, so a choice there is never in
 * vain, however many tasks are bound to whatever CPUs.
 *
 * A call whose last charge of memory found it above its mark pays more for its CPU time and is
 * paused in proportion. memory.bpf.c notes how far above it is in its map `states`, which is
 * shared.
 */
#include "sched_moves.h"

char LICENSE[] SEC("license") = "GPL";

#define ENOENT 2
#define E2BIG  7

/* --- Callbacks: tasks --- */

/* Give a task a slice on the CPU that it is on, ahead of all queues. */
static __always_inline void insert_local(struct task_struct *p, u64 slice, u64 enq_flags)
{
	scx_bpf_dsq_insert(p, DSQ_LOCAL, slice, enq_flags);
}

/* Chooses a CPU for a task that wakes. An idle CPU gets it at once, unless its cgroup is paused. */
SEC("struct_ops/select_cpu")
s32 BPF_PROG(select_cpu, struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	struct task *task = task_of(p);
	bool is_idle = false;
	s32 cpu = scx_bpf_select_cpu_dfl(p, prev_cpu, wake_flags, &is_idle);

	if (!is_idle || !task || control.stall_on_purpose)
		return cpu;
	if (!is_held(task->slot, bpf_ktime_get_ns()) || !may_stop(p, task))
		insert_local(p, slice_of(task->slot), 0);
	return cpu;
}

/* Put a task into its lane. */
static __always_inline void enter_lane(struct task_struct *p, struct task *task, u64 now,
				       u64 enq_flags)
{
	struct scx_bpf_dsq_insert_vtime_args args = {};
	u32 slot = within(task->slot), lane = lane_for(p, task, now);

	args.vtime =
		lane_enter(slot, &task->stay, lane, scx_bpf_task_cpu(p), enq_flags & ENQ_WAKEUP);
	task->boosted = may_boost(slot, now);
	if (task->boosted)
		args.vtime -= LANE_BOOST_NS;
	args.dsq_id = LANE(lane);
	args.slice = control.slice_ns;
	args.enq_flags = enq_flags;
	task->queued = slot;
	task->place = PLACE_LANE;
	counts[my_row()].in_lanes++;
	__scx_bpf_dsq_insert_vtime(p, &args);
	find_cpu(p, slot, task->boosted, now, enq_flags);
}

/* Have a program wait at its exec until the daemon has decided what it is. */
static __always_inline void wait_at_exec(struct task_struct *p, struct task *task, u64 enq_flags)
{
	struct scx_bpf_dsq_insert_vtime_args args = {};

	args.dsq_id = AT_EXEC;
	args.slice = control.slice_ns;
	args.vtime = task->held_until_ns;
	args.enq_flags = enq_flags;
	task->queued = within(task->slot);
	task->place = PLACE_AT_EXEC;
	__scx_bpf_dsq_insert_vtime(p, &args);
}

/* Put a task into its cgroup's queue. */
static __always_inline void enter_queue(struct task_struct *p, struct task *task, bool held,
					bool bound, u64 now, u64 enq_flags)
{
	struct scx_bpf_dsq_insert_vtime_args args = {};
	u32 slot = within(task->slot);
	struct node *node = node_of(slot);
	u64 least = node->task_vtime - control.slice_ns;
	int boost;

	if (before(task->vtime, least))
		task->vtime = least;
	args.dsq_id = QUEUE(slot);
	args.slice = control.slice_ns;
	args.vtime = task->vtime;
	args.enq_flags = enq_flags;
	task->queued = slot;
	task->place = bound ? PLACE_PARKED : PLACE_QUEUE;
	if (bound)
		__sync_fetch_and_add(&node->parked, 1);
	if (task->stop != STOP_HERE && node->inside < INSIDE_LOOKS)
		node->inside = INSIDE_LOOKS;
	boost = begin_waiting(slot, now);
	settle_up(slot, !(enq_flags & ENQ_WAKEUP));
	__scx_bpf_dsq_insert_vtime(p, &args);
	if (!held)
		find_cpu(p, slot, boost, now, enq_flags);
}

/*
 * Takes a task that has no CPU. It waits in its cgroup's queue, or in a lane if it may not run on
 * every CPU, or if its cgroup is paused and it may not be stopped yet. Exceptions are tasks that
 * must go on at once (see is_leaving, is_critical), and the only one that the CPU has.
 */
SEC("struct_ops/enqueue")
void BPF_PROG(enqueue, struct task_struct *p, u64 enq_flags)
{
	struct task *task = task_of(p);
	u64 now = bpf_ktime_get_ns();
	bool paused, at_exec, held, bound;

	if (!task) {
		insert_local(p, control.slice_ns, enq_flags);
		return;
	}
	if (!control.stall_on_purpose && (is_leaving(p) || is_critical(p))) {
		__sync_fetch_and_add(&control.finishing, 1);
		went_on(task);
		insert_local(p, SLICE_LEAST_NS, enq_flags);
		return;
	}
	paused = is_held(within(task->slot), now);
	at_exec = is_at_exec(task, now);
	held = (paused || at_exec) && may_stop(p, task);
	if (!control.stall_on_purpose && enq_flags & ENQ_LAST && !held) {
		went_on(task);
		insert_local(p, slice_of(task->slot), enq_flags);
		return;
	}
	if (held && at_exec) {
		wait_at_exec(p, task, enq_flags);
		return;
	}
	bound = is_bound(p);
	if (!held && (paused || bound))
		enter_lane(p, task, now, enq_flags);
	else
		enter_queue(p, task, held, bound, now, enq_flags);
}

/*
 * A task leaves its queue or lane. Since Linux 7.1 the kernel calls this for one that gets a CPU,
 * too.
 */
SEC("struct_ops/dequeue")
void BPF_PROG(dequeue, struct task_struct *p, u64 deq_flags)
{
	struct task *task = task_of(p);

	if (!task)
		return;
	/* When only its nice value, its CPUs or its cgroup change, it stands where it stood. */
	if (!(deq_flags & SCHED_CHANGE))
		went_on(task);
	leave(task, __sync_lock_test_and_set(&task->place, PLACE_NONE));
}

/* A task begins to wait. */
SEC("struct_ops/runnable")
void BPF_PROG(runnable, struct task_struct *p, u64 enq_flags)
{
	struct task *task = task_of(p);

	u32 slot;

	if (!task)
		return;
	task->since_ns = bpf_ktime_get_ns();
	slot = within(task->slot);
	task->counted = slot + 1;
	if (!__sync_fetch_and_add(&node_of(slot)->runnable, 1))
		activate_up(slot);
}

/* A task goes to sleep, ends, or leaves the class. */
SEC("struct_ops/quiescent")
void BPF_PROG(quiescent, struct task_struct *p, u64 deq_flags)
{
	struct task *task = task_of(p);
	u32 slot;

	if (!task)
		return;
	if (deq_flags & DEQUEUE_SLEEP)
		went_on(task);
	if (!task->counted)
		return;
	slot = within(task->counted - 1);
	task->counted = 0;
	if (__sync_fetch_and_sub(&node_of(slot)->runnable, 1) == 1)
		activate_up(slot);
}

/* A task begins to run: counts its wait, and sets its slice. */
SEC("struct_ops/running")
void BPF_PROG(running, struct task_struct *p)
{
	struct task *task = task_of(p);
	u64 cpu = MASKED(scx_bpf_task_cpu(p), ABI_SCHED_CPUS - 1);
	u64 now = bpf_ktime_get_ns(), waited;
	u32 slot, turn;
	struct node *node;

	/*
	 * One that is being stopped does not begin. The kernel calls this when it switches out a
	 * task that may not leave its CPU, and binds it to that (migrate_disable_switch).
	 */
	if (!task || task->stop == STOP_HERE)
		return;
	if (!active)
		active = true;
	slot = within(task->slot);
	node = node_of(slot);
	turn = running_on[cpu].next;
	running_on[cpu].next = TURN_NONE;
	running_on[cpu].turn = turn;
	running_on[cpu].slot = slot + 1;
	running_on[cpu].since_ns = now;
	running_on[cpu].paid_ns = now;
	running_on[cpu].taken = 0;
	task->ran_ns = fields(p)->se.sum_exec_runtime;
	waited = task->since_ns && now > task->since_ns ? now - task->since_ns : 0;
	task->since_ns = 0;
	if (before(node->task_vtime, task->vtime))
		node->task_vtime = task->vtime;
	while (can_loop) {
		struct sched_cgroup *cgroup = cgroup_of(slot);

		__sync_fetch_and_add(&cgroup->slices, 1);
		__sync_fetch_and_add(&cgroup->wait_ns, waited);
		if (waited > cgroup->wait_max_ns)
			cgroup->wait_max_ns = waited;
		if (turn == TURN_BOOST)
			__sync_fetch_and_add(&cgroup->boosts, 1);
		if (turn == TURN_RESCUE)
			__sync_fetch_and_add(&cgroup->rescues, 1);
		if (!slot)
			break;
		slot = node_of(slot)->parent;
	}
	/* A rescue lasts to the next tick only: enough to release what it holds in the kernel. */
	if (turn == TURN_RESCUE)
		scx_bpf_task_set_slice(p, SLICE_LEAST_NS);
	else
		scx_bpf_task_set_slice(p, slice_of(task->slot));
}

/* A task stops running: it pays, and waits again if it could go on. */
SEC("struct_ops/stopping")
void BPF_PROG(stopping, struct task_struct *p, bool still_runnable)
{
	struct task *task = task_of(p);
	u64 cpu = MASKED(scx_bpf_task_cpu(p), ABI_SCHED_CPUS - 1);

	if (!task)
		return;
	account(p, task, cpu);
	if (still_runnable)
		task->since_ns = bpf_ktime_get_ns();
	running_on[cpu].slot = 0;
	running_on[cpu].turn = TURN_NONE;
	running_on[cpu].taken = 0;
}

/* A tick while a task runs: it pays, and its slice ends if another one has to go first. */
SEC("struct_ops/tick")
void BPF_PROG(tick, struct task_struct *p)
{
	struct task *task = task_of(p);
	u64 cpu = MASKED(scx_bpf_task_cpu(p), ABI_SCHED_CPUS - 1);
	u64 now = bpf_ktime_get_ns();
	bool user = from_user_space();

	if (!task)
		return;
	account(p, task, cpu);
	resume_due(now);
	if (!user)
		went_on(task);
	if (is_held(within(task->slot), now) || is_at_exec(task, now))
		stop_running(p, task, user);
	if (has_any(&rescues) || (running_on[cpu].turn != TURN_BOOST && boost_due(now)))
		scx_bpf_task_set_slice(p, 0);
	if (user && !fields(p)->scx.slice)
		task->stop = STOP_HERE;
}

/* --- Callbacks: CPUs --- */

/*
 * Gives a CPU its next task: of a lane, or of the tree. If there is none, the task that was running
 * goes on.
 */
SEC("struct_ops/dispatch")
void BPF_PROG(dispatch, s32 cpu, struct task_struct *prev)
{
	u64 now = bpf_ktime_get_ns();
	struct task *task = NULL;
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 free_prev = 0, left = READ_ONCE(tries), slot;
	bool is_finished = false;

	if (control.stall_on_purpose)
		return;
	if (prev && fields(prev)->scx.flags & TASK_QUEUED) {
		task = task_of(prev);
		if (task) {
			account(prev, task, cpu);
			if (is_stopped(task, now))
				task = NULL;
		}
	}
	running_on[at].prev = 0;
	if (task && is_bound(prev)) {
		u32 lane = lane_for(prev, task, now);

		running_on[at].prev = within(task->slot) + 1;
		if (task->stay.lane != lane + 1)
			lane_enter(task->slot, &task->stay, lane, cpu, false);
		running_on[at].prev_key = lane_place(lane, lane_key_of(task->slot, &task->stay));
	} else if (task) {
		free_prev = within(task->slot) + 1;
	}
	resume_due(now);
	end_exec_holds(now);
	slot = take_from(&paused);
	if (slot)
		unpark_inside(slot, now);
	counts[at].picks++;
	if (rescue_in_lanes(at, now))
		return;
	while (left-- && can_loop) {
		u64 turn = choose(free_prev, now);
		u32 how = turn >> 32;

		slot = within(turn);

		if (how == TURN_RESCUE) {
			if (rescue(at, slot, now))
				return;
			continue;
		}
		if (how != TURN_BOOST) {
			int lane = lane_turns(at, how == TURN_NONE ? 0 : slot + 1, now);

			if (lane == LANE_MOVED)
				return;
			if (lane == LANE_KEEP)
				goto keep_prev;
		}
		if (how == TURN_NONE) {
			is_finished = !slot;
			if (is_finished)
				break;
			continue;
		}
		if (how == TURN_KEEP && prev && task && keep(prev, task, slot)) {
			keep_on(at, now);
			return;
		}
		if (node_of(slot)->parked && unpark(slot, now))
			continue;
		/* Set before the move, during which the kernel may call running(). */
		running_on[at].next = how;
		if (scx_bpf_dsq_move_to_local(QUEUE(slot))) {
			lend(at, slot);
			return;
		}
		__sync_fetch_and_add(&control.picks_empty, 1);
		/* Nothing in it: another CPU has just taken the last task. */
		if (scx_bpf_dsq_nr_queued(QUEUE(slot)) > 0) {
			set_boost(slot, false, now);
			give_way(slot, PASSED_NS);
		} else {
			settle_up(slot, false);
		}
	}
keep_prev:
	running_on[at].next = TURN_NONE;
	if (task && prev) {
		went_on(task);
		scx_bpf_task_set_slice(prev, slice_of(task->slot));
		keep_on(at, now);
	} else if (!is_finished || first_lane(at)) {
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	}
}

/* Runs every few ms: ends pauses, and wakes CPUs that are idle while tasks wait. */
static int on_timer(void *map, int *key, struct wakeup *wakeup)
{
	bool was_active = active;
	u64 now = bpf_ktime_get_ns();
	bool idle;

	active = false;
	resume_due(now);
	look_at_queues(now);
	visit_all(now);
	idle = !control.waiting && !control.in_lanes && scx_bpf_dsq_nr_queued(AT_EXEC) <= 0 &&
	       !order_first(ORDER_PAUSE, 0);
	bpf_timer_start(&wakeup->timer, idle && !was_active ? TIMER_IDLE_NS : TIMER_BUSY_NS, 0);
	return 0;
}

/* --- Callbacks: lives of tasks and cgroups --- */

/* A task of the host, of any policy, becomes known. */
SEC("struct_ops.s/init_task")
s32 BPF_PROG(init_task, struct task_struct *p, struct scx_init_task_args *args)
{
	struct task *task = bpf_task_storage_get(&tasks, p, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	/*
	 * Without memory this still succeeds, because a failure would make some fork() on this host
	 * fail. enable() tries again.
	 */
	if (task)
		task->slot = slot_of(args->cgroup);
	return 0;
}

/* A task gets the policy SCHED_EXT. */
SEC("struct_ops/enable")
void BPF_PROG(enable, struct task_struct *p)
{
	struct task *task = bpf_task_storage_get(&tasks, p, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	/* What is noted only now has the root cgroup's slot, until the task moves. */
	if (!task)
		return;
	task->ran_ns = fields(p)->se.sum_exec_runtime;
	task->since_ns = 0;
	task->stop = STOP_NONE;
	task->held_until_ns = 0;
	task->vtime = node_of(task->slot)->task_vtime;
}

/* A task loses the policy SCHED_EXT: counts those that are not about to end. */
SEC("struct_ops/disable")
void BPF_PROG(disable, struct task_struct *p)
{
	struct task *task = task_of(p);
	int key = p->pid;

	bpf_map_delete_elem(&asked, &key);
	if (!task)
		return;
	if (!is_leaving(p) && !(fields(p)->flags & PF_EXITING))
		__sync_fetch_and_add(&control.left, 1);
}

/* Set cpu.max and cpu.max.burst, in us. Without a period or quota, or above the most: no limit. */
static __always_inline void set_bandwidth(struct node *node, u64 period, u64 quota, u64 burst)
{
	u64 now = bpf_ktime_get_ns();

	if (!period || !quota || quota > QUOTA_MOST_USEC) {
		node->quota_usec = 0;
		return;
	}
	if (!node->quota_usec) {
		u64 turn = control.slice_ns, quota_ns = quota * NSEC_PER_USEC;

		node->tokens_at_ns = now;
		node->tokens_ns = turn < quota_ns ? turn : quota_ns;
	}
	node->period_usec = period;
	node->quota_usec = quota;
	node->burst_usec = burst > QUOTA_MOST_USEC ? QUOTA_MOST_USEC : burst;
}

/* A cgroup with the cpu controller is made, or was there before: it gets a slot and a queue. */
SEC("struct_ops.s/cgroup_init")
s32 BPF_PROG(cgroup_init, struct cgroup *cgrp, struct scx_cgroup_init_args *args)
{
	struct sched_place place = {};
	u64 id = cgrp->kn->id;
	struct sched_cgroup *cgroup;
	u32 parent = 0, slot = 0;
	struct node *node;

	if (cgrp->level) {
		parent = within(slot_of(cgrp));
		if (node_of(parent)->depth + 1 >= DEPTH_MAX)
			goto without;
		slot = within(take_slot());
		if (!slot)
			goto without;
	}
	if (scx_bpf_create_dsq(QUEUE(slot), -1))
		goto give_back;
	place.slot = slot;
	if (bpf_map_update_elem(&places, &id, &place, BPF_NOEXIST)) {
		scx_bpf_destroy_dsq(QUEUE(slot));
		goto give_back;
	}
	node = node_of(slot);
	cgroup = cgroup_of(slot);
	__builtin_memset(node, 0, sizeof(*node));
	__builtin_memset(cgroup, 0, sizeof(*cgroup));
	node->parent = parent;
	node->depth = slot ? node_of(parent)->depth + 1 : 0;
	node->weight = args->weight;
	cgroup->cgroup_id = id;
	set_bandwidth(node, args->bw_period_us, args->bw_quota_us, args->bw_burst_us);
	__sync_fetch_and_add(&control.queues, 1);
	__sync_fetch_and_add(&control.cgroups, 1);
	return 0;
give_back:
	give_slot_back(slot);
without:
	/* This succeeds all the same, because a failure would make the mkdir() fail. */
	__sync_fetch_and_add(&control.without_entry, 1);
	return 0;
}

/* A cgroup is removed: frees its slot and its queue. */
SEC("struct_ops.s/cgroup_exit")
void BPF_PROG(cgroup_exit, struct cgroup *cgrp)
{
	u64 id = cgrp->kn->id;
	struct sched_place *place = bpf_map_lookup_elem(&places, &id);
	u32 slot;

	if (!place)
		return;
	slot = within(place->slot);
	bpf_map_delete_elem(&places, &id);
	scx_bpf_destroy_dsq(QUEUE(slot));
	__sync_fetch_and_sub(&control.queues, 1);
	__sync_fetch_and_sub(&control.cgroups, 1);
	cgroup_of(slot)->cgroup_id = 0;
	node_of(slot)->tasks = 0;
	node_of(slot)->runnable = 0;
	node_of(slot)->active_weight = 0;
	activate_up(slot);
	settle_up(slot, false);
	give_slot_back(slot);
}

/* A task moves to another cgroup, with the lead that it had over the tasks of the old one. */
SEC("struct_ops/cgroup_move")
void BPF_PROG(cgroup_move, struct task_struct *p, struct cgroup *from, struct cgroup *to)
{
	struct task *task = task_of(p);
	u64 ahead;

	if (!task)
		return;
	ahead = task->vtime - node_of(task->slot)->task_vtime;
	task->slot = slot_of(to);
	task->vtime = node_of(task->slot)->task_vtime + ahead;
	task->stay.lane = 0;
	task->held_until_ns = 0;
}

/* cpu.weight was written. */
SEC("struct_ops/cgroup_set_weight")
void BPF_PROG(cgroup_set_weight, struct cgroup *cgrp, u32 weight)
{
	u64 id = cgrp->kn->id;
	struct sched_place *place = bpf_map_lookup_elem(&places, &id);

	if (!place)
		return;
	set_weight(within(place->slot), weight);
}

/* cpu.max or cpu.max.burst was written: a pause for the old limit ends. */
SEC("struct_ops/cgroup_set_bandwidth")
void BPF_PROG(cgroup_set_bandwidth, struct cgroup *cgrp, u64 period_us, u64 quota_us, u64 burst_us)
{
	u64 id = cgrp->kn->id;
	struct sched_place *place = bpf_map_lookup_elem(&places, &id);
	u32 slot;

	if (!place)
		return;
	slot = within(place->slot);
	set_bandwidth(node_of(slot), period_us, quota_us, burst_us);
	resume_now(slot, bpf_ktime_get_ns());
	settle_up(slot, false);
}

/* A CPU comes or goes. Without these two the kernel would detach the scheduler. */
SEC("struct_ops/cpu_online")
void BPF_PROG(cpu_online, s32 cpu)
{
}

SEC("struct_ops/cpu_offline")
void BPF_PROG(cpu_offline, s32 cpu)
{
}

/* The scheduler is attached: starts the timer. Returns 0, or the errno of that, negative. */
SEC("struct_ops.s/sched_init")
s32 BPF_PROG(sched_init)
{
	struct wakeup *wakeup;
	u32 key = 0, lane = READ_ONCE(from_zero);
	s32 error;

	begin_order(scx_bpf_nr_cpu_ids());
	if (scx_bpf_nr_cpu_ids() > ABI_SCHED_CPUS)
		return -E2BIG;
	while (lane < SET_LANE(SETS) && can_loop) {
		error = scx_bpf_create_dsq(LANE(lane), -1);
		if (error)
			return error;
		if (++lane == scx_bpf_nr_cpu_ids())
			lane = SET_LANE(0);
	}
	error = scx_bpf_create_dsq(AT_EXEC, -1);
	if (error)
		return error;
	wakeup = bpf_map_lookup_elem(&wakeups, &key);
	if (!wakeup)
		return -ENOENT;
	bpf_timer_init(&wakeup->timer, &wakeups, CLOCK_MONOTONIC);
	bpf_timer_set_callback(&wakeup->timer, on_timer);
	return bpf_timer_start(&wakeup->timer, TIMER_BUSY_NS, 0);
}

/* The kernel has detached the scheduler: notes why, the kind last, which the daemon reads first. */
SEC("struct_ops/sched_exit")
void BPF_PROG(sched_exit, struct scx_exit_info *info)
{
	ended.at_ns = bpf_ktime_get_ns();
	ended.code = info->exit_code;
	bpf_probe_read_kernel_str(ended.reason, sizeof(ended.reason), info->reason);
	bpf_probe_read_kernel_str(ended.message, sizeof(ended.message), info->msg);
	__sync_lock_test_and_set(&ended.kind, info->kind);
}

/**
 * hurry - let the tasks of a cgroup go first for a while; run by the daemon
 * @wish: the cgroup, and until when
 *
 * Return: 0; -ENOENT: the cgroup has no entry.
 */
SEC("syscall")
int hurry(struct sched_hurry *wish)
{
	u64 id = wish->cgroup_id;
	struct sched_place *place = bpf_map_lookup_elem(&places, &id);
	u32 slot;

	if (!place)
		return -ENOENT;
	slot = within(place->slot);
	cgroup_of(slot)->hurry_until_ns = wish->until_ns;
	set_boost(slot, true, bpf_ktime_get_ns());
	return 0;
}

/**
 * let_go - let a program run that waits at its exec; run by the daemon
 * @whom: the process
 *
 * Return: 0; -ENOENT: there is no such process, or it is none of this scheduler's.
 */
SEC("syscall")
int let_go(struct sched_let_go *whom)
{
	struct task_struct *p = bpf_task_from_vpid(whom->pid);
	struct task *task;

	if (!p)
		return -ENOENT;
	bpf_rcu_read_lock();
	task = task_of(p);
	if (task) {
		task->let_go_ns = whom->at_ns;
		/* Else it has executed another program since. */
		if (before(task->exec_before_ns, whom->at_ns)) {
			task->held_until_ns = 0;
			end_exec_hold(p, task, bpf_ktime_get_ns());
		}
	}
	bpf_rcu_read_unlock();
	bpf_task_release(p);
	return task ? 0 : -ENOENT;
}

/* The kind of the managed cgroup that a task's cgroup is, or is in. */
static __always_inline u32 kind_around(u32 slot)
{
	while (slot && can_loop) {
		if (cgroup_of(slot)->kind)
			return cgroup_of(slot)->kind;
		slot = node_of(slot)->parent;
	}
	return KIND_NONE;
}

static __always_inline void hold_at_exec(struct task_struct *p)
{
	struct task *task = task_of(p);
	u64 now = bpf_ktime_get_ns();

	if (!task)
		return;
	task->exec_before_ns = task->exec_ns;
	task->exec_ns = now;
	/* The event was sent just before this, and the daemon may have been quick. */
	if (before(task->exec_before_ns, task->let_go_ns))
		return;
	if (!control.exec_hold_ns || fields(p)->policy != SCHED_EXT || is_launcher(p))
		return;
	if (kind_around(within(task->slot)) != KIND_AGENT || !ask(p, task))
		return;
	task->held_until_ns = now + control.exec_hold_ns;
	__sync_fetch_and_add(&control.held_at_exec, 1);
}

/*
 * A program is executed. In an agent leaf it may begin a call, and is to be in the call's cgroup
 * before its first instruction: the daemon, which lifecycle.bpf.c tells of it, moves it or lets it
 * go. It waits for that on its way to user space, for `exec_hold_ns` at most.
 */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *p, int old_pid, struct linux_binprm *bprm)
{
	preempt_off();
	hold_at_exec(p);
	preempt_on();
	return 0;
}

SEC("?.struct_ops.link")
struct sched_ext_ops___agentcg scheduler = {
	.select_cpu = (void *)select_cpu,
	.enqueue = (void *)enqueue,
	.dequeue = (void *)dequeue,
	.dispatch = (void *)dispatch,
	.tick = (void *)tick,
	.runnable = (void *)runnable,
	.running = (void *)running,
	.stopping = (void *)stopping,
	.quiescent = (void *)quiescent,
	.init_task = (void *)init_task,
	.enable = (void *)enable,
	.disable = (void *)disable,
	.cgroup_init = (void *)cgroup_init,
	.cgroup_exit = (void *)cgroup_exit,
	.cgroup_move = (void *)cgroup_move,
	.cgroup_set_weight = (void *)cgroup_set_weight,
	.cgroup_set_bandwidth = (void *)cgroup_set_bandwidth,
	.cpu_online = (void *)cpu_online,
	.cpu_offline = (void *)cpu_offline,
	.init = (void *)sched_init,
	.exit = (void *)sched_exit,
	/* SCX_OPS_ENQ_LAST, SCX_OPS_SWITCH_PARTIAL, SCX_OPS_ENQ_MIGRATION_DISABLED */
	.flags = 1ULL << 1 | 1ULL << 3 | 1ULL << 4,
	.timeout_ms = 30000,
	.name = "agentcg",
};
