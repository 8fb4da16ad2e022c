/* SPDX-License-Identifier: GPL-2.0 */
/* What the programs share: finding out who a task is, in the daemon's terms. */
#ifndef AGENTCG_COMPAT_H
#define AGENTCG_COMPAT_H

/* The kernel's types before the uapi header: libbpf's helpers name both. */
#include "kernel.h"

#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "abi.h"

/* Read by the loader before anything else: an object made from another abi.h is refused. */
const volatile __u32 abi_version = ABI_VERSION;

const volatile __u32 page_bytes = 4096; /* set before the load */

/* Inode of the daemon's pid namespace, set before the load. */
const volatile __u32 daemon_pid_ns;

/*
 * A program that is interrupted by another task on its CPU is left out there (the kernel's guard
 * against recursion, bpf_prog->active), so one that must see everything is not to be interrupted.
 * Tracepoints no longer see to that themselves (Linux 7). The kfuncs came in 6.10.
 */
extern void bpf_preempt_disable(void) __ksym __weak;
extern void bpf_preempt_enable(void) __ksym __weak;

static __always_inline void preempt_off(void)
{
	if (bpf_ksym_exists(bpf_preempt_disable))
		bpf_preempt_disable();
}

static __always_inline void preempt_on(void)
{
	if (bpf_ksym_exists(bpf_preempt_disable))
		bpf_preempt_enable();
}

/**
 * visible_pid - a task's thread group id as the daemon sees it
 * @task: any thread of the group
 *
 * Return: the id, or 0 for a task outside the daemon's pid namespace.
 */
static __always_inline s32 visible_pid(struct task_struct *task)
{
	struct pid *pid = task->group_leader->thread_pid;
	u32 level, offset, size;

	if (pid->numbers[0].ns->ns.inum == daemon_pid_ns)
		return pid->numbers[0].nr;
	level = pid->level;
	offset = bpf_core_field_offset(struct pid, numbers);
	size = bpf_core_type_size(struct upid);
	for (u32 i = 1; i < ABI_DEPTH_MAX && i <= level; i++) {
		struct upid *upid = (void *)pid + offset + i * size;

		if (BPF_CORE_READ(upid, ns, ns.inum) == daemon_pid_ns)
			return BPF_CORE_READ(upid, nr);
	}
	return 0;
}

static __always_inline struct cgroup *task_cgroup(struct task_struct *task)
{
	return task->cgroups->dfl_cgrp;
}

static __always_inline u64 cgroup_id(struct cgroup *cgroup)
{
	return cgroup->kn->id;
}

/* The system call that a task is in, from the registers it entered the kernel with. */
#ifdef __TARGET_ARCH_x86
#define NR_CLONE    56
#define NR_FORK	    57
#define NR_VFORK    58
#define NR_EXECVE   59
#define NR_EXECVEAT 322
#define NR_CLONE3   435
static __always_inline long syscall_number(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, orig_ax);
}
#elif defined(__TARGET_ARCH_arm64)
#define NR_CLONE    220
#define NR_FORK	    -2 /* there is none */
#define NR_VFORK    -2
#define NR_EXECVE   221
#define NR_EXECVEAT 281
#define NR_CLONE3   435
static __always_inline long syscall_number(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, syscallno);
}
#else
#error "the numbers of fork's system calls on this architecture"
#endif

#endif
