/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The part of the kernel's types that the programs read. Names and members are the kernel's; the
 * places of the members are found at load time (CO-RE). tests/kernel/test_bpf_types.py looks up
 * each of them in the running kernel's BTF. A name with three underscores is a flavor: it stands
 * for the kernel's type with the name before them, in the form that some kernels have.
 */
#ifndef AGENTCG_KERNEL_H
#define AGENTCG_KERNEL_H

#include <linux/types.h>
#include <stdbool.h>

typedef __u8 u8;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;
typedef __s32 s32;

#ifndef __ksym
#define __ksym __attribute__((section(".ksyms")))
#endif

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	s64 counter;
} atomic64_t;

typedef atomic64_t atomic_long_t;

struct ns_common {
	unsigned int inum;
};

struct pid_namespace {
	struct ns_common ns;
};

struct upid {
	int nr;
	struct pid_namespace *ns;
};

struct pid {
	unsigned int level;
	struct upid numbers[0];
};

struct kernfs_node {
	u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root;

struct cgroup {
	struct cgroup_subsys_state self;
	int level;
	struct kernfs_node *kn;
	struct cgroup_subsys_state *subsys[1];
	struct cgroup_root *root;
};

enum cgroup_subsys_id {
	memory_cgrp_id = 1,
};

struct css_set {
	struct cgroup_subsys_state *subsys[1];
	struct cgroup *dfl_cgrp;
};

struct tty_struct;

enum pid_type {
	PIDTYPE_PGID = 2,
};

struct signal_struct {
	atomic_t live;
	struct pid *pids[4];
	struct tty_struct *tty;
	unsigned int flags;
	int group_exit_code;
	u64 utime;
	u64 stime;
	unsigned long maxrss;
};

struct sigaction {
	void *sa_handler;
};

struct k_sigaction {
	struct sigaction sa;
};

struct sighand_struct {
	struct k_sigaction action[64];
};

struct mm_struct {
	unsigned long arg_start;
	unsigned long arg_end;
};

struct task_struct {
	unsigned int flags;
	int exit_code;
	int pid;
	int tgid;
	u64 start_boottime;
	u64 utime;
	u64 stime;
	unsigned long min_flt;
	unsigned long maj_flt;
	unsigned int memcg_nr_pages_over_high;
	struct mm_struct *mm;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	struct signal_struct *signal;
	struct sighand_struct *sighand;
	struct css_set *cgroups;
	char comm[16];
};

struct linux_binprm;

struct page_counter {
	atomic_long_t usage;
	unsigned long low;
	unsigned long min;
	unsigned long high;
	unsigned long max;
	struct page_counter *parent;
};

struct mem_cgroup {
	struct cgroup_subsys_state css;
	struct page_counter memory;
};

struct bpf_iter_css {
	u64 __opaque[3];
};

enum memcg_memory_event {
	MEMCG_HIGH = 1,
};

#ifdef __TARGET_ARCH_x86
struct pt_regs {
	unsigned long r8;
	unsigned long ax;
	unsigned long cx;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
	unsigned long ip;
	__u16 cs;
	unsigned long sp;
};
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs {
	u64 regs[31];
	u64 sp;
	u64 pc;
	u64 pstate;
	s32 syscallno;
};
#endif

#pragma clang attribute pop

#endif
