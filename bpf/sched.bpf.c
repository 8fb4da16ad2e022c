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
 * A task that may not run on every CPU waits in the lane of one that it may run on (sched_lane.h).
 * Lanes are queues too, one for each CPU. The tree has only tasks that any CPU may take, so a
 * choice there is never in vain, however many tasks are bound to whatever CPUs.
 *
 * A call whose last charge of memory found it above its mark pays more for its CPU time and is
 * paused in proportion. memory.bpf.c notes how far above it is in its map `states`, which is
 * shared.
 */
#include "sched_kernel.h"

#include "sched_lane.h"

char LICENSE[] SEC("license") = "GPL";

#define ENOENT 2
#define E2BIG  7

#define PF_EXITING	   0x4	       /* include/linux/sched.h */
#define SIGNAL_GROUP_EXIT  0x4	       /* include/linux/sched/signal.h */
#define JOBCTL_TRAP_FREEZE (1UL << 23) /* include/linux/sched/jobctl.h */

#define QUEUE(slot)	 ((u64)(slot) + 1)
#define LANE(cpu)	 ((u64)SLOTS + 1 + (cpu))
#define TASK_WEIGHT_LOW	 20 /* limits the effect of nice values, so that no task waits too long */
#define TASK_WEIGHT_HIGH 500
#define PROTECTED_PART	 4 /* a task that wakes does not cut the first quarter of a slice short */
#define SLICE_LEAST_NS	 (500 * NSEC_PER_USEC)
#define PASSED_NS	 NSEC_PER_MSEC /* see give_way */
#define OVER_FRESH_NS	 (500 * NSEC_PER_MSEC)
#define RECLAIM_PENALTY	 2
#define TIMER_BUSY_NS	 (4 * NSEC_PER_MSEC)
#define TIMER_IDLE_NS	 (50 * NSEC_PER_MSEC)
#define CLOCK_MONOTONIC	 1

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLOTS);
	__type(key, u64);
	__type(value, struct sched_place);
} places SEC(".maps");

/* The map of memory.bpf.c, which fills it; the daemon has this object use that map. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct memory_state);
} states SEC(".maps");

/* What the scheduler knows of a task. */
struct task {
	u64 ran_ns;   /* its CPU time up to which it has been paid for */
	u64 since_ns; /* when it began to wait; 0: it does not */
	u64 vtime;    /* its virtual time among the tasks of its cgroup */
	u32 slot;     /* its cgroup */
	u32 queued;   /* that cgroup when it was put where it waits */
	u32 place;    /* enum place */
	u32 counted;  /* slot, plus one, in which it is counted as runnable; 0: none */
	u32 boosted;  /* 1: it came into its lane ahead of others */
	u32 reserved;
	struct stay stay;
};

/* Where a task waits. Whoever changes it from what it was changes the counts too. */
enum place {
	PLACE_NONE = 0,
	PLACE_QUEUE = 1,  /* in its cgroup's queue */
	PLACE_PARKED = 2, /* there too, although it belongs into a lane: its cgroup is paused */
	PLACE_LANE = 3,
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task);
} tasks SEC(".maps");

struct wakeup {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct wakeup);
} wakeups SEC(".maps");

struct sched_exit ended;

/* What runs on each CPU, and its last dispatch. */
static struct {
	u32 slot;	/* slot, plus one, of the task that runs; 0: none of this scheduler's */
	u32 turn;	/* enum turn of that task */
	u64 since_ns;	/* since when it runs */
	u32 next;	/* enum turn of the task that was chosen, until it runs */
	u32 taken;	/* 1: the task is being preempted for another one */
	u64 paid_ns;	/* time up to which the task has paid */
	u64 look_ns;	/* when to look for long waits in its lane */
	u32 steal_from; /* CPU whose lane was looked at last by this one, when it was idle */
	u32 reserved;
} running_on[ABI_SCHED_CPUS];

/* Variables, as top_level is. */
static u32 tries = 8;	       /* queues that a dispatch tries at most */
static u32 lane_tries = 8;     /* tasks of a lane that a dispatch looks at, at most */
static u32 parked_most = 16;   /* tasks that a dispatch moves to lanes, at most */
static u32 looked_most = 1024; /* tasks among which move_oldest() finds the oldest */
static u32 stolen_most = 16;   /* lanes of other CPUs that an idle one looks at, at most */
static u32 victims = 16;       /* CPUs that find_victim() looks at, at most */
static bool active;	       /* a task has run since the timer's last run */

