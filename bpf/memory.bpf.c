// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of calls: marks and rates told without polling, growth denied, and the one reaction that
 * cannot wait for the daemon.
 *
 * The daemon writes `limits`, one entry for each managed cgroup; the programs keep what they have
 * seen in `states`. Usage is the kernel's own page counter of the memory cgroup, so it is what the
 * limits of cgroup v2 are compared with. All programs end early for tasks in no managed cgroup.
 */
#include "compat.h"

char LICENSE[] SEC("license") = "GPL";

#define ENOMEM		 12
#define NSEC_PER_SEC	 1000000000ULL
#define WINDOW_NS	 100000000ULL  /* rates are taken over at least this long */
#define HIGH_INTERVAL_NS 100000000ULL  /* memory.high is passed at every charge above it */
#define STALL_MAX_NS	 2000000000ULL /* the longest that memory.high makes a task sleep */
#define CHAIN_MAX	 3	       /* call, session, pool */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct memory_limits);
} limits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct memory_state);
} states SEC(".maps");

/* Faults of a task that are in its cgroup's state already, and when it began to stall. */
struct task_seen {
	u64 minor;
	u64 major;
	u64 stalled_ns;
	u64 session;
	u32 depth; /* stalls nest */
	u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_seen);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

struct memory_control control = {};

/* Where a task's memory is charged; NULL without a memory controller. */
static __always_inline struct mem_cgroup *task_memcg(struct task_struct *task)
{
	u32 id = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	u32 offset = bpf_core_field_offset(struct css_set, subsys);
	struct cgroup_subsys_state *css =
		*(struct cgroup_subsys_state **)((void *)task->cgroups + offset + id * 8);

	return css ? (void *)css - bpf_core_field_offset(struct mem_cgroup, css) : NULL;
}

static __always_inline struct page_counter *memory_of(struct mem_cgroup *memcg)
{
	return (void *)memcg + bpf_core_field_offset(struct mem_cgroup, memory);
}

static __always_inline u64 usage_bytes(struct page_counter *counter)
{
	return BPF_CORE_READ(counter, usage.counter) * page_bytes;
}

/* The managed cgroup at or above a memory cgroup; *memcg is moved up to it. */
static __always_inline struct memory_limits *find_limits(struct mem_cgroup **memcg, u64 *id)
{
	u32 offset = bpf_core_field_offset(struct mem_cgroup, css);
	struct cgroup_subsys_state *css = (void *)*memcg + offset;
	int level = css->cgroup->level;
	struct memory_limits *entry;

	*id = cgroup_id(css->cgroup);
	entry = bpf_map_lookup_elem(&limits, id);
	for (int i = 1; !entry && i <= ABI_DEPTH_MAX && i < level; i++) {
		css = css->parent;
		*id = cgroup_id(css->cgroup);
		entry = bpf_map_lookup_elem(&limits, id);
	}
	*memcg = (void *)css - offset;
	return entry;
}

static __always_inline struct memory_state *find_state(u64 id)
{
	struct memory_state *state = bpf_map_lookup_elem(&states, &id);

	if (!state)
		__sync_fetch_and_add(&control.untracked, 1);
	return state;
}

static __always_inline void *reserve(u32 type, u32 size_bytes, u64 id)
{
	struct event *event = bpf_ringbuf_reserve(&events, size_bytes, 0);

	if (!event) {
		__sync_fetch_and_add(&control.lost, 1);
		return NULL;
	}
	event->type = type;
	event->size_bytes = size_bytes;
	event->at_ns = bpf_ktime_get_ns();
	event->cgroup_id = id;
	return event;
}

