// SPDX-License-Identifier: GPL-2.0
/*
 * Events of processes below managed cgroups: fork, exec, exit, the OOM killer's choice, and leaving
 * a call. Other processes cause no event. All programs are at BTF tracepoints, so the object also
 * loads on kernels that refuse trampolines.
 *
 * All events go through one ring buffer, so the daemon reads them in the order in which they were
 * reserved: a process's fork before its exec, its exec before its exit. An event that finds no room
 * is counted by type. When the daemon sees such a count rise, it looks at the cgroups themselves.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define SIGNAL_GROUP_EXIT 0x4  /* include/linux/sched/signal.h */
#define PF_FORKNOEXEC	  0x40 /* include/linux/sched.h */
#define IGNORED		  1    /* SIG_IGN, include/uapi/asm-generic/signal-defs.h */
#define TTY_STOP	  20   /* SIGTSTP, the same on all machines that bpf/ is for */

/* How long a shell may read its startup files, and how many of its forks may be above a program. */
#define STARTUP_NS    10000000000ULL
#define STARTUP_DEPTH 4

ID_MAP(managed, struct managed);

/* The call that a process is in. The kernel tells of a move when the process has its new place. */
TASK_MAP(call_of, u64);

RING_BUFFER(events, 8 << 20);

struct lifecycle_counters counters = {};

/**
 * find_managed - the managed cgroup that a task is in
 * @task: the task
 * @own: set to the id of the task's own cgroup
 * @id: set to the id of the managed cgroup, which may be above that one: containers make cgroups of
 *      their own
 *
 * Return: the managed cgroup's entry, or NULL.
 */
static __always_inline struct managed *find_managed(struct task_struct *task, u64 *own, u64 *id)
{
	return nearest(&managed, task_cgroup(task), own, id);
}

/**
 * reserve - make room for an event in the ring buffer, and fill in its head
 * @type: enum event_type
 * @size_bytes: size of the whole event
 * @id: the managed cgroup
 *
 * Return: the event, to be given to submit(); NULL if there is no room, which is counted.
 */
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

/**
 * submit - send an event to the daemon
 * @event: from reserve()
 * @wake: whether the daemon is to read it now
 *
 * The daemon is woken for an exec in an agent leaf, because it has to move that process at once,
 * and for an OOM victim. It reads the other events together with the next exec, and learns the end
 * of a call from the call's cgroup. When an eighth of the buffer is full, it is woken for any
 * event.
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

/**
 * stored_call - the call that a task was last known to be in
 * @task: the first thread of a process; of others nothing is known
 *
 * Return: the id of the call's cgroup; 0: none.
 */
static __always_inline u64 stored_call(struct task_struct *task)
{
	u64 *call = bpf_task_storage_get(&call_of, task, NULL, 0);

	return call ? *call : 0;
}

