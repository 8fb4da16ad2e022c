/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Paying for CPU time: virtual time, budgets, the tokens of cpu.max, and the pauses of those that
 * have none left.
 */
#ifndef AGENTCG_SCHED_PAY_H
#define AGENTCG_SCHED_PAY_H

#include "sched_tree.h"

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
 * The caller holds the lock of pauses, and calls settle_up() afterwards.
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

/*
 * End the pause of a paused cgroup. The caller holds the lock of pauses, and calls settle_up()
 * afterwards.
 */
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
	struct guard *guard = guard_of(GUARD_PAUSE);
	struct node *node;
	u32 slot = order_first(ORDER_PAUSE, 0);

	if (!slot || !is_due(slot, ORDER_PAUSE, now) || !guard)
		return 0;
	bpf_spin_lock(&guard->lock);
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
	bpf_spin_unlock(&guard->lock);
	return slot;
}

/* End the pauses whose time has come, at most `at_once` of them. Returns 0. */
__noinline int resume_due(u64 now)
{
	u32 left = READ_ONCE(at_once), slot;

	while (left-- && can_loop) {
		slot = resume_one(now);
		if (!slot)
			break;
		settle_up(slot, false);
	}
	return 0;
}

/*
 * End the pause of a cgroup, if it has one, because its limit was changed. Returns 0. The caller
 * calls settle_up() afterwards.
 */
__noinline int resume_now(u32 slot, u64 now)
{
	struct guard *guard = guard_of(GUARD_PAUSE);

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	if (node_of(slot)->paused_ns)
		resume(slot, now);
	bpf_spin_unlock(&guard->lock);
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
		lead = charged(node, control.boost_lead_ns);
		if ((s64)(node->vtime - node_of(node->parent)->vtime_now) > (s64)lead)
			return false;
		slot = node->parent;
	}
	return has_budget;
}

/* --- Paying --- */

/* Take CPU time from the budget of a cgroup that has one. Returns 0. */
__noinline int pay_from_budget(u32 slot, u64 ran, u64 now)
{
	struct sched_cgroup *cgroup = cgroup_of(slot);
	struct guard *guard = guard_of(slot * STRIPES);
	struct node *node = node_of(slot);

	if (!guard)
		return 0;
	bpf_spin_lock(&guard->lock);
	node->budget_ns = budget_of(node, cgroup, now) - ran;
	node->budget_at_ns = now;
	bpf_spin_unlock(&guard->lock);
	return 0;
}

/*
 * Take CPU time from the tokens of cpu.max, and pause a cgroup that has none left, or that pays a
 * penalty for its memory. Returns whether it is paused now, and was not before.
 */
__noinline int pay_limits(u32 slot, u64 ran, u64 now)
{
	struct node *node = node_of(slot);
	struct guard *guard = guard_of(GUARD_PAUSE);
	u32 penalty = node->penalty ?: 1;
	u64 out, until = 0;
	bool was_paused;

	if (!guard)
		return false;
	bpf_spin_lock(&guard->lock);
	was_paused = node->paused_ns;
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
	bpf_spin_unlock(&guard->lock);
	return until && !was_paused;
}

/**
 * pay - charge CPU time to a cgroup, at its own level only
 * @slot: the cgroup
 * @ran: CPU time in ns
 * @now: the time
 * @boosted: how much of it was taken ahead of others
 *
 * Return: 0.
 */
__noinline int pay(u32 slot, u64 ran, u64 now, u64 boosted)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	struct sched_cgroup *cgroup = cgroup_of(slot);

	__sync_fetch_and_add(&cgroup->run_ns, ran);
	if (boosted)
		__sync_fetch_and_add(&cgroup->boosted_ns, boosted);
	if (cgroup->boost_cap_ns)
		pay_from_budget(slot, ran, now);
	if (!slot)
		return 0;
	__sync_fetch_and_add(&node->vtime, charged(node, ran * (node->penalty ?: 1)));
	/* No sibling waits, so running has cost none of them anything. */
	if (!has_children(node->parent) && before(parent->vtime_now, node->vtime))
		parent->vtime_now = node->vtime;
	if ((node->quota_usec || node->penalty > 1) && pay_limits(slot, ran, now))
		settle_up(slot, false);
	return 0;
}