/* One crossing, one event: whoever changes `above_mark` sends it. */
static __always_inline void check_mark(struct memory_limits *limit, struct memory_state *state,
				       u64 id, u64 usage)
{
	struct mark_event *event;
	u32 above;

	if (!limit->soft_mark_bytes)
		return;
	if (!state->above_mark && usage > limit->soft_mark_bytes)
		above = 1;
	else if (state->above_mark && usage < limit->soft_low_bytes)
		above = 0;
	else
		return;
	if (__sync_val_compare_and_swap(&state->above_mark, !above, above) != !above)
		return;
	if (above)
		__sync_fetch_and_add(&state->marks_crossed, 1);
	event = reserve(EVENT_MARK, sizeof(*event), id);
	if (!event) {
		/* Not told: to be found again at the next charge. */
		state->above_mark = !above;
		return;
	}
	event->usage_bytes = usage;
	event->mark_bytes = limit->soft_mark_bytes;
	event->above = above;
	event->pid = visible_pid(bpf_get_current_task_btf());
	bpf_ringbuf_submit(event, 0);
}

static __always_inline void check_rates(struct memory_limits *limit, struct memory_state *state,
					u64 id)
{
	u64 now = bpf_ktime_get_ns(), then = state->window_ns, span = now - then;
	u64 faults, refaults, rate, rerate;
	struct rates_event *event;
	u32 above;

	if (!limit->faults_per_s && !limit->refaults_per_s)
		return;
	if (then && span < WINDOW_NS)
		return;
	/* One task takes the window; the others of this moment count into the next. */
	if (__sync_val_compare_and_swap(&state->window_ns, then, now) != then)
		return;
	faults = state->faults - state->window_faults;
	refaults = state->refaults - state->window_refaults;
	state->window_faults = state->faults;
	state->window_refaults = state->refaults;
	if (!then)
		return;
	rate = faults * NSEC_PER_SEC / span;
	rerate = refaults * NSEC_PER_SEC / span;
	if (!state->above_rate)
		above = (limit->faults_per_s && rate > limit->faults_per_s) ||
			(limit->refaults_per_s && rerate > limit->refaults_per_s);
	else
		above = (limit->faults_per_s && rate > limit->faults_per_s / 2) ||
			(limit->refaults_per_s && rerate > limit->refaults_per_s / 2);
	if (above == state->above_rate)
		return;
	event = reserve(EVENT_RATES, sizeof(*event), id);
	if (!event)
		return;
	state->above_rate = above;
	event->faults_per_s = rate;
	event->refaults_per_s = rerate;
	event->above = above;
	event->reserved = 0;
	bpf_ringbuf_submit(event, 0);
}

/* Faults of this task since it was last seen. */
static __always_inline void count_faults(struct task_struct *task, u64 *faults, u64 *major)
{
	struct task_seen *seen = bpf_task_storage_get(&tasks, task, 0, 0);
	u64 min_flt = task->min_flt, maj_flt = task->maj_flt;

	*faults = *major = 0;
	if (!seen) {
		struct task_seen first = { .minor = min_flt, .major = maj_flt };

		bpf_task_storage_get(&tasks, task, &first, BPF_LOCAL_STORAGE_GET_F_CREATE);
		return;
	}
	*major = maj_flt - seen->major;
	*faults = min_flt - seen->minor + *major;
	seen->minor = min_flt;
	seen->major = maj_flt;
}

/* How far a cgroup is above the mark that it is to grow slowly from; for sched.bpf.c. */
static __always_inline void note_over(struct memory_limits *limit, struct memory_state *state,
				      struct page_counter *counter, u64 usage)
{
	u64 mark = limit->throttle_mark_bytes, over;

	if (!mark)
		mark = BPF_CORE_READ(counter, high) * page_bytes;
	if (usage <= mark || !mark) {
		state->over_permille = 0;
		return;
	}
	over = (usage - mark) * 1000 / mark;
	state->over_permille = over < 1000 ? over + 1 : 1000;
	state->over_at_ns = bpf_ktime_get_ns();
}

/*
 * Runs when a CPU's stock of charged pages is used up, once for each 64 pages or so
 * (MEMCG_CHARGE_BATCH, mm/memcontrol.c), before they are charged: a mark is told when the charge
 * that passes it is asked for. Charges for another task's cgroup are left out.
 */
