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
#define SLACK_SLICES	   2 /* that a cgroup with something to run may be behind, for its weight */
#define FLAT_MOST_NS	   10000000000ULL

struct bpf_spin_lock lock SEC(".bss.lock") __hidden;

struct sched_control control;
struct sched_cgroup cgroups[SLOTS];

static u32 at_once = 32; /* cgroups that a single call resumes, or whose boost it ends, at most */

/* Reason of a turn. */
enum turn {
	TURN_NONE = 0,
	TURN_TREE = 1,	 /* the least virtual time */
	TURN_BOOST = 2,	 /* a budget for going first */
	TURN_RESCUE = 3, /* too long a wait */
	TURN_KEEP = 4,	 /* the CPU stays with the cgroup whose task was running on it */
};

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

/* Virtual time that a cgroup is charged for CPU time. */
static __always_inline u64 charged(struct node *node, u64 ran)
{
	return ran * WEIGHT_DEFAULT / (node->weight ?: 1);
}

/* The least virtual time that a cgroup has which comes back: see settle(). */
static __always_inline u64 floor_of(struct node *node, u32 went_on)
{
	u64 now = node_of(node->parent)->vtime_now;

	return went_on ? now - charged(node, SLACK_SLICES * control.slice_ns) : now;
}

/**
 * settle - add a cgroup to ORDER_TREE or remove it, as it belongs
 * @slot: the cgroup
 * @went_on: whether the task that comes back had no more than its CPU taken, and did not sleep
 *
 * One that slept gets the virtual time that its siblings have reached. One whose only task was
 * running, so that nothing of it waited, may still be a little behind: it had its turn because it
 * was, and would lose that.
 *
 * Return: whether anything was changed.
 */
__noinline int settle(u32 slot, u32 went_on)
{
	struct node *node = node_of(slot);
	bool linked, wanted;
	u64 least;

	bpf_spin_lock(&lock);
	linked = link_of(slot, ORDER_TREE)->linked;
	wanted = wants(node);
	if (wanted && !linked) {
		least = floor_of(node, went_on);
		if (before(node->vtime, least))
			node->vtime = least;
		order_add(ORDER_TREE, slot, node->vtime);
	} else if (linked && !wanted) {
		order_remove(ORDER_TREE, slot);
	}
	bpf_spin_unlock(&lock);
	return linked != wanted;
}

