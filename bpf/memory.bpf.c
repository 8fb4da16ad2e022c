// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of calls: events for marks and rates without polling, denied growth, and the urgent
 * reaction, which cannot wait for the daemon.
 *
 * The daemon writes `limits`, one entry for each managed cgroup; the programs keep what they have
 * seen in `states`. Usage is the kernel's own page counter of the memory cgroup, the number that
 * cgroup v2 compares with its limits. All programs return early for a task in no managed cgroup.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define ENOMEM		 12
#define NSEC_PER_SEC	 1000000000ULL
#define WINDOW_NS	 100000000ULL  /* rates are taken over at least this long */
#define HIGH_INTERVAL_NS 100000000ULL  /* between two events: every charge above it passes it */
#define STALL_MAX_NS	 2000000000ULL /* the longest that memory.high makes a task sleep */
#define CHAIN_MAX	 3	       /* call, session, pool */

ID_MAP(limits, struct memory_limits);
/* Shared with sched.bpf.c, where it is defined in the same way. */
ID_MAP(states, struct memory_state);

/* What is known of a task: its faults that its cgroup's state counts already, and its stall. */
struct task_seen {
	u64 minor;
	u64 major;
	u64 stalled_ns; /* since when it stalls, if depth is not 0 */
	u64 session;	/* cgroup id of the protected session that it stalls for */
	u32 depth;	/* stalls that have begun and not ended: they nest */
	u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_seen);
} tasks SEC(".maps");

RING_BUFFER(events, 1 << 20);

struct memory_control control = {};

/* The memory cgroup that a task's memory is charged to; NULL without a memory controller. */
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

/* Pages charged to a memory cgroup and to all below it, in bytes. */
static __always_inline u64 usage_bytes(struct page_counter *counter)
{
	return BPF_CORE_READ(counter, usage.counter) * page_bytes;
}

/**
 * find_limits - the managed cgroup that a memory cgroup belongs to
 * @memcg: a memory cgroup; set to that of the managed cgroup, which may be above it
 * @id: set to the id of the managed cgroup
 *
 * Return: the daemon's entry for the managed cgroup, or NULL.
 */
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

/* What has been seen of a managed cgroup; NULL, and counted, if there is no entry for it. */
static __always_inline struct memory_state *find_state(u64 id)
{
	struct memory_state *state = bpf_map_lookup_elem(&states, &id);

	if (!state)
		__sync_fetch_and_add(&control.untracked, 1);
	return state;
}

/**
 * reserve - make room for an event in the ring buffer, and fill in its head
 * @type: enum event_type
 * @size_bytes: size of the whole event
 * @id: the managed cgroup
 *
 * Return: the event, to be submitted; NULL if there is no room, which is counted.
 */
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

/**
 * check_mark - send an event when usage passes the soft mark or falls below its lower edge
 * @limit: the daemon's entry for the cgroup
 * @state: what has been seen of it
 * @id: its id
 * @usage: its usage in bytes, with the charge that is asked for
 *
 * Of tasks that find the same crossing, the one that changes `above_mark` sends the event.
 */
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
	if (id == control.pool_id)
		control.pool_above = above;
	if (above)
		__sync_fetch_and_add(&state->marks_crossed, 1);
	event = reserve(EVENT_MARK, sizeof(*event), id);
	if (!event) {
		/* There was no room for the event: the next charge finds the crossing again. */
		state->above_mark = !above;
		return;
	}
	event->usage_bytes = usage;
	event->mark_bytes = limit->soft_mark_bytes;
	event->above = above;
	event->pid = visible_pid(bpf_get_current_task_btf());
	bpf_ringbuf_submit(event, 0);
}

/**
 * check_rates - send an event when faults or refaults pass their rate or fall below half of it
 * @limit: the daemon's entry for the cgroup
 * @state: what has been seen of it
 * @id: its id
 *
 * Rates are per second, over a window of at least WINDOW_NS.
 */
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
	/* One task closes the window. Faults that others count meanwhile are in the next one. */
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