SEC("fentry/page_counter_try_charge")
int BPF_PROG(on_charge, struct page_counter *counter, unsigned long pages)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct mem_cgroup *memcg = task_memcg(task);
	u64 id, more, faults, major;
	struct memory_limits *limit;

	if (!memcg || memory_of(memcg) != counter)
		return 0;
	limit = find_limits(&memcg, &id);
	if (!limit)
		return 0;
	counter = memory_of(memcg);
	more = pages * page_bytes;
	count_faults(task, &faults, &major);
	for (int i = 0; i < CHAIN_MAX && limit; i++) {
		struct memory_state *state = find_state(id);

		if (state) {
			__sync_fetch_and_add(&state->faults, faults);
			__sync_fetch_and_add(&state->major_faults, major);
			check_mark(limit, state, id, usage_bytes(counter) + more);
			if (limit->kind == KIND_CALL)
				note_over(limit, state, counter, usage_bytes(counter) + more);
			check_rates(limit, state, id);
		}
		id = limit->parent_id;
		limit = id ? bpf_map_lookup_elem(&limits, &id) : NULL;
		counter = BPF_CORE_READ(counter, parent);
	}
	return 0;
}

/* A page comes back that was reclaimed not long ago; runs for nothing else. */
SEC("fentry/workingset_refault")
int BPF_PROG(on_refault)
{
	struct mem_cgroup *memcg = task_memcg(bpf_get_current_task_btf());
	struct memory_limits *limit;
	u64 id;

	if (!memcg)
		return 0;
	limit = find_limits(&memcg, &id);
	for (int i = 0; i < CHAIN_MAX && limit; i++) {
		struct memory_state *state = find_state(id);

		if (state)
			__sync_fetch_and_add(&state->refaults, 1);
		id = limit->parent_id;
		limit = id ? bpf_map_lookup_elem(&limits, &id) : NULL;
	}
	return 0;
}

static __always_inline int passed_high(struct mem_cgroup *memcg)
{
	struct page_counter *counter;
	struct memory_state *state;
	struct high_event *event;
	u64 id, now, then;

	if (!find_limits(&memcg, &id))
		return 0;
	state = find_state(id);
	if (!state)
		return 0;
	__sync_fetch_and_add(&state->high_events, 1);
	now = bpf_ktime_get_ns();
	state->high_at_ns = now;
	then = state->high_told_ns;
	if (then && now - then < HIGH_INTERVAL_NS)
		return 0;
	if (__sync_val_compare_and_swap(&state->high_told_ns, then, now) != then)
		return 0;
	event = reserve(EVENT_HIGH, sizeof(*event), id);
	if (!event)
		return 0;
	counter = memory_of(memcg);
	event->usage_bytes = usage_bytes(counter);
	event->high_bytes = BPF_CORE_READ(counter, high) * page_bytes;
	event->count = state->high_events;
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/* Out of line since "memcg: disable kmem charging in nmi for unsupported arch" (6.16). */
SEC("fentry/__memcg_memory_event")
int BPF_PROG(on_memory_event, struct mem_cgroup *memcg, enum memcg_memory_event event)
{
	if (event != bpf_core_enum_value(enum memcg_memory_event, MEMCG_HIGH))
		return 0;
	return passed_high(memcg);
}

/* Before that: on the way back to user space, for a task that went above a high. */
SEC("fentry/mem_cgroup_handle_over_high")
int BPF_PROG(on_over_high)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct mem_cgroup *memcg;

	if (!BPF_CORE_READ(task, memcg_nr_pages_over_high))
		return 0;
	memcg = task_memcg(task);
	return memcg ? passed_high(memcg) : 0;
}