/* What the scheduler knows of a task; NULL: there was no memory to note it. */
static __always_inline struct task *task_of(struct task_struct *p)
{
	return bpf_task_storage_get(&tasks, p, 0, 0);
}

/* A task, for members that only this object reads. */
static __always_inline struct task_struct___sched *fields(struct task_struct *p)
{
	return (struct task_struct___sched *)p;
}

/*
 * Whether a task is on its way into a freeze or to its end. It gets to either only when it holds no
 * lock of the kernel's any more.
 */
static __always_inline bool is_leaving(struct task_struct *p)
{
	return fields(p)->jobctl & JOBCTL_TRAP_FREEZE || p->signal->flags & SIGNAL_GROUP_EXIT;
}

/*
 * Whether a task was preempted inside an RCU reader, so that the whole kernel waits for it. The
 * kernel notes that before it puts the task back into a queue (rcu_note_context_switch). The reader
 * is short, and no program can make it long.
 */
static __always_inline bool is_critical(struct task_struct *p)
{
	return bpf_core_field_exists(fields(p)->rcu_read_unlock_special) &&
	       fields(p)->rcu_read_unlock_special.b.blocked;
}

/* Slot of a cgroup, or of the nearest one above it that has a slot. */
static __always_inline u32 slot_of(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *css = &cgroup->self;
	struct sched_place *place;
	u64 id = cgroup->kn->id;

	place = bpf_map_lookup_elem(&places, &id);
	if (place)
		return place->slot;
	while (can_loop) {
		css = BPF_CORE_READ(css, parent);
		if (!css)
			break;
		id = BPF_CORE_READ(css, cgroup, kn, id);
		place = bpf_map_lookup_elem(&places, &id);
		if (place)
			return place->slot;
	}
	return 0;
}

/* --- Memory --- */

/**
 * memory_penalty - factor by which a call pays for its CPU time, for its memory
 * @slot: a cgroup in a call; set to that of the call
 * @now: the time
 *
 * Return: the factor; 1: no penalty; 0: the cgroup is in no call, or penalties are off.
 */
static __always_inline u32 memory_penalty(u32 *slot, u64 now)
{
	u32 most = control.penalty_most, penalty = 1, over;
	struct memory_state *state;
	u32 at = *slot;
	u64 id;

	if (most <= 1)
		return 0;
	while (at && can_loop) {
		if (cgroup_of(at)->kind == KIND_CALL)
			break;
		at = node_of(at)->parent;
	}
	if (!at || cgroup_of(at)->kind != KIND_CALL)
		return 0;
	*slot = at;
	id = cgroup_of(at)->cgroup_id;
	state = bpf_map_lookup_elem(&states, &id);
	if (state && state->over_permille && now - state->over_at_ns < OVER_FRESH_NS) {
		over = state->over_permille;
		penalty = over >= 1000 ? most : 1 + ((most - 1) * over + 999) / 1000;
	}
	id = cgroup_of(node_of(at)->parent)->cgroup_id;
	state = bpf_map_lookup_elem(&states, &id);
	if (state && state->high_at_ns && now - state->high_at_ns < OVER_FRESH_NS &&
	    penalty < RECLAIM_PENALTY)
		penalty = RECLAIM_PENALTY;
	return penalty;
}

/* --- Paying for what was run --- */

/* Weight of a task, from its nice value, within limits. */
static __always_inline u64 clamp_weight(struct task_struct *p)
{
	u64 weight = fields(p)->scx.weight;

	if (weight < TASK_WEIGHT_LOW)
		return TASK_WEIGHT_LOW;
	return weight > TASK_WEIGHT_HIGH ? TASK_WEIGHT_HIGH : weight;
}

/* Charge the CPU time that a task has run on a CPU since the last time, to it and its cgroups. */
static __always_inline void account(struct task_struct *p, struct task *task, s32 cpu)
{
	u64 total = fields(p)->se.sum_exec_runtime, ran = total - task->ran_ns;
	u32 slot = within(task->slot), call = slot, penalty;
	u64 now = bpf_ktime_get_ns();
	bool boosted = running_on[MASKED(cpu, ABI_SCHED_CPUS - 1)].turn == TURN_BOOST;

	if (!ran)
		return;
	task->ran_ns = total;
	running_on[MASKED(cpu, ABI_SCHED_CPUS - 1)].paid_ns = now;
	penalty = memory_penalty(&call, now);
	if (penalty)
		node_of(call)->penalty = penalty;
	pay_up(slot, ran, now, boosted);
	task->vtime += ran * WEIGHT_DEFAULT / clamp_weight(p);
}