static __always_inline void note_call(struct task_struct *task, u64 id)
{
	u64 *call = bpf_task_storage_get(&call_of, task, NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (call)
		*call = id;
	else
		__sync_fetch_and_add(&counters.lost[EVENT_LEFT], 1);
}

/* Whether a cgroup is the one with this id, or below it. */
static __always_inline bool is_inside(struct cgroup *cgroup, u64 id)
{
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;

	for (int i = 0; i < ABI_LEVELS_MAX && i < level; i++) {
		if (cgroup_id(css->cgroup) == id)
			return true;
		css = css->parent;
	}
	return false;
}

/* Whether another process that left a call is told: not too many, lest they fill the buffer. */
static __always_inline bool may_tell(struct managed *call)
{
	__u16 second = bpf_ktime_get_ns() >> 30;

	if (call->left_second != second) {
		call->left_second = second;
		call->left = 0;
	}
	if (call->left >= ABI_LEFT_MOST)
		return false;
	call->left++;
	return true;
}

/**
 * tell_left - tell that a process of a call is elsewhere
 * @id: the call
 * @task: any thread of the process
 * @mover: who did it
 * @to: where it is
 * @path: the path of that; NULL: the process was made there
 */
static __always_inline void tell_left(u64 id, struct task_struct *task, struct task_struct *mover,
				      struct cgroup *to, const char *path)
{
	struct managed *call = bpf_map_lookup_elem(&managed, &id);
	struct left_event *event;

	if (!call || !may_tell(call))
		return;
	event = reserve(EVENT_LEFT, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->process, task);
	describe(&event->mover, mover);
	event->to_cgroup_id = cgroup_id(to);
	event->more = call->left >= ABI_LEFT_MOST;
	event->made = !path;
	event->path[0] = 0;
	if (path && bpf_probe_read_kernel_str(event->path, sizeof(event->path), path) < 0)
		event->path[0] = 0;
	submit(event, true);
}

/*
 * Keep which call a new process is in, or tell that it was made outside of its parent's. What is
 * kept of the parent counts where cgroups that the tool made are too deep for find_managed().
 */
static __always_inline void tell_place(struct task_struct *parent, struct task_struct *child,
				       u64 found)
{
	struct cgroup *to = task_cgroup(child);
	struct managed *around;
	u64 own, id, from = 0;

	if (found && task_cgroup(parent) == to) {
		note_call(child, found);
		return;
	}
	if (parent->pid == parent->tgid) {
		from = stored_call(parent);
	} else {
		around = find_managed(parent, &own, &id);
		if (around && around->kind == KIND_CALL)
			from = id;
	}
	if (from && is_inside(to, from)) {
		note_call(child, found ? found : from);
		return;
	}
	if (found)
		note_call(child, found);
	if (from)
		tell_left(from, child, parent, to, NULL);
}

static __always_inline void tell_fork(struct task_struct *parent, struct task_struct *child)
{
	struct fork_event *event;
	struct managed *entry;
	u64 own, id;

	if (child->pid != child->tgid)
		return;
	entry = find_managed(child, &own, &id);
	tell_place(parent, child, entry && entry->kind == KIND_CALL ? id : 0);
	/* A child of a process in a call is in that call already. */
	if (!entry || entry->kind == KIND_CALL)
		return;
	event = reserve(EVENT_FORK, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->child, child);
	/* The process that called fork(), even if CLONE_PARENT made another one the parent. */
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

/*
 * Whether our launcher executes itself to declare a call, because it may use no socket
 * (agent_sdk/exec/sealed.h). So a process in a call may declare one, inside that.
 */
static __always_inline bool declares(struct task_struct *task)
{
	static const char head[] = "agentcg-exec\0--sealed=";
	char found[sizeof(head)] = {};

	if (bpf_probe_read_user(found, sizeof(head) - 1, (void *)task->mm->arg_start))
		return false;
	for (u32 i = 0; i < sizeof(head) - 1; i++)
		if (found[i] != head[i])
			return false;
	return true;
}

static __always_inline bool ignores_stop(struct task_struct *task)
{
	return (u64)BPF_CORE_READ(task, sighand, action[TTY_STOP - 1].sa.sa_handler) == IGNORED;
}

/*
 * Whether a shell with a terminal executes a program because its startup files say so. Such a shell
 * ignores the stop of the terminal itself. It has job control only after these files (bash,
 * run_startup_files() in shell.c): until then what it starts stays in its process group, later only
 * what it takes the output of does, and that ignores the stop. So does nothing after `set +m`,
 * which is why the time counts as well.
 */
static __always_inline bool is_at_startup(struct task_struct *task)
{
	struct pid *group = BPF_CORE_READ(task, signal, pids[PIDTYPE_PGID]);
	struct task_struct *shell = task;

	if (!BPF_CORE_READ(task, signal, tty) || ignores_stop(task))
		return false;
	for (int i = 0; i < STARTUP_DEPTH; i++) {
		shell = BPF_CORE_READ(shell, real_parent);
		if (BPF_CORE_READ(shell, signal, pids[PIDTYPE_PGID]) != group)
			return false;
		if (ignores_stop(shell))
			return task->start_boottime - BPF_CORE_READ(shell, start_boottime) <
			       STARTUP_NS;
	}
	return false;
}

static __always_inline void tell_exec(struct task_struct *task)
{
	unsigned long start, length;
	bool launcher, declared;
	struct exec_event *event;
	struct managed *entry;
	u64 own, id;

	entry = find_managed(task, &own, &id);
	if (!entry)
		return;
	launcher = is_launcher(task);
	declared = launcher && declares(task);
	if (entry->kind == KIND_CALL && !declared)
		return;
	event = reserve(EVENT_EXEC, sizeof(*event), id);
	if (!event)
		return;
	describe(&event->process, task);
	event->own_cgroup_id = own;
	event->at_startup = is_at_startup(task);
	event->reserved = 0;
	start = task->mm->arg_start;
	length = task->mm->arg_end - start;
	event->argv_cut = length > ABI_ARGV_BYTES;
	if (length > ABI_ARGV_BYTES)
		length = ABI_ARGV_BYTES;
	/*
	 * This exec has just written the page, so it is in memory. Should it not be, the daemon
	 * reads the arguments in /proc.
	 */
	if (bpf_probe_read_user(event->argv, length, (void *)start))
		length = 0;
	event->argv_bytes = length;
	submit(event, !launcher || declared);
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

	/* The process ends with its last thread; do_exit() has lowered the count before. */
	if (signal->live.counter || !find_managed(task, &own, &id))
		return;
	event = reserve(EVENT_EXIT, sizeof(*event), id);
	if (!event)
		return;
	/* The process has the name of its first thread, not that of the one that ends last. */
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

static __always_inline void tell_move(struct cgroup *to, const char *path, struct task_struct *task)
{
	struct managed *entry;
	u64 own, id, from, now;

	/* One of the hierarchies of cgroup v1, or a zombie, which stays where it is. */
	if (to->root != task_cgroup(task)->root || !task->signal->live.counter)
		return;
	/* Not the task's cgroup: a first thread that has ended stays, while the others move. */
	entry = nearest(&managed, to, &own, &id);
	now = entry && entry->kind == KIND_CALL ? id : 0;
	from = stored_call(task);
	if (now == from)
		return;
	if (from && is_inside(to, from)) {
		if (now)
			note_call(task, now);
		return;
	}
	note_call(task, now);
	if (from)
		tell_left(from, task, bpf_get_current_task_btf(), to, path);
}

SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(on_move, struct cgroup *to, const char *path, struct task_struct *task, bool threads)
{
	preempt_off();
	tell_move(to, path, task);
	preempt_on();
	return 0;
}
