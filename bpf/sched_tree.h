/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The choice of the cgroup whose turn it is: the tree of cgroups with virtual times, budgets and
 * pauses. Tasks are only counted here, and CPUs only numbered.
 *
 * One spin lock guards the orders. Each function that takes the lock does so for one level of the
 * tree, and is not static: the verifier checks such a function once, instead of at every place that
 * calls it and with every loop around it. Between two levels the lock is free, and the tree is
 * right then too: a cgroup whose parent is not linked yet is not found yet, and every function that
 * changes what settle() depends on calls it afterwards.
 *
 * At each level, siblings compete by virtual time: CPU time over weight. A cgroup that begins to
 * wait gets at least the virtual time that the competition has reached. So it keeps no claim from
 * the time in which it did not run, and a thousand cgroups that wake at once are no better off than
 * one. A cgroup that ran while no other waited falls behind the competition by a limited lead at
 * most.
 */
#ifndef AGENTCG_SCHED_TREE_H
#define AGENTCG_SCHED_TREE_H

#include "sched_order.h"

#define DEPTH_MAX	   16 /* levels; deeper cgroups share the entry of an ancestor */
#define RESCUED_MOST	   64
#define WEIGHT_DEFAULT	   100
#define NSEC_PER_USEC	   1000ULL
#define NSEC_PER_MSEC	   1000000ULL
#define REFILL_MOST_USEC   10000000ULL /* time that is counted at most, against overflow */
#define QUOTA_MOST_USEC	   1000000000ULL
#define PENALTY_PAUSE_MOST (100 * NSEC_PER_MSEC)

struct bpf_spin_lock lock SEC(".bss.lock") __hidden;

struct sched_control control;
struct sched_cgroup cgroups[SLOTS];

static u64 lead_slices;	 /* lead of a cgroup in slices, for all CPUs; set at the start */
static u32 at_once = 32; /* cgroups that a single call resumes, or whose boost it ends, at most */

/* Reason of a turn. */
enum turn {
	TURN_NONE = 0,
	TURN_TREE = 1,	 /* the least virtual time */
	TURN_BOOST = 2,	 /* a budget for going first */
	TURN_RESCUE = 3, /* too long a wait */
	TURN_KEEP = 4,	 /* the CPU stays with the cgroup whose task was running on it */
};

#define NO_MARKS ABI_SCHED_CPUS /* in place of a CPU: of which no cgroup is marked as tried */

/* A turn as one number: its reason, and the slot of the cgroup. */
#define TURN(how, slot) ((u64)(how) << 32 | (slot))

static __always_inline struct sched_cgroup *cgroup_of(u32 slot)
{
	return &cgroups[within(slot)];
}

/* --- In the tree, and out of it --- */

/* Whether a cgroup belongs into ORDER_TREE: not paused, and with something to run. */
static __always_inline bool wants(struct node *node)
{
	return !node->paused_ns && (node->tasks || node->children[0]);
}

/* Whether a cgroup is in ORDER_TREE exactly if it belongs there. */
static __always_inline bool is_settled(u32 slot)
{
	return !link_of(slot, ORDER_TREE)->linked == !wants(node_of(slot));
}

/* Add a cgroup to ORDER_TREE or remove it, as it belongs. Returns whether anything was changed. */
__noinline int settle(u32 slot)
{
	struct node *node = node_of(slot);
	bool linked, wanted;
	u64 now;

	bpf_spin_lock(&lock);
	linked = link_of(slot, ORDER_TREE)->linked;
	wanted = wants(node);
	if (wanted && !linked) {
		now = node_of(node->parent)->vtime_now;
		if (before(node->vtime, now))
			node->vtime = now;
		order_add(ORDER_TREE, slot, node->vtime);
	} else if (linked && !wanted) {
		order_remove(ORDER_TREE, slot);
	}
	bpf_spin_unlock(&lock);
	return linked != wanted;
}