/*
 * Length of a slice for a task of a cgroup, in ns: what cpu.max leaves at each level, divided by
 * the penalties, but at least SLICE_LEAST_NS.
 */
__noinline u64 slice_of(u32 slot)
{
	u64 slice = control.slice_ns;

	while (slot && can_loop) {
		struct node *node = node_of(slot);

		if (node->quota_usec && node->tokens_ns < (s64)slice)
			slice = node->tokens_ns > 0 ? node->tokens_ns : 0;
		if (node->penalty > 1)
			slice /= node->penalty;
		slot = node->parent;
	}
	return slice < SLICE_LEAST_NS ? SLICE_LEAST_NS : slice;
}

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
	if (!is_held(task->slot, bpf_ktime_get_ns()))
		insert_local(p, slice_of(task->slot), 0);
	return cpu;
}

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

/* Find such a CPU, beginning at one. Returns the CPU, plus one; 0: none of those looked at. */
__noinline u32 find_victim(u32 from, u32 slot, u32 boost, u64 now)
{
	u32 cpus = scx_bpf_nr_cpu_ids(), cpu = from, left = victims;

	while (left-- && can_loop) {
		if (can_take(cpu, slot, boost, now))
			return cpu + 1;
		if (++cpu >= cpus)
			cpu = 0;
	}
	return 0;
}

/* Have such a CPU choose again, if there is one and the task may run on it. */
static __always_inline void preempt_for(struct task_struct *p, u32 slot, u32 boost, u64 now)
{
	u32 victim = find_victim(scx_bpf_task_cpu(p), slot, boost, now);

	if (!victim || !bpf_cpumask_test_cpu(victim - 1, fields(p)->cpus_ptr))
		return;
	running_on[MASKED(victim - 1, ABI_SCHED_CPUS - 1)].taken = 1;
	__sync_fetch_and_add(&control.preempted, 1);
	scx_bpf_kick_cpu(victim - 1, KICK_PREEMPT);
}

/*
 * Whether a task may not leave its CPU now. The kernel turns migration off for the task that runs a
 * BPF program, which is this one.
 */
static __always_inline bool is_fixed(struct task_struct *p)
{
	u32 fixed = fields(p)->migration_disabled;

	return fixed > 1 || (fixed && p != bpf_get_current_task_btf());
}

/* Whether a task may not run on every CPU. */
static __always_inline bool is_bound(struct task_struct *p)
{
	const struct cpumask *online;
	bool bound;

	if (is_fixed(p))
		return true;
	if ((u32)fields(p)->nr_cpus_allowed >= scx_bpf_nr_cpu_ids())
		return false;
	online = scx_bpf_get_online_cpumask();
	bound = !bpf_cpumask_subset(online, fields(p)->cpus_ptr);
	scx_bpf_put_cpumask(online);
	return bound;
}

static __always_inline bool is_online(s32 cpu)
{
	const struct cpumask *online = scx_bpf_get_online_cpumask();
	bool found = bpf_cpumask_test_cpu(cpu, online);

	scx_bpf_put_cpumask(online);
	return found;
}

/* The CPU in whose lane a task is to wait if none is idle: where it was, or where fewer wait. */
static __always_inline s32 lane_for(struct task_struct *p)
{
	s32 here = scx_bpf_task_cpu(p), other;

	if (is_fixed(p))
		return here;
	other = bpf_cpumask_any_distribute(fields(p)->cpus_ptr);
	if ((u32)other >= scx_bpf_nr_cpu_ids() || !is_online(other))
		return here;
	if (!bpf_cpumask_test_cpu(here, fields(p)->cpus_ptr))
		return other;
	return scx_bpf_dsq_nr_queued(LANE(other)) < scx_bpf_dsq_nr_queued(LANE(here)) ? other :
											here;
}

