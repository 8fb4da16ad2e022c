// SPDX-License-Identifier: GPL-2.0
/*
 * Which processes come and go below managed cgroups. Only BTF tracepoints, so that it loads on
 * kernels that refuse trampolines. Nothing is sent for processes elsewhere.
 *
 * All events go through one ring buffer, so the daemon sees them in the order in which they were
 * reserved: a process's fork before its exec, its exec before its exit. An event that finds no room
 * is counted by type; the daemon compares the counts and looks at the cgroups itself.
 */
#include "compat.h"

char LICENSE[] SEC("license") = "GPL";

#define SIGNAL_GROUP_EXIT 0x4  /* include/linux/sched/signal.h */
#define PF_FORKNOEXEC	  0x40 /* include/linux/sched.h */

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct managed);
} managed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} events SEC(".maps");

struct lifecycle_counters counters = {};

/**
 * find_managed - the managed cgroup that a task is in
 * @task: the task
 * @own: set to the id of its own cgroup
 * @id: set to the id of the managed one, which may be further up: a container makes cgroups of its
 *      own
 *
 * Return: its entry, or NULL.
 */
static __always_inline struct managed *find_managed(struct task_struct *task, u64 *own, u64 *id)
{
	struct cgroup *cgroup = task_cgroup(task);
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;
	struct managed *entry;

	*own = *id = cgroup_id(cgroup);
	entry = bpf_map_lookup_elem(&managed, id);
	for (int i = 1; !entry && i <= ABI_DEPTH_MAX && i < level; i++) {
		css = css->parent;
		*id = cgroup_id(css->cgroup);
		entry = bpf_map_lookup_elem(&managed, id);
	}
	return entry;
}

/* Room for an event with its head filled in; NULL, and counted, if there is none. */
static __always_inline void *reserve(u32 type, u32 size_bytes, u64 id)
{
	struct event *event = bpf_ringbuf_reserve(&events, size_bytes, 0);

	if (!event) {
		__sync_fetch_and_add(&counters.lost[type], 1);
		return NULL;
	}
	__sync_fetch_and_add(&counters.sent[type], 1);
	event->type = type;
	event->size_bytes = size_bytes;
	event->at_ns = bpf_ktime_get_ns();
	event->cgroup_id = id;
	return event;
}

/*
 * Only an exec in an agent leaf wakes the daemon: it is to be moved at once. What goes with it is
 * read with it, and the end of a call is told by its cgroup; so nothing else is worth the wake-up,
 * unless the buffer is filling.
 */
static __always_inline void submit(void *event, bool wake)
{
	/* Forced: the kernel wakes nobody for a record that comes after an unread one. */
	u64 flags = wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP;

	if (!wake && bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) >
			     bpf_ringbuf_query(&events, BPF_RB_RING_SIZE) / 8)
		flags = BPF_RB_FORCE_WAKEUP;
	bpf_ringbuf_submit(event, flags);
}

static __always_inline void describe(struct process *process, struct task_struct *task)
{
	process->pid = visible_pid(task);
	process->parent_pid = visible_pid(task->real_parent);
	process->start_ns = task->group_leader->start_boottime;
	BPF_CORE_READ_INTO(&process->comm, task, comm);
}

static __always_inline void tell_fork(struct task_struct *parent, struct task_struct *child)
{
	struct fork_event *event;
	struct managed *entry;
	u64 own, id;

	if (child->pid != child->tgid)
		return;
	/* What a call forks is in it already. */
	entry = find_managed(child, &own, &id);
	if (!entry || entry->kind == KIND_CALL)
		return;
	event = reserve(EVENT_FORK, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->child, child);
	/* Who forked it, also where CLONE_PARENT gave it another parent. */
	event->child.parent_pid = visible_pid(parent);
	event->parent_start_ns = parent->group_leader->start_boottime;
	submit(event, false);
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child)
{
	preempt_off();
	tell_fork(parent, child);
	preempt_on();
	return 0;
}

/* Ours asks for its call itself, and is not to wait for the daemon to have looked at it. */
static __always_inline bool is_launcher(struct task_struct *task)
{
	char comm[ABI_COMM_BYTES] = {};

	BPF_CORE_READ_INTO(&comm, task, comm);
	return !bpf_strncmp(comm, sizeof("agentcg-exec"), "agentcg-exec");
}

static __always_inline void tell_exec(struct task_struct *task)
{
	unsigned long start, length;
	struct exec_event *event;
	struct managed *entry;
	u64 own, id;

	entry = find_managed(task, &own, &id);
	if (!entry || entry->kind == KIND_CALL)
		return;
	event = reserve(EVENT_EXEC, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->process, task);
	event->own_cgroup_id = own;
	start = task->mm->arg_start;
	length = task->mm->arg_end - start;
	event->argv_cut = length > ABI_ARGV_BYTES;
	if (length > ABI_ARGV_BYTES)
		length = ABI_ARGV_BYTES;
	/* The page was written by this exec, so it is there; if not, the daemon asks /proc. */
	if (bpf_probe_read_user(event->argv, length, (void *)start))
		length = 0;
	event->argv_bytes = length;
	submit(event, !is_launcher(task));
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	preempt_off();
	tell_exec(task);
	preempt_on();
	return 0;
}

static __always_inline void tell_exit(struct task_struct *task)
{
	struct task_struct *leader = task->group_leader;
	struct signal_struct *signal = task->signal;
	struct exit_event *event;
	u64 own, id;

	/* Only the last thread ends the process; do_exit() has counted it down before. */
	if (signal->live.counter || !find_managed(task, &own, &id))
		return;
	event = reserve(EVENT_EXIT, sizeof(*event), id);
	if (!event)
		return;
	/* By the name of its first thread, not of the one that ends last. */
	describe(&event->process, leader);
	event->user_ns = signal->utime + task->utime;
	event->system_ns = signal->stime + task->stime;
	if (leader != task) {
		event->user_ns += leader->utime;
		event->system_ns += leader->stime;
	}
	event->rss_peak_bytes = signal->maxrss * page_bytes;
	/* As wait_task_zombie() in kernel/exit.c. */
	event->wait_status =
		signal->flags & SIGNAL_GROUP_EXIT ? signal->group_exit_code : leader->exit_code;
	event->executed = !(leader->flags & PF_FORKNOEXEC);
	submit(event, false);
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_exit, struct task_struct *task)
{
	preempt_off();
	tell_exit(task);
	preempt_on();
	return 0;
}

static __always_inline void tell_oom_victim(struct task_struct *task)
{
	struct oom_event *event;
	u64 own, id;

	if (!find_managed(task, &own, &id))
		return;
	event = reserve(EVENT_OOM_VICTIM, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->process, task);
	submit(event, true);
}

SEC("tp_btf/mark_victim")
int BPF_PROG(on_oom_victim, struct task_struct *task)
{
	preempt_off();
	tell_oom_victim(task);
	preempt_on();
	return 0;
}