/* Settle a cgroup and those above it, up to the first where nothing changes. Returns 0. */
__noinline int settle_up(u32 slot, u32 went_on)
{
	while (slot && can_loop) {
		if (is_settled(slot) || !settle(slot, went_on))
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/*
 * Note whether a cgroup is active: whether tasks of it, or of a cgroup below it, run or wait. One
 * that becomes active gets at least the virtual time that its siblings have reached. Returns
 * whether anything was changed.
 */
__noinline int activate(u32 slot)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	bool is_active, changed;

	bpf_spin_lock(&lock);
	is_active = node->runnable || node->active_weight;
	changed = is_active != node->active;
	if (changed && is_active) {
		node->counted = node->weight ?: 1;
		parent->active_weight += node->counted;
		if (before(node->vtime, parent->vtime_now) && !link_of(slot, ORDER_TREE)->linked)
			node->vtime = parent->vtime_now;
	} else if (changed) {
		parent->active_weight -= node->counted;
	}
	node->active = is_active;
	bpf_spin_unlock(&lock);
	return changed;
}

/* The same for those above it, up to the first where nothing changes. Returns 0. */
__noinline int activate_up(u32 slot)
{
	while (slot && can_loop) {
		if (!activate(slot))
			break;
		slot = node_of(slot)->parent;
	}
	return 0;
}

/*
 * CPU time of a cgroup, by the part of the tree's time that it gets while all that are active now
 * stay so: in the unit of virtual time at the highest level at which there is a choice.
 */
__noinline u64 flat_time(u32 slot, u64 ran)
{
	u64 flat = ran;

	while (slot && can_loop) {
		struct node *node = node_of(slot);
		u64 all = node_of(node->parent)->active_weight, weight = node->weight ?: 1;

		if (all > weight) {
			flat = ran * WEIGHT_DEFAULT / weight;
			ran = ran * all / weight;
			if (ran > FLAT_MOST_NS)
				ran = FLAT_MOST_NS;
		}
		slot = node->parent;
	}
	return flat;
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
		lead = charged(node, control.boost_lead_ns);
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
	u32 penalty = node->penalty ?: 1;
	u64 out, until = 0;
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
	node->vtime += charged(node, ran * penalty);
	/* No sibling waits, so running has cost none of them anything. */
	if (!parent->children[0] && before(parent->vtime_now, node->vtime))
		parent->vtime_now = node->vtime;
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
	if (node->has_lane)
		node->flat += flat_time(slot, ran * (node->penalty ?: 1));
	if (!node->children[0] && !node->tasks)
		node->vtime_now = node->own_vtime;
	while (can_loop) {
		if (pay(slot, ran, now, boosted))
			settle_up(slot, false);
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

/* A cgroup with tasks that may have waited for too long; 0: none. */
__noinline u32 rescue_due(u64 now)
{
	u32 slot;

	bpf_spin_lock(&lock);
	slot = order_first(ORDER_RESCUE, 0);
	if (slot && !is_due(slot, ORDER_RESCUE, now))
		slot = 0;
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

/* The first cgroup that may go ahead of others; 0: none. */
__noinline u32 boost_due(u64 now)
{
	u32 left = at_once, slot;

	while (left-- && can_loop) {
		slot = order_first(ORDER_BOOST, 0);
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
 *
 * The time of the competition follows what is chosen, and nothing holds it back: a cgroup that is
 * passed over because its tasks cannot be had is no reason to stop the others' time.
 *
 * Return: TURN(TURN_NONE, child) for a child; TURN(TURN_TREE, at) for the cgroup's own tasks; 0:
 * there is nothing to run here.
 */
__noinline u64 choose_at(u32 at, u32 mine, u32 keep)
{
	struct node *node = node_of(at);
	u64 vtime = node->own_vtime;
	u32 best;
	bool own;

	bpf_spin_lock(&lock);
	best = order_first(ORDER_TREE, at);
	own = keep || node->tasks;
	if (mine && (!best || before(node_of(mine)->vtime, node_of(best)->vtime)))
		best = mine;
	if (own && (!best || !before(node_of(best)->vtime, vtime)))
		best = 0;
	else
		own = false;
	if (best)
		vtime = node_of(best)->vtime;
	if ((own || best) && before(node->vtime_now, vtime))
		node->vtime_now = vtime;
	bpf_spin_unlock(&lock);
	return own ? TURN(TURN_TREE, at) : TURN(TURN_NONE, best);
}

/**
 * descend - choose from the root down, by the least virtual time
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 *
 * Return: a turn: TURN_TREE, or TURN_KEEP if it comes to that task's own cgroup; TURN_NONE: there
 * is nothing to run.
 */
__noinline u64 descend(u32 prev)
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
		turn = choose_at(at, mine, keep);
		if (turn >> 32)
			return keep ? TURN(TURN_KEEP, at) : turn;
		if (!turn)
			break;
		at = turn;
		if (at != mine)
			along = false;
	}
	return TURN(TURN_NONE, at);
}

/**
 * choose - choose the cgroup that a CPU is to serve next
 * @prev: slot, plus one, of the task that ran on the CPU and could go on; 0: there is none
 * @now: the time
 *
 * Return: a turn. A rescue comes first, then a boost (of a waiting task before one of the task that
 * ran here), then the least virtual time. TURN_NONE with a slot: another CPU has just taken the
 * last task below that cgroup.
 */
__noinline u64 choose(u32 prev, u64 now)
{
	u32 slot;

	slot = rescue_due(now);
	if (slot)
		return TURN(TURN_RESCUE, slot);
	slot = boost_due(now);
	if (slot)
		return TURN(TURN_BOOST, slot);
	if (prev && may_boost(prev - 1, now))
		return TURN(TURN_KEEP, within(prev - 1));
	return descend(prev);
}

/* Two cgroups as one number, and the parts of it. */
#define PAIR(a, b) ((u64)(a) << 32 | (b))

/*
 * The ancestors of two cgroups, or they themselves, that are siblings, as a PAIR; the same slot
 * twice: one of the two is the other's ancestor, or they are the same.
 */
__noinline u64 siblings_of(u32 a, u32 b)
{
	while (node_of(a)->depth > node_of(b)->depth && can_loop)
		a = node_of(a)->parent;
	while (node_of(b)->depth > node_of(a)->depth && can_loop)
		b = node_of(b)->parent;
	while (a != b && node_of(a)->parent != node_of(b)->parent && can_loop) {
		a = node_of(a)->parent;
		b = node_of(b)->parent;
	}
	return PAIR(a, b);
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
	u64 pair = siblings_of(waiting, running);
	struct node *node = node_of((u32)pair);

	waiting = pair >> 32;
	if (waiting == (u32)pair)
		return false;
	return before(node_of(waiting)->vtime, node->vtime + charged(node, ran));
}

/*
 * Have a cgroup pass its turn on for once, because none of its waiting tasks can be had here: it
 * and those above it are charged some time that they did not run. Returns 0.
 */
__noinline int give_way(u32 slot, u64 ns)
{
	while (slot && can_loop) {
		struct node *node = node_of(slot);

		bpf_spin_lock(&lock);
		node->vtime += charged(node, ns);
		if (link_of(slot, ORDER_TREE)->linked)
			order_move(ORDER_TREE, slot, node->vtime);
		bpf_spin_unlock(&lock);
		slot = node->parent;
	}
	return 0;
}

/*
 * Set a cgroup's weight. What it is ahead of its siblings counts by the new one: it would wait for
 * long otherwise, after a rise. Returns 0.
 */
__noinline int set_weight(u32 slot, u32 weight)
{
	struct node *node = node_of(slot), *parent = node_of(node->parent);
	s64 ahead;

	bpf_spin_lock(&lock);
	ahead = node->vtime - parent->vtime_now;
	if (ahead > 0 && weight)
		node->vtime = parent->vtime_now + (u64)ahead * node->weight / weight;
	node->weight = weight;
	if (link_of(slot, ORDER_TREE)->linked)
		order_move(ORDER_TREE, slot, node->vtime);
	if (node->active) {
		parent->active_weight += (weight ?: 1) - (u64)node->counted;
		node->counted = weight ?: 1;
	}
	bpf_spin_unlock(&lock);
	return 0;
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