/* Put a task into the lane of a CPU that it may run on. */
static __always_inline void enter_lane(struct task_struct *p, struct task *task, u64 now,
				       u64 enq_flags)
{
	struct scx_bpf_dsq_insert_vtime_args args = {};
	u32 slot = within(task->slot);
	s32 idle = is_fixed(p) ? -1 : scx_bpf_pick_idle_cpu(fields(p)->cpus_ptr, 0);
	s32 cpu = idle >= 0 ? idle : lane_for(p);
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u64 key = lane_enter(slot, &task->stay, at);

	task->boosted = may_boost(slot, now);
	if (task->boosted)
		key -= LANE_BOOST_NS;
	args.dsq_id = LANE(at);
	args.slice = control.slice_ns;
	args.vtime = key;
	args.enq_flags = enq_flags;
	task->queued = slot;
	task->place = PLACE_LANE;
	__sync_fetch_and_add(&control.in_lanes, 1);
	__scx_bpf_dsq_insert_vtime(p, &args);
	if (idle >= 0)
		scx_bpf_kick_cpu(idle, KICK_IDLE);
	else if (enq_flags & ENQ_WAKEUP && can_take(at, slot, task->boosted, now)) {
		running_on[at].taken = 1;
		__sync_fetch_and_add(&control.preempted, 1);
		scx_bpf_kick_cpu(at, KICK_PREEMPT);
	}
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
	s32 cpu;

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
	boost = begin_waiting(slot, now);
	settle_up(slot, !(enq_flags & ENQ_WAKEUP));
	__scx_bpf_dsq_insert_vtime(p, &args);
	if (held)
		return;
	/* The kernel carries out a kick after this callback, when the task is in its queue. */
	cpu = scx_bpf_pick_idle_cpu(fields(p)->cpus_ptr, 0);
	if (cpu >= 0)
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	else if (enq_flags & ENQ_WAKEUP)
		preempt_for(p, slot, boost, now);
}

/*
 * Takes a task that has no CPU. It waits in its cgroup's queue, or in a lane if it may not run on
 * every CPU, except for tasks that must go on at once (see is_leaving, is_critical), and for the
 * only one that the CPU has.
 */
SEC("struct_ops/enqueue")
void BPF_PROG(enqueue, struct task_struct *p, u64 enq_flags)
{
	struct task *task = task_of(p);
	u64 now = bpf_ktime_get_ns();
	bool held, bound;

	if (!task) {
		insert_local(p, control.slice_ns, enq_flags);
		return;
	}
	held = is_held(within(task->slot), now);
	if (!control.stall_on_purpose) {
		if (is_leaving(p) || is_critical(p)) {
			__sync_fetch_and_add(&control.finishing, 1);
			insert_local(p, SLICE_LEAST_NS, enq_flags);
			return;
		}
		if (enq_flags & ENQ_LAST && !held) {
			insert_local(p, slice_of(task->slot), enq_flags);
			return;
		}
	}
	bound = is_bound(p);
	if (bound && !held)
		enter_lane(p, task, now, enq_flags);
	else
		enter_queue(p, task, held, bound, now, enq_flags);
}

/* Count that a task no longer waits where it did. */
static __always_inline void leave(struct task *task, u32 place)
{
	u32 queued = within(task->queued);

	if (place == PLACE_LANE)
		__sync_fetch_and_sub(&control.in_lanes, 1);
	if (place == PLACE_PARKED)
		__sync_fetch_and_sub(&node_of(queued)->parked, 1);
	if (place == PLACE_PARKED || place == PLACE_QUEUE) {
		end_waiting(queued);
		settle_up(queued, false);
	}
}

/*
 * A task leaves its queue or lane. Since Linux 7.1 the kernel calls this for one that gets a CPU,
 * too.
 */
SEC("struct_ops/dequeue")
void BPF_PROG(dequeue, struct task_struct *p, u64 deq_flags)
{
	struct task *task = task_of(p);

	if (task)
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

	if (!task || !task->counted)
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

	if (!task)
		return;
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

	if (!task)
		return;
	account(p, task, cpu);
	resume_due(now);
	if (rescue_due(now) || (running_on[cpu].turn != TURN_BOOST && boost_due(now)) ||
	    is_held(task->slot, now))
		scx_bpf_task_set_slice(p, 0);
}

/* --- Callbacks: CPUs --- */

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

/* Have a CPU choose, if it runs no task of this scheduler and there may be one for it. */
static long wake_one(u32 cpu, void *unused)
{
	if (running_on[MASKED(cpu, ABI_SCHED_CPUS - 1)].slot)
		return 0;
	if (control.waiting || scx_bpf_dsq_nr_queued(LANE(cpu)) > 0)
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	return 0;
}