/**
 * count_faults - page faults of a task since this was last asked
 * @task: the current task
 * @faults: set to the number of faults, minor and major
 * @major: set to the number of major faults among them
 *
 * Both are 0 for a task that is seen for the first time.
 */
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

/**
 * note_over - note how far a call is above the mark beyond which it is slowed
 * @limit: the daemon's entry for the call
 * @state: where it is noted, in permille of the mark, for sched.bpf.c
 * @counter: its page counter, whose high is the mark if the daemon has set none
 * @usage: its usage in bytes, with the charge that is asked for
 */
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
 * Runs before pages are charged, which happens when a CPU's stock of charged pages is used up,
 * about once in 64 pages (MEMCG_CHARGE_BATCH, mm/memcontrol.c). The event for a mark is therefore
 * sent when the charge that passes it is asked for. A charge to another task's cgroup is left out.
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

/* Runs only when a page is read back that was reclaimed not long ago. */
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

/* Count that a memory cgroup passed memory.high, and send an event at most once an interval. */
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

/*
 * The function that counts memory events, for kernels that have it as one: since "memcg: disable
 * kmem charging in nmi for unsupported arch" (6.16). Before, it is inline.
 */
SEC("fentry/__memcg_memory_event")
int BPF_PROG(on_memory_event, struct mem_cgroup *memcg, enum memcg_memory_event event)
{
	if (event != bpf_core_enum_value(enum memcg_memory_event, MEMCG_HIGH))
		return 0;
	return passed_high(memcg);
}

/*
 * For older kernels: runs on the way back to user space, and looks for tasks that have charged
 * pages above a memory.high.
 */
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

/**
 * become_urgent - deny growth from now on to willing calls less important than a stalled session
 * @slot: the protected session
 * @stalled_ns: how long it has stalled, for the event
 * @now: in ns
 *
 * Nothing happens while growth is denied already or the daemon has lifted the denial, nor while the
 * pool is below its soft mark.
 */