/* Deny growth from now on for everything less important than a session that stalls. */
static __always_inline void become_urgent(struct protected_session *slot, u64 stalled_ns, u64 now)
{
	struct urgent_event *event;
	struct memory_state *pool;

	if (now < control.urgent_until_ns || now < control.lifted_until_ns)
		return;
	/* A session at a limit of its own is not helped by others: the pool must be short. */
	pool = bpf_map_lookup_elem(&states, &control.pool_id);
	if (!pool || !pool->above_mark)
		return;
	control.urgent_priority = slot->priority;
	control.urgent_until_ns = now + control.urgent_lease_ns;
	__sync_fetch_and_add(&control.urgent_count, 1);
	event = reserve(EVENT_URGENT, sizeof(*event), slot->cgroup_id);
	if (!event)
		return;
	event->stalled_ns = stalled_ns;
	event->until_ns = control.urgent_until_ns;
	event->priority = slot->priority;
	event->pid = visible_pid(bpf_get_current_task_btf());
	bpf_ringbuf_submit(event, 0);
}

static __always_inline struct protected_session *find_protected(u64 id)
{
	for (u32 i = 0; i < ABI_PROTECTED_MAX; i++) {
		if (i >= control.protected_count)
			break;
		if (control.protected_sessions[i].cgroup_id == id)
			return &control.protected_sessions[i];
	}
	return NULL;
}

/* The protected session that the current task is of, or NULL. */
static __always_inline struct protected_session *my_protected(struct task_struct *task)
{
	struct mem_cgroup *memcg;
	struct memory_limits *limit;
	u64 id;

	if (!control.protected_count)
		return NULL;
	memcg = task_memcg(task);
	limit = memcg ? find_limits(&memcg, &id) : NULL;
	return limit ? find_protected(limit->parent_id) : NULL;
}

/*
 * Each stall has a beginning and an end, but a program is left out when it has been interrupted on
 * its CPU; so nothing here counts on both, and what lasts too long is taken to be over.
 */
static __always_inline void begin_stall(struct task_struct *task)
{
	struct protected_session *slot = my_protected(task);
	struct task_seen *seen, first = {};
	u64 now;

	if (!slot)
		return;
	seen = bpf_task_storage_get(&tasks, task, &first, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!seen)
		return;
	now = bpf_ktime_get_ns();
	if (seen->depth && now - seen->stalled_ns < STALL_MAX_NS) {
		seen->depth++;
		return;
	}
	seen->depth = 1;
	seen->stalled_ns = now;
	seen->session = slot->cgroup_id;
	if (slot->stalling && now - slot->stalling_since_ns >= STALL_MAX_NS)
		slot->stalling = 0;
	if (!__sync_fetch_and_add(&slot->stalling, 1))
		slot->stalling_since_ns = now;
}

static __always_inline void end_stall(struct task_struct *task)
{
	struct protected_session *slot;
	struct task_seen *seen;
	u64 now;

	if (!control.protected_count)
		return;
	seen = bpf_task_storage_get(&tasks, task, 0, 0);
	if (!seen || !seen->depth || --seen->depth)
		return;
	slot = find_protected(seen->session);
	if (!slot)
		return;
	/* Time in which some task stalls, as PSI counts it: until the last one has ended. */
	if (!slot->stalling || __sync_fetch_and_add(&slot->stalling, -1) != 1)
		return;
	now = bpf_ktime_get_ns();
	if (now - slot->window_ns > control.stall_window_ns) {
		slot->window_ns = now;
		slot->stalled_ns = 0;
	}
	slot->stalled_ns += now - slot->stalling_since_ns;
	if (slot->stalled_ns >= control.stall_threshold_ns)
		become_urgent(slot, slot->stalled_ns, now);
}

SEC("fentry/psi_memstall_enter")
int BPF_PROG(on_stall)
{
	preempt_off();
	begin_stall(bpf_get_current_task_btf());
	preempt_on();
	return 0;
}

SEC("fentry/psi_memstall_leave")
int BPF_PROG(on_stall_end)
{
	preempt_off();
	end_stall(bpf_get_current_task_btf());
	preempt_on();
	return 0;
}

