/* SPDX-License-Identifier: GPL-2.0 */
/* What sched.bpf.c knows of tasks and CPUs, and what a task pays for. */
#ifndef AGENTCG_SCHED_TASK_H
#define AGENTCG_SCHED_TASK_H

#include "sched_kernel.h"

#include "sched_lane.h"

#define PF_EXITING	   0x4	       /* include/linux/sched.h */
#define SIGNAL_GROUP_EXIT  0x4	       /* include/linux/sched/signal.h */
#define JOBCTL_TRAP_FREEZE (1UL << 23) /* include/linux/sched/jobctl.h */

#define QUEUE(slot)	 ((u64)(slot) + 1)
#define LANE(lane)	 ((u64)SLOTS + 1 + (lane))
#define AT_EXEC		 LANE(LANES) /* where programs wait that are held at their exec */
#define SCHED_EXT	 7	     /* include/uapi/linux/sched.h */
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
	u64 ran_ns;	    /* its CPU time up to which it has been paid for */
	u64 since_ns;	    /* when it began to wait; 0: it does not */
	u64 vtime;	    /* its virtual time among the tasks of its cgroup */
	u32 slot;	    /* its cgroup */
	u32 queued;	    /* that cgroup when it was put where it waits */
	u32 place;	    /* enum place */
	u32 counted;	    /* slot, plus one, in which it is counted as runnable; 0: none */
	u32 boosted;	    /* 1: it came into its lane ahead of others */
	u32 stop;	    /* enum stop */
	u64 held_until_ns;  /* end of the time for which it is held at its exec; 0: it is not */
	u64 exec_ns;	    /* its last exec, */
	u64 exec_before_ns; /* and the one before */
	u64 let_go_ns;	    /* time of the last event of an exec that the daemon has decided on */
	struct stay stay;
};

/* Where a task waits. Whoever changes it from what it was changes the counts too. */
enum place {
	PLACE_NONE = 0,
	PLACE_QUEUE = 1,  /* in its cgroup's queue */
	PLACE_PARKED = 2, /* there too, although it belongs into a lane: its cgroup is paused */
	PLACE_LANE = 3,
	PLACE_AT_EXEC = 4,
};

/* Where a task stands, for whoever wants to stop it: see sched_hold.h. */
enum stop {
	STOP_NONE = 0,	/* not known */
	STOP_ASKED = 1, /* in the kernel: it goes on until it is on its way back to user space */
	STOP_HERE = 2,	/* on that way, or in user space */
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
	u32 slot;     /* slot, plus one, of the task that runs; 0: none of this scheduler's */
	u32 turn;     /* enum turn of that task */
	u64 since_ns; /* since when it runs */
	u32 next;     /* enum turn of the task that was chosen, until it runs */
	u32 taken;    /* 1: the task is being preempted for another one */
	u64 paid_ns;  /* time up to which the task has paid */
	u64 prev_key; /* see lane_turns() */
	u32 prev;
	u32 look_at; /* lane that it looked at last for long waits */
} running_on[ABI_SCHED_CPUS];

/* Variables, as top_level is. */
static u32 tries = 8;	       /* queues that a dispatch tries at most */
static u32 lane_tries = 8;     /* tasks of a lane that a dispatch looks at, at most */
static u32 parked_most = 16;   /* tasks that a dispatch moves to lanes, at most */
static u32 looked_most = 1024; /* tasks among which move_oldest() finds the oldest */
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
	pay_up(slot, ran, now, boosted, cpu);
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

/* --- Where a task may run --- */

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

/* A CPU for a task that waits for one CPU only: where it was, or where fewer wait. */
static __always_inline s32 one_cpu(struct task_struct *p)
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

static __always_inline bool lane_head(u32 lane, u64 *key)
{
	struct task_struct *head = scx_bpf_dsq_peek(LANE(lane));

	if (head)
		*key = fields(head)->scx.dsq_vtime;
	return head;
}

/* The lane of a task that is bound. */
static __noinline u32 lane_for(struct task_struct *p, struct task *task, u64 now)
{
	struct cpu_set cpus;
	u32 set = 0;

	if (!is_fixed(p) && fields(p)->nr_cpus_allowed > 1 &&
	    !bpf_probe_read_kernel(&cpus, sizeof(cpus), fields(p)->cpus_ptr))
		set = find_set(&cpus, scx_bpf_nr_cpu_ids(), task->stay.set, now);
	if (!set)
		return MASKED(one_cpu(p), ABI_SCHED_CPUS - 1);
	task->stay.set = set - 1;
	return SET_LANE(set - 1);
}

/* Count that a task no longer waits where it did. */
static __always_inline void leave(struct task *task, u32 place)
{
	u32 queued = within(task->queued);

	if (place == PLACE_LANE)
		counts[my_row()].in_lanes--;
	if (place == PLACE_PARKED)
		__sync_fetch_and_sub(&node_of(queued)->parked, 1);
	if (place == PLACE_PARKED || place == PLACE_QUEUE) {
		end_waiting(queued);
		settle_up(queued, false);
	}
}

#endif