static __always_inline void become_urgent(struct protected_session *slot, u64 stalled_ns, u64 now)
{
	struct urgent_event *event;
	struct memory_state *pool;

	if (now < control.urgent_until_ns || now < control.lifted_until_ns)
		return;
	/*
	 * A session that stalls at a limit of its own would not be helped if others stopped
	 * growing.
	 */
	pool = bpf_map_lookup_elem(&states, &control.pool_id);
	if (!pool || !pool->above_mark)
		return;
	control.urgent_priority = slot->priority;
	if (!control.denying)
		control.allowed_bytes = 0;
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

/* The slot of a protected session by its cgroup id, or NULL. */
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

/* The slot of the protected session that a task belongs to, or NULL. */
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

/**
 * begin_stall - note that a task waits for memory
 * @task: the current task
 *
 * The kernel leaves out a program that another task has interrupted on the same CPU, so the
 * beginning or the end of a stall may never be seen. A stall that seems to last for STALL_MAX_NS is
 * therefore taken to be over.
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

/**
 * end_stall - add a stall that ends to its session's time
 * @task: the current task
 *
 * The time counts as in PSI: some task of the session stalls. So it is added when the last one
 * ends.
 */
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

/*
 * React to sessions that stall right now. A stall that does not end calls no program, but a task
 * that asks for more memory does.
 */
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
 * Whether the current request for memory must not be denied. fork() asks for the whole copy of the
 * parent, which costs nothing until it is written to. An exec that is refused halfway, and a stack
 * that cannot grow (in a page fault, outside of any system call), would end the process instead of
 * giving it an error.
 */
static __always_inline bool must_not_fail(struct task_struct *task)
{
	long number = syscall_number((void *)bpf_task_pt_regs(task));

	return number < 0 || number == NR_CLONE || number == NR_FORK || number == NR_VFORK ||
	       number == NR_CLONE3 || number == NR_EXECVE || number == NR_EXECVEAT;
}

/*
 * How long the daemon's loop has not run, in ns; 0 where it does not say. Its clock may be ahead of
 * what was read here.
 */
static __always_inline u64 silence(u64 now)
{
	u64 beat = control.heartbeat_ns;

	return beat && now > beat ? now - beat : 0;
}

/**
 * is_alone - whether the daemon has been silent for too long, while the pool is short
 * @silent: for how long, in ns
 *
 * A daemon that was killed, stopped or overrun can pause nobody. The program then denies growth to
 * the calls that would rather be refused than wait. The others are held by their memory.high, which
 * is as far as the daemon let them grow. A daemon that does not come back holds nobody for ever.
 */
static __always_inline bool is_alone(u64 silent)
{
	u64 beat = control.heartbeat_ns, before = control.alone_beat_ns;

	if (!control.pool_above || !control.alone_after_ns || silent < control.alone_after_ns ||
	    silent >= control.alone_until_ns)
		return false;
	if (before != beat &&
	    __sync_val_compare_and_swap(&control.alone_beat_ns, before, beat) == before) {
		if (!control.denying)
			control.allowed_bytes = 0;
		__sync_fetch_and_add(&control.alone_count, 1);
		__sync_fetch_and_add(&control.urgent_count, 1);
	}
	return true;
}

/**
 * tell_denied - count a denied request, and send an event for the first one of a denial
 * @state: what has been seen of the call
 * @id: the call's id
 * @usage: its usage in bytes
 * @mark: the mark in bytes
 * @request: the request in bytes
 * @round: number of the denial; odd: an urgent one
 */
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

/* No more than a loader maps for one library's data. */
#define TINY_REQUEST_BYTES (128 << 10)

/*
 * Runs before the kernel promises memory: in mmap, brk, mremap, mprotect, and for stacks. It does
 * not run for MAP_NORESERVE, nor when promised memory is touched. The -ENOMEM that it returns
 * reaches the program as an error that programs know.
 */
SEC("fmod_ret/security_vm_enough_memory_mm")
int BPF_PROG(on_enough_memory, struct mm_struct *mm, long pages, int ret)
{
	struct task_struct *task;
	struct mem_cgroup *memcg;
	struct memory_limits *limit;
	struct memory_state *state;
	u64 id, usage, request, now, silent, mark;
	bool urgent = false, over = false;
	u32 round;

	/* The usual case: nothing is denied, no session is protected, and the pool is not short. */
	if (ret || pages <= 0 ||
	    (!control.denying && !control.protected_count && !control.pool_above))
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
	now = bpf_ktime_get_ns();
	silent = silence(now);
	if (control.protected_count) {
		check_stalling(now);
		urgent = now < control.urgent_until_ns && limit->priority < control.urgent_priority;
	}
	/* The unwilling would abort: most programs do when memory is refused. */
	urgent = limit->willing && (urgent || is_alone(silent));
	if (limit->deny_mode == DENY_OVER_MARK &&
	    (!control.alone_until_ns || silent < control.alone_until_ns))
		over = usage + request > mark;
	if ((!urgent && !over) || must_not_fail(task))
		return 0;
	round = over ? limit->deny_round << 1 : (u32)control.urgent_count << 1 | 1;
	if (state->allowed_round != round) {
		state->allowed_round = round;
		state->allowed_bytes = 0;
	}
	/*
	 * A promise may be used much later, so it is the sum of promises that is limited: of all
	 * calls together, and beyond that of the tiny ones of each, which a program needs to
	 * start, and to say what happened.
	 */
	if (request <= ABI_SMALL_REQUEST_BYTES) {
		if (request <= TINY_REQUEST_BYTES &&
		    state->allowed_bytes + request <= ABI_SMALL_REQUEST_BYTES) {
			__sync_fetch_and_add(&state->allowed_bytes, request);
			return 0;
		}
		if (control.allowed_bytes + request <= control.allowance_bytes) {
			__sync_fetch_and_add(&control.allowed_bytes, request);
			return 0;
		}
	}
	tell_denied(state, id, usage, mark, request, round);
	return -ENOMEM;
}