/* A stall that lasts is seen by those who would make it worse. */
static __always_inline void check_stalling(u64 now)
{
	for (u32 i = 0; i < ABI_PROTECTED_MAX; i++) {
		struct protected_session *slot = &control.protected_sessions[i];
		u64 since;

		if (i >= control.protected_count)
			break;
		since = slot->stalling_since_ns;
		if (slot->stalling && now - since >= control.stall_threshold_ns &&
		    now - since < STALL_MAX_NS)
			become_urgent(slot, now - since, now);
	}
}

/*
 * A fork asks for the child's copy too, which costs nothing until it is written to. An exec that
 * is refused halfway, and a stack that cannot grow (a fault, in no system call), kill the process
 * instead of giving it an error.
 */
static __always_inline bool must_not_fail(struct task_struct *task)
{
	long number = syscall_number((void *)bpf_task_pt_regs(task));

	return number < 0 || number == NR_CLONE || number == NR_FORK || number == NR_VFORK ||
	       number == NR_CLONE3 || number == NR_EXECVE || number == NR_EXECVEAT;
}

static __always_inline void tell_denied(struct memory_state *state, u64 id, u64 usage, u64 mark,
					u64 request, u32 round)
{
	struct denied_event *event;
	u32 before = state->told_round;

	__sync_fetch_and_add(&state->denied, 1);
	__sync_fetch_and_add(&state->denied_bytes, request);
	if (before == round ||
	    __sync_val_compare_and_swap(&state->told_round, before, round) != before)
		return;
	event = reserve(EVENT_DENIED, sizeof(*event), id);
	if (!event) {
		state->told_round = before;
		return;
	}
	event->usage_bytes = usage;
	event->mark_bytes = mark;
	event->request_bytes = request;
	event->urgent = round & 1;
	event->pid = visible_pid(bpf_get_current_task_btf());
	bpf_ringbuf_submit(event, 0);
}

/*
 * Asked before memory is promised: mmap, brk, mremap, mprotect, stacks; not by MAP_NORESERVE, and
 * not again when what was promised is touched. -ENOMEM is an error that programs know.
 */
SEC("fmod_ret/security_vm_enough_memory_mm")
int BPF_PROG(on_enough_memory, struct mm_struct *mm, long pages, int ret)
{
	struct task_struct *task;
	struct mem_cgroup *memcg;
	struct memory_limits *limit;
	struct memory_state *state;
	u64 id, usage, request, now, mark;
	bool urgent = false, over = false;
	u32 round;

	/* Mostly nothing is denied and nobody is protected. */
	if (ret || pages <= 0 || (!control.denying && !control.protected_count))
		return ret;
	task = bpf_get_current_task_btf();
	memcg = task_memcg(task);
	if (!memcg)
		return 0;
	limit = find_limits(&memcg, &id);
	if (!limit || limit->kind != KIND_CALL)
		return 0;
	state = bpf_map_lookup_elem(&states, &id);
	if (!state)
		return 0;
	usage = usage_bytes(memory_of(memcg));
	request = pages * page_bytes;
	mark = limit->deny_mark_bytes;
	if (control.protected_count) {
		now = bpf_ktime_get_ns();
		check_stalling(now);
		urgent = now < control.urgent_until_ns && limit->priority < control.urgent_priority;
	}
	if (limit->deny_mode == DENY_OVER_MARK)
		over = usage + request > mark;
	if ((!urgent && !over) || must_not_fail(task))
		return 0;
	round = over ? limit->deny_round << 1 : (u32)control.urgent_count << 1 | 1;
	if (state->allowed_round != round) {
		state->allowed_round = round;
		state->allowed_bytes = 0;
	}
	/* What is promised here may be used much later, so promises are added up. */
	if (request <= ABI_SMALL_REQUEST_BYTES &&
	    state->allowed_bytes + request <= control.allowance_bytes) {
		__sync_fetch_and_add(&state->allowed_bytes, request);
		return 0;
	}
	tell_denied(state, id, usage, mark, request, round);
	return -ENOMEM;
}
