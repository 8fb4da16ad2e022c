/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by all programs: constants that the loader sets, the identity of a task in the daemon's
 * terms (its pid, its cgroup), and differences between kernels and architectures.
 */
#ifndef AGENTCG_COMPAT_H
#define AGENTCG_COMPAT_H

/* The kernel's types before the uapi header: libbpf's helpers name both. */
#include "kernel.h"

#include <linux/bpf.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "abi.h"

/* The loader reads this first, and refuses an object that was made from another abi.h. */
const volatile __u32 abi_version = ABI_VERSION;

const volatile __u32 page_bytes = 4096; /* set before the load */

/* Inode of the daemon's pid namespace, set before the load. */
const volatile __u32 daemon_pid_ns;

/*
 * While a program is interrupted, the kernel leaves it out for other tasks on the same CPU (the
 * guard against recursion, bpf_prog->active). A program that must see every event therefore turns
 * preemption off. Tracepoints did that themselves before Linux 7. The kfuncs came in 6.10; before,
 * these two functions do nothing.
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
 * visible_pid - the thread group id of a task in the daemon's pid namespace
 * @task: any thread of the group
 *
 * Return: the id; 0 for a task that is not visible in that namespace.
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

/* The cgroup v2 of a task. */
static __always_inline struct cgroup *task_cgroup(struct task_struct *task)
{
	return task->cgroups->dfl_cgrp;
}

/* The id of a cgroup: the inode number of its directory. */
static __always_inline u64 cgroup_id(struct cgroup *cgroup)
{
	return cgroup->kn->id;
}

/*
 * Whether a task is our launcher. It declares its call itself, so its exec need not wake the
 * daemon, unless that is the declaration.
 */
static __always_inline bool is_launcher(struct task_struct *task)
{
	char comm[ABI_COMM_BYTES] = {};

	BPF_CORE_READ_INTO(&comm, task, comm);
	return !bpf_strncmp(comm, sizeof("agentcg-exec"), "agentcg-exec") ||
	       !bpf_strncmp(comm, sizeof("agentcg"), "agentcg");
}

/**
 * nearest - the entry of a cgroup, or of the nearest one above it, in a map by cgroup id
 * @map: the map
 * @cgroup: where to begin; at most ABI_DEPTH_MAX levels above it are looked up, without the root
 * @own: set to the id of @cgroup
 * @id: set to the id of the cgroup that has the entry
 *
 * Return: the entry; NULL: there is none, and @id is of no use.
 */
static __always_inline void *nearest(void *map, struct cgroup *cgroup, u64 *own, u64 *id)
{
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;
	void *entry;

	*own = *id = cgroup_id(cgroup);
	entry = bpf_map_lookup_elem(map, id);
	for (int i = 1; !entry && i <= ABI_DEPTH_MAX && i < level; i++) {
		css = css->parent;
		*id = cgroup_id(css->cgroup);
		entry = bpf_map_lookup_elem(map, id);
	}
	return entry;
}

/*
 * syscall_number() is the system call that a task is in, from the registers with which it entered
 * the kernel; negative: it is in none.
 */
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

/* Whether registers were saved while a program ran, and not the kernel. */
static __always_inline bool is_user_mode(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, cs) & 3;
}
#elif defined(__TARGET_ARCH_arm64)
#define NR_CLONE    220
#define NR_FORK	    -2 /* no such system call here */
#define NR_VFORK    -2
#define NR_EXECVE   221
#define NR_EXECVEAT 281
#define NR_CLONE3   435
static __always_inline long syscall_number(struct pt_regs *regs)
{
	return BPF_CORE_READ(regs, syscallno);
}

/* Whether registers were saved while a program ran, and not the kernel. */
static __always_inline bool is_user_mode(struct pt_regs *regs)
{
	return !(BPF_CORE_READ(regs, pstate) & 0xf);
}
#else
#error "the numbers of fork's system calls on this architecture"
#endif

#endif