/*
 * Virtual time that the cgroup of a CPU's task, and the one above it, were charged when the task
 * was chosen: a grain. Without it all CPUs that choose before the task pays would choose the same
 * cgroup.
 */
static struct {
	u64 vtime;
	u64 above;
	u32 slot;
	u32 reserved;
} __line loans[ABI_SCHED_CPUS];

/* Undo what the task of a CPU was charged when it was chosen. Returns 0. */
__noinline int settle_loan(u32 cpu)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u32 slot = loans[at].slot;

	if (!slot)
		return 0;
	loans[at].slot = 0;
	__sync_fetch_and_add(&node_of(slot)->vtime, -loans[at].vtime);
	__sync_fetch_and_add(&node_of(node_of(slot)->parent)->vtime, -loans[at].above);
	return 0;
}

/* Charge a cgroup whose task was chosen for a CPU until that pays. Returns 0. */
__noinline int lend(u32 cpu, u32 slot)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1), grain = control.slice_ns / GRAINS;
	u32 above = node_of(slot)->parent;

	settle_loan(cpu);
	loans[at].vtime = charged(node_of(slot), grain);
	loans[at].above = charged(node_of(above), grain);
	loans[at].slot = slot;
	__sync_fetch_and_add(&node_of(slot)->vtime, loans[at].vtime);
	__sync_fetch_and_add(&node_of(above)->vtime, loans[at].above);
	return 0;
}

/* CPU time that a CPU's tasks have used and that is not charged yet to a cgroup high in the tree.
 */
static struct {
	u64 ran;
	u64 boosted;
	u64 since_ns;
	u32 slot;
	u32 reserved;
} __line gathered[ABI_SCHED_CPUS];

/* Charge what a CPU has gathered to the cgroup and all above it. Returns 0. */
__noinline int pay_gathered(u32 cpu, u64 now)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1);
	u64 ran = gathered[at].ran, boosted = gathered[at].boosted;
	u32 slot = gathered[at].slot;

	gathered[at].ran = 0;
	gathered[at].boosted = 0;
	gathered[at].since_ns = now;
	while (ran && can_loop) {
		pay(slot, ran, now, boosted);
		if (!slot)
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/*
 * Charge the CPU time of a CPU's task to its cgroup and all above it: at once to the two lowest
 * levels, in which turns are short; to those above, which many CPUs write to, every GATHER_NS.
 * Returns 0.
 */
__noinline int pay_up(u32 slot, u64 ran, u64 now, u32 boosted, u32 cpu)
{
	u64 at = MASKED(cpu, ABI_SCHED_CPUS - 1), ahead = boosted ? ran : 0;
	struct node *node = node_of(slot);
	u32 above;

	settle_loan(cpu);
	__sync_fetch_and_add(&node->own_vtime, ran);
	if (node->has_lane)
		__sync_fetch_and_add(&node->flat, flat_time(slot, ran * (node->penalty ?: 1)));
	if (!has_children(slot) && !node->tasks)
		node->vtime_now = node->own_vtime;
	pay(slot, ran, now, ahead);
	if (!slot)
		return 0;
	above = node->parent;
	pay(above, ran, now, ahead);
	if (!above)
		return 0;
	above = node_of(above)->parent;
	if (gathered[at].slot != above) {
		pay_gathered(cpu, now);
		gathered[at].slot = above;
	}
	gathered[at].ran += ran;
	gathered[at].boosted += ahead;
	if (now - gathered[at].since_ns >= GATHER_NS)
		pay_gathered(cpu, now);
	return 0;
}

#endif