/* Settle a cgroup and those above it, up to the first where nothing changes. Returns 0. */
__noinline int settle_up(u32 slot)
{
	while (slot && can_loop) {
		if (is_settled(slot) || !settle(slot))
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/* --- Pauses: because cpu.max is used up, or for memory --- */

/* Add the tokens of cpu.max that have come since the last time. */
static __always_inline void refill(struct node *node, u64 now)
{
	u64 since = (now - node->tokens_at_ns) / NSEC_PER_USEC;
	/* Two slices more, so that a cgroup that has to wait for its turn loses no tokens. */
	s64 most = (node->quota_usec + node->burst_usec) * NSEC_PER_USEC + 2 * control.slice_ns;

	if (!node->quota_usec || !node->period_usec)
		return;
	if (since > REFILL_MOST_USEC)
		since = REFILL_MOST_USEC;
	node->tokens_at_ns += since * NSEC_PER_USEC;
	node->tokens_ns += since * node->quota_usec * NSEC_PER_USEC / node->period_usec;
	if (node->tokens_ns >= most) {
		node->tokens_ns = most;
		node->tokens_at_ns = now;
	}
}

/* The time at which there will be tokens for a slice. */
static __always_inline u64 refilled_at(struct node *node, u64 now)
{
	u64 quota_ns = node->quota_usec * NSEC_PER_USEC, turn = control.slice_ns;
	u64 lacking;

	if (turn > quota_ns)
		turn = quota_ns;
	lacking = (turn - node->tokens_ns) / NSEC_PER_USEC + 1;
	return now + lacking * node->period_usec / (node->quota_usec ?: 1) * NSEC_PER_USEC;
}

/**
 * pause - pause a cgroup, or make its pause longer
 * @slot: the cgroup
 * @until: end of the pause
 * @now: the time
 * @for_memory: whether it is for memory; else for cpu.max
 *
 * The caller holds the lock, and calls settle_up() afterwards.
 */
static __always_inline void pause(u32 slot, u64 until, u64 now, bool for_memory)
{
	struct node *node = node_of(slot);

	if (node->paused_ns) {
		if (is_due(slot, ORDER_PAUSE, until))
			order_move(ORDER_PAUSE, slot, until);
		return;
	}
	node->paused_ns = now;
	node->for_memory = for_memory;
	if (for_memory)
		cgroup_of(slot)->penalties++;
	else
		cgroup_of(slot)->stalls++;
	order_add(ORDER_PAUSE, slot, until);
}

/* End the pause of a paused cgroup. The caller holds the lock, and calls settle_up() afterwards. */
static __always_inline void resume(u32 slot, u64 now)
{
	struct node *node = node_of(slot);
	u64 paused = now - node->paused_ns;

	order_remove(ORDER_PAUSE, slot);
	if (node->for_memory)
		cgroup_of(slot)->penalty_ns += paused;
	else
		cgroup_of(slot)->stalled_ns += paused;
	node->paused_ns = 0;
}

/*
 * Take the paused cgroup whose time comes first, and end its pause, or make it longer if tokens
 * lack. Returns its slot; 0: for no cgroup the time has come. The caller calls settle_up()
 * afterwards.
 */
__noinline u32 resume_one(u64 now)
{
	struct node *node;
	u32 slot;

	bpf_spin_lock(&lock);
	slot = order_first(ORDER_PAUSE, 0);
	node = node_of(slot);
	if (slot && !is_due(slot, ORDER_PAUSE, now))
		slot = 0;
	if (slot) {
		refill(node, now);
		if (node->quota_usec && node->tokens_ns <= 0)
			order_move(ORDER_PAUSE, slot, refilled_at(node, now));
		else
			resume(slot, now);
	}
	bpf_spin_unlock(&lock);
	return slot;
}

/* End the pauses whose time has come, at most `at_once` of them. Returns 0. */
__noinline int resume_due(u64 now)
{
	u32 left = at_once, slot;

	while (left-- && can_loop) {
		slot = resume_one(now);
		if (!slot)
			break;
		settle_up(slot);
	}
	return 0;
}

/*
 * End the pause of a cgroup, if it has one, because its limit was changed. Returns 0. The caller
 * calls settle_up() afterwards.
 */
__noinline int resume_now(u32 slot, u64 now)
{
	bpf_spin_lock(&lock);
	if (node_of(slot)->paused_ns)
		resume(slot, now);
	bpf_spin_unlock(&lock);
	return 0;
}

/* Whether a cgroup, or one above it, is paused, unless one of them is to go first. */
__noinline int is_held(u32 slot, u64 now)
{
	while (slot && can_loop) {
		if (before(now, cgroup_of(slot)->hurry_until_ns))
			return false;
		if (node_of(slot)->paused_ns)
			return true;
		slot = node_of(slot)->parent;
	}
	return false;
}

/* --- Budgets --- */

/* CPU time that a cgroup may now take ahead of others, in ns. */
static __always_inline s64 budget_of(struct node *node, struct sched_cgroup *cgroup, u64 now)
{
	s64 most = cgroup->boost_cap_ns, budget;
	u64 since = now - node->budget_at_ns;

	if (!node->budget_at_ns)
		return most;
	if (since > REFILL_MOST_USEC * NSEC_PER_USEC)
		since = REFILL_MOST_USEC * NSEC_PER_USEC;
	budget = node->budget_ns + since * cgroup->boost_permille / 1000;
	return budget < most ? budget : most;
}

/*
 * Whether a cgroup may go ahead of others: if budget is left at each level that has one, and no
 * level has had more than its share already. A boost changes the order, not the shares.
 */
__noinline int may_boost(u32 slot, u64 now)
{
	bool has_budget = false;

	while (slot && can_loop) {
		struct node *node = node_of(slot);
		struct sched_cgroup *cgroup = cgroup_of(slot);
		u64 lead;

		if (before(now, cgroup->hurry_until_ns))
			return true;
		if (node->paused_ns)
			return false;
		if (cgroup->boost_cap_ns) {
			if (budget_of(node, cgroup, now) <= 0)
				return false;
			if (cgroup->kind != KIND_SESSION)
				has_budget = true;
		}
		lead = control.boost_lead_ns * WEIGHT_DEFAULT / (node->weight ?: 1);
		if ((s64)(node->vtime - node_of(node->parent)->vtime_now) > (s64)lead)
			return false;
		slot = node->parent;
	}
	return has_budget;
}

/* --- Paying --- */

/**
 * pay - charge CPU time to a cgroup, at its own level only
 * @slot: the cgroup
 * @ran: CPU time in ns
 * @now: the time
 * @boosted: whether the time was taken ahead of others
 *
 * Return: whether the cgroup is paused now, and was not before; settle_up() is to follow then.
 */
__noinline int pay(u32 slot, u64 ran, u64 now, u32 boosted)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	struct sched_cgroup *cgroup = cgroup_of(slot);
	u32 weight = node->weight ?: 1, penalty = node->penalty ?: 1;
	u64 lead = lead_slices * control.slice_ns * WEIGHT_DEFAULT / weight, out, until = 0;
	bool was_paused;

	bpf_spin_lock(&lock);
	was_paused = node->paused_ns;
	cgroup->run_ns += ran;
	if (boosted)
		cgroup->boosted_ns += ran;
	if (cgroup->boost_cap_ns) {
		node->budget_ns = budget_of(node, cgroup, now) - ran;
		node->budget_at_ns = now;
	}
	if (!slot)
		goto unlock;
	node->vtime += ran * WEIGHT_DEFAULT * penalty / weight;
	/* No sibling waits, so running has cost none of them anything. */
	if (!parent->children[0] && before(parent->vtime_now, node->vtime))
		parent->vtime_now = node->vtime;
	if ((s64)(node->vtime - parent->vtime_now) > (s64)lead)
		node->vtime = parent->vtime_now + lead;
	if (link_of(slot, ORDER_TREE)->linked)
		order_move(ORDER_TREE, slot, node->vtime);
	if (penalty > 1) {
		out = ran * (penalty - 1);
		until = now + (out < PENALTY_PAUSE_MOST ? out : PENALTY_PAUSE_MOST);
	}
	if (node->quota_usec) {
		refill(node, now);
		node->tokens_ns -= ran;
		if (node->tokens_ns <= 0) {
			until = refilled_at(node, now);
			penalty = 1;
		}
	}
	if (until)
		pause(slot, until, now, penalty > 1);
unlock:
	bpf_spin_unlock(&lock);
	return until && !was_paused;
}

/* Charge CPU time (`ran`, in ns) to a cgroup and all above it. Returns 0. */
__noinline int pay_up(u32 slot, u64 ran, u64 now, u32 boosted)
{
	struct node *node = node_of(slot);

	node->own_vtime += ran;
	if (!node->children[0] && !node->tasks)
		node->vtime_now = node->own_vtime;
	while (can_loop) {
		if (pay(slot, ran, now, boosted))
			settle_up(slot);
		if (!slot)
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/* --- Waiting --- */

/*
 * The time at which to look for long waits next: each waiting task of the cgroup gets a turn within
 * wait_max_ns. Counts no more than RESCUED_MOST tasks, so that a fork bomb gains nothing.
 */
static __always_inline u64 rescue_at(struct node *node, u64 now)
{
	u32 tasks = node->tasks < RESCUED_MOST ? node->tasks : RESCUED_MOST;

	return now + control.wait_max_ns / (tasks ?: 1);
}

/*
 * Count a task more that waits in a cgroup's queue. Returns whether it may go ahead of others. The
 * caller calls settle_up() afterwards.
 */
__noinline int begin_waiting(u32 slot, u64 now)
{
	struct node *node = node_of(slot);
	int boost = may_boost(slot, now);

	bpf_spin_lock(&lock);
	control.waiting++;
	if (!node->tasks++) {
		if (before(node->own_vtime, node->vtime_now))
			node->own_vtime = node->vtime_now;
		if (slot)
			order_move(ORDER_RESCUE, slot, rescue_at(node, now));
	}
	if (slot && boost && !link_of(slot, ORDER_BOOST)->linked)
		order_add(ORDER_BOOST, slot, now);
	bpf_spin_unlock(&lock);
	return boost;
}

/* Count a task less that waits. Returns 0. The caller calls settle_up() afterwards. */
__noinline int end_waiting(u32 slot)
{
	struct node *node = node_of(slot);

	bpf_spin_lock(&lock);
	if (node->tasks) {
		control.waiting--;
		node->tasks--;
		/* While other tasks wait, the time of the rescue stays: they may wait longest. */
		if (slot && !node->tasks) {
			order_drop(ORDER_RESCUE, slot);
			order_drop(ORDER_BOOST, slot);
		}
	}
	bpf_spin_unlock(&lock);
	return 0;
}

/*
 * Set the time at which to look for long waits next; 0: the usual time after a rescue. Does nothing
 * if no task of the cgroup waits. Returns 0.
 */
__noinline int rescue_again(u32 slot, u64 at, u64 now)
{
	struct node *node = node_of(slot);

	bpf_spin_lock(&lock);
	if (link_of(slot, ORDER_RESCUE)->linked)
		order_move(ORDER_RESCUE, slot, at ?: rescue_at(node, now));
	bpf_spin_unlock(&lock);
	return 0;
}

/* --- Choosing --- */

/*
 * Marks of the cgroups in whose queues the dispatch of a CPU has found no task for that CPU. Each
 * CPU has marks of its own: with common ones, CPUs would remove the marks that others still need.
 */
static struct {
	u64 any;
	u64 marks[SLOTS / 64];
} tried[ABI_SCHED_CPUS];

/* Whether a cgroup is marked for a CPU. */
static __always_inline bool was_tried(u32 cpu, u32 slot)
{
	u64 row = MASKED(cpu, ABI_SCHED_CPUS - 1), word = MASKED(slot / 64, SLOTS / 64 - 1);

	return cpu != NO_MARKS && tried[row].marks[word] >> (slot % 64) & 1;
}

/*
 * Mark a cgroup for a CPU. Returns 0. Not inline: the verifier would check the rest of a dispatch
 * anew for each outcome.
 */
__noinline int mark_tried(u32 cpu, u32 slot)
{
	u64 row = MASKED(cpu, ABI_SCHED_CPUS - 1), word = MASKED(slot / 64, SLOTS / 64 - 1);

	tried[row].any = 1;
	tried[row].marks[word] |= 1ULL << (slot % 64);
	return 0;
}

/* Remove all marks for a CPU. Returns 0. */
__noinline int forget_tried(u32 cpu)
{
	u64 row = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 word = 0;

	if (!tried[row].any)
		return 0;
	while (word < SLOTS / 64 && can_loop)
		tried[row].marks[MASKED(word++, SLOTS / 64 - 1)] = 0;
	tried[row].any = 0;
	return 0;
}

/* The first cgroup of an order that is not marked for a CPU; 0: none. The caller holds the lock. */
static __always_inline u32 first_not_tried(u32 order, u32 parent, u32 cpu)
{
	u32 slot = order_first(order, parent);

	while (slot && was_tried(cpu, slot) && can_loop)
		slot = *next_of(order, parent, slot, 0);
	return slot;
}

/* A cgroup with tasks that may have waited for too long, not marked for a CPU; 0: none. */
__noinline u32 rescue_due(u64 now, u32 cpu)
{
	u32 slot;

	bpf_spin_lock(&lock);
	slot = first_not_tried(ORDER_RESCUE, 0, cpu);
	if (slot && !is_due(slot, ORDER_RESCUE, now))
		slot = 0;
	bpf_spin_unlock(&lock);
	return slot;
}

/* The first cgroup in ORDER_BOOST that is not marked for a CPU; 0: none. */
__noinline u32 first_boosted(u32 cpu)
{
	u32 slot;

	bpf_spin_lock(&lock);
	slot = first_not_tried(ORDER_BOOST, 0, cpu);
	bpf_spin_unlock(&lock);
	return slot;
}

/* Put a cgroup with waiting tasks into ORDER_BOOST, whatever its budget. Returns 0. */
__noinline int boost_now(u32 slot, u64 now)
{
	bpf_spin_lock(&lock);
	if (slot && node_of(slot)->tasks && !link_of(slot, ORDER_BOOST)->linked)
		order_add(ORDER_BOOST, slot, now);
	bpf_spin_unlock(&lock);
	return 0;
}

/* Remove a cgroup from ORDER_BOOST. Returns 0. */
__noinline int no_more_boost(u32 slot)
{
	bpf_spin_lock(&lock);
	order_drop(ORDER_BOOST, slot);
	bpf_spin_unlock(&lock);
	return 0;
}

/* The first cgroup that may go ahead of others, not marked for a CPU; 0: none. */
__noinline u32 boost_due(u64 now, u32 cpu)
{
	u32 left = at_once, slot;

	while (left-- && can_loop) {
		slot = first_boosted(cpu);
		if (!slot || may_boost(slot, now))
			return slot;
		no_more_boost(slot);
	}
	return 0;
}

/**
 * choose_at - choose at one level of the tree
 * @at: the cgroup whose children and own tasks compete
 * @mine: the child that contains the task which ran on the CPU and could go on; 0: none
 * @keep: whether that task is one of the cgroup's own
 * @cpu: the CPU whose marks count
 *
 * Return: TURN(TURN_NONE, child) for a child; TURN(TURN_TREE, at) for the cgroup's own tasks; 0:
 * there is nothing to run here.
 */
__noinline u64 choose_at(u32 at, u32 mine, u32 keep, u32 cpu)
{
	struct node *node = node_of(at);
	u64 vtime = node->own_vtime;
	u32 best, first;
	bool own;

	bpf_spin_lock(&lock);
	best = first_not_tried(ORDER_TREE, at, cpu);
	own = keep || (node->tasks && !was_tried(cpu, at));
	if (mine && (!best || before(node_of(mine)->vtime, node_of(best)->vtime)))
		best = mine;
	if (own && (!best || !before(node_of(best)->vtime, vtime)))
		best = 0;
	else
		own = false;
	if (best)
		vtime = node_of(best)->vtime;
	/* The time does not pass a child that was skipped for this CPU: its turn is to come. */
	first = order_first(ORDER_TREE, at);
	if (first && before(node_of(first)->vtime, vtime))
		vtime = node_of(first)->vtime;
	if ((own || best) && before(node->vtime_now, vtime))
		node->vtime_now = vtime;
	bpf_spin_unlock(&lock);
	return own ? TURN(TURN_TREE, at) : TURN(TURN_NONE, best);
}

/**
 * descend - choose from the root down, by the least virtual time
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 * @cpu: the CPU whose marks count
 *
 * Return: a turn: TURN_TREE, or TURN_KEEP if it comes to that task's own cgroup; TURN_NONE: there
 * is nothing to run. A cgroup without anything to run is marked.
 */
__noinline u64 descend(u32 prev, u32 cpu)
{
	bool along = prev > 0;
	u32 at = 0, last = within(prev - 1);
	u64 turn;

	while (can_loop) {
		bool keep = along && at == last;
		u32 mine = 0;

		if (along && !keep) {
			mine = last;
			while (node_of(mine)->parent != at && mine && can_loop)
				mine = node_of(mine)->parent;
		}
		turn = choose_at(at, mine, keep, cpu);
		if (turn >> 32)
			return keep ? TURN(TURN_KEEP, at) : turn;
		if (!turn) {
			if (!at)
				break;
			mark_tried(cpu, at);
			at = 0;
			along = prev > 0;
			continue;
		}
		at = turn;
		if (at != mine)
			along = false;
	}
	return TURN(TURN_NONE, 0);
}

/**
 * choose - choose the cgroup that a CPU is to serve next
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 * @now: the time
 * @cpu: the CPU whose marks count
 *
 * Return: a turn. A rescue comes first, then a boost (of a waiting task before one of the task that
 * ran here), then the least virtual time.
 */
__noinline u64 choose(u32 prev, u64 now, u32 cpu)
{
	u32 slot;

	slot = rescue_due(now, cpu);
	if (slot)
		return TURN(TURN_RESCUE, slot);
	slot = boost_due(now, cpu);
	if (slot)
		return TURN(TURN_BOOST, slot);
	if (prev && may_boost(prev - 1, now))
		return TURN(TURN_KEEP, within(prev - 1));
	return descend(prev, cpu);
}

/**
 * comes_before - whether a cgroup that begins to wait comes before one that has a task running
 * @waiting: the first
 * @running: the second
 * @ran: CPU time in ns that the running task has not paid for yet
 *
 * Return: whether it does, by the virtual times of their ancestors that are siblings; false if one
 * is an ancestor of the other.
 */
__noinline int comes_before(u32 waiting, u32 running, u64 ran)
{
	struct node *node;

	while (node_of(waiting)->depth > node_of(running)->depth && can_loop)
		waiting = node_of(waiting)->parent;
	while (node_of(running)->depth > node_of(waiting)->depth && can_loop)
		running = node_of(running)->parent;
	while (waiting != running && node_of(waiting)->parent != node_of(running)->parent &&
	       can_loop) {
		waiting = node_of(waiting)->parent;
		running = node_of(running)->parent;
	}
	if (waiting == running)
		return false;
	node = node_of(running);
	return before(node_of(waiting)->vtime,
		      node->vtime + ran * WEIGHT_DEFAULT / (node->weight ?: 1));
}

/* --- Entries --- */

static u32 free_slots[SLOTS];
static u32 free_count;
static u32 fresh_slot = 1; /* the first slot that was never used; 0 is the root's */

/* Take a free slot; 0: there is none. */
__noinline u32 take_slot(void)
{
	u32 slot = 0;

	bpf_spin_lock(&lock);
	if (free_count)
		slot = free_slots[within(--free_count)];
	else if (fresh_slot < SLOTS)
		slot = fresh_slot++;
	bpf_spin_unlock(&lock);
	return slot;
}

/*
 * Free a slot, whose cgroup has no tasks and no children any more. Returns 0. The caller has called
 * settle_up() before.
 */
__noinline int give_slot_back(u32 slot)
{
	bpf_spin_lock(&lock);
	order_drop(ORDER_BOOST, slot);
	order_drop(ORDER_PAUSE, slot);
	order_drop(ORDER_RESCUE, slot);
	order_drop(ORDER_TREE, slot);
	if (slot && free_count < SLOTS)
		free_slots[within(free_count++)] = slot;
	bpf_spin_unlock(&lock);
	return 0;
}

#endif