/* Have idle CPUs choose while tasks wait: one may have become idle just when a task was queued. */
static __always_inline void wake_idle(void)
{
	if (control.waiting || control.in_lanes)
		bpf_loop(scx_bpf_nr_cpu_ids(), wake_one, NULL, 0);
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
	__sync_fetch_and_sub(&control.in_lanes, 1);
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
			__sync_fetch_and_add(&control.in_lanes, 1);
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

/* Look for long waits in a CPU's lane when it is time. Returns whether a task was moved. */
__noinline int rescue_in_lane(u32 cpu, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1), moved;

	if (before(now, running_on[at].look_ns) || scx_bpf_dsq_nr_queued(LANE(at)) <= 0)
		return false;
	running_on[at].next = TURN_RESCUE;
	moved = move_oldest(LANE(at), now);
	running_on[at].look_ns = now + control.wait_max_ns / RESCUED_MOST;
	return moved == MOVED_HERE;
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

/*
 * Gives a CPU its next task: of its lane, or of the tree. If there is none, the task that was
 * running goes on, or another CPU's lane has one.
 */
SEC("struct_ops/dispatch")
void BPF_PROG(dispatch, s32 cpu, struct task_struct *prev)
{
	u64 now = bpf_ktime_get_ns(), prev_key = 0;
	struct task *task = NULL;
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 free_prev = 0, lane_prev = 0, left = tries;
	bool is_finished = false;

	if (control.stall_on_purpose)
		return;
	if (prev && fields(prev)->scx.flags & TASK_QUEUED) {
		task = task_of(prev);
		if (task) {
			account(prev, task, cpu);
			if (is_held(task->slot, now))
				task = NULL;
		}
	}
	if (task && is_bound(prev)) {
		lane_prev = within(task->slot) + 1;
		if (task->stay.lane != at + 1)
			lane_enter(task->slot, &task->stay, at);
		prev_key = lane_key_of(task->slot, &task->stay);
	} else if (task) {
		free_prev = within(task->slot) + 1;
	}
	resume_due(now);
	__sync_fetch_and_add(&control.picks, 1);
	if (rescue_in_lane(at, now))
		return;
	while (left-- && can_loop) {
		u64 turn = choose(free_prev, now);
		u32 slot = within(turn), how = turn >> 32;

		if (how == TURN_RESCUE) {
			if (rescue(at, slot, now))
				return;
			continue;
		}
		if (how != TURN_BOOST) {
			u32 rival = how == TURN_NONE ? 0 : slot + 1;
			int lane = lane_turn(at, rival, lane_prev, prev_key, now);

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
		if (node_of(slot)->parked) {
			unpark(slot);
			continue;
		}
		/* Set before the move, during which the kernel may call running(). */
		running_on[at].next = how;
		if (scx_bpf_dsq_move_to_local(QUEUE(slot)))
			return;
		__sync_fetch_and_add(&control.picks_empty, 1);
		/* Nothing in it: another CPU has just taken the last task. */
		if (scx_bpf_dsq_nr_queued(QUEUE(slot)) > 0) {
			no_more_boost(slot);
			give_way(slot, PASSED_NS);
		}
	}
keep_prev:
	running_on[at].next = TURN_NONE;
	if (task && prev) {
		scx_bpf_task_set_slice(prev, slice_of(task->slot));
		keep_on(at, now);
	} else if (!steal(at, now) && !is_finished) {
		scx_bpf_kick_cpu(cpu, KICK_IDLE);
	}
}

/* Runs every few ms: ends pauses, and wakes CPUs that are idle while tasks wait. */
static int on_timer(void *map, int *key, struct wakeup *wakeup)
{
	bool was_active = active;
	bool idle;

	active = false;
	resume_due(bpf_ktime_get_ns());
	idle = !control.waiting && !control.in_lanes && !order_first(ORDER_PAUSE, 0);
	if (!control.stall_on_purpose)
		wake_idle();
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
	task->vtime = node_of(task->slot)->task_vtime;
}

/* A task loses the policy SCHED_EXT: counts those that are not about to end. */
SEC("struct_ops/disable")
void BPF_PROG(disable, struct task_struct *p)
{
	struct task *task = task_of(p);

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

/* The scheduler is attached: starts the timer. Returns 0, or the errno of that, negative. */
SEC("struct_ops.s/sched_init")
s32 BPF_PROG(sched_init)
{
	struct wakeup *wakeup;
	u32 key = 0, cpu = 0;
	s32 error;

	if (scx_bpf_nr_cpu_ids() > ABI_SCHED_CPUS)
		return -E2BIG;
	while (cpu < scx_bpf_nr_cpu_ids() && can_loop) {
		error = scx_bpf_create_dsq(LANE(cpu), -1);
		if (error)
			return error;
		cpu++;
	}
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
	boost_now(slot, bpf_ktime_get_ns());
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
	.init = (void *)sched_init,
	.exit = (void *)sched_exit,
	/* SCX_OPS_ENQ_LAST, SCX_OPS_SWITCH_PARTIAL */
	.flags = 1ULL << 1 | 1ULL << 3,
	.timeout_ms = 30000,
	.name = "agentcg",
};
