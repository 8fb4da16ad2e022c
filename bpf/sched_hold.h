/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where a task of a paused cgroup is stopped: on its way back to user space, where it holds no lock
 * of the kernel's. If it were stopped elsewhere, everyone who wants the same lock would wait for as
 * long as its pause lasts.
 *
 * A tick that finds the task in user space ends its slice, and the kernel switches before the next
 * instruction of the program. For one that is in the kernel, a callback is asked for (task work)
 * that runs on the way back. Until then the task is not paused: it waits in a lane and gets its
 * share. What it uses is charged, so the cgroup's pause becomes longer.
 */
#ifndef AGENTCG_SCHED_HOLD_H
#define AGENTCG_SCHED_HOLD_H

#include "sched_task.h"

#define EBUSY	       16
#define PF_USER_WORKER 0x00004000 /* include/linux/sched.h */
#define PF_KTHREAD     0x00200000
#define DEQUEUE_SLEEP  1 /* kernel/sched/sched.h */

struct asked {
	struct bpf_task_work work;
};

/* The callbacks that were asked for, by the task's number. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, int);
	__type(value, struct asked);
} asked SEC(".maps");

extern struct pt_regs *__irq_regs __ksym;

/* Whether the interrupt that is being handled has interrupted a program, and not the kernel. */
static __always_inline bool from_user_space(void)
{
	struct pt_regs **regs = bpf_this_cpu_ptr(&__irq_regs);

	return regs && *regs && is_user_mode(*regs);
}

/* Note that a task is not, or no longer, stopped on its way back to user space. */
static __always_inline void went_on(struct task *task)
{
	if (task->stop == STOP_HERE)
		task->stop = STOP_NONE;
}

/* Whether a program is held at its exec, or will be when it is on its way to user space. */
static __always_inline bool is_at_exec(struct task *task, u64 now)
{
	return task->held_until_ns && before(now, task->held_until_ns);
}

/* Called when a task is about to go back to user space. Returns 0. */
static int at_boundary(struct bpf_map *map, void *key, void *value)
{
	struct task_struct *p = bpf_get_current_task_btf();
	struct task *task = task_of(p);
	u64 now = bpf_ktime_get_ns();

	/* So that nothing is left of tasks that have ended, and that it can be asked again. */
	bpf_map_delete_elem(&asked, key);
	if (!task)
		return 0;
	task->stop = STOP_NONE;
	if (fields(p)->flags & PF_EXITING ||
	    !(is_at_exec(task, now) || is_held(within(task->slot), now)))
		return 0;
	task->stop = STOP_HERE;
	/*
	 * The interrupt of the kick arrives inside of scx_bpf_kick_cpu(), which is an RCU reader:
	 * if the task was switched out there, it would have to go on (see is_critical).
	 */
	preempt_off();
	scx_bpf_kick_cpu(bpf_get_smp_processor_id(), KICK_PREEMPT);
	preempt_on();
	return 0;
}

/* Have a task say when it is on its way back to user space. Returns whether it will. */
static __always_inline bool ask(struct task_struct *p, struct task *task)
{
	struct asked none = {}, *value;
	int key = p->pid;
	s32 error = -1;

	value = bpf_map_lookup_elem(&asked, &key);
	if (!value) {
		bpf_map_update_elem(&asked, &key, &none, BPF_NOEXIST);
		value = bpf_map_lookup_elem(&asked, &key);
	}
	p = bpf_task_acquire(p);
	if (!p)
		return false;
	if (value)
		error = bpf_task_work_schedule_resume(p, &value->work, &asked, at_boundary);
	bpf_task_release(p);
	if (error && error != -EBUSY) {
		__sync_fetch_and_add(&control.not_asked, 1);
		return false;
	}
	task->stop = STOP_ASKED;
	return true;
}

/**
 * may_stop - whether a task that is to be stopped may be, where it is
 * @p: the task
 * @task: what is known of it
 *
 * If it may not, it is asked to say when it is on its way back to user space. One that ends goes on
 * to its end. A thread that works for a program inside of the kernel (of io_uring, or a kernel
 * thread) does not go there, and is stopped where it is.
 *
 * Return: whether it may; true as well if there is no memory to ask.
 */
static __always_inline bool may_stop(struct task_struct *p, struct task *task)
{
	u32 flags = fields(p)->flags;

	if (task->stop == STOP_HERE || flags & (PF_KTHREAD | PF_USER_WORKER))
		return true;
	if (flags & PF_EXITING) {
		task->stop = STOP_ASKED;
		return false;
	}
	return !ask(p, task);
}

/* Whether a task that runs has to give up its CPU, to be stopped or to wait for its turn to be. */
static __always_inline bool is_stopped(struct task *task, u64 now)
{
	return is_held(within(task->slot), now) ||
	       (task->stop == STOP_HERE && is_at_exec(task, now));
}

/*
 * Stop the task that runs and is to be stopped, at the first place where it may be; `user`: a tick
 * has found it in user space.
 */
static __always_inline void stop_running(struct task_struct *p, struct task *task, bool user)
{
	if (user)
		task->stop = STOP_HERE;
	else if (!may_stop(p, task))
		return;
	scx_bpf_task_set_slice(p, 0);
}

#endif
