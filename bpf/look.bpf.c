// SPDX-License-Identifier: GPL-2.0
/*
 * What all calls hold, in one system call: the daemon runs `look`, and reads mapped memory.
 *
 * The daemon gives each call a slot. A look walks the cgroups below a root, fills the slots, and
 * lists those whose usage has moved since they were listed last, so that the daemon has nothing to
 * do for a call that does nothing. Usage is the kernel's own page counter of the memory cgroup, as
 * memory.current shows it.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

/* In syscall programs since "bpf: Allow invoking kfuncs from BPF_PROG_TYPE_SYSCALL progs" (6.10).
 */
extern struct cgroup *bpf_cgroup_from_id(u64 id) __ksym;
extern void bpf_cgroup_release(struct cgroup *cgroup) __ksym;
extern void bpf_rcu_read_lock(void) __ksym;
extern void bpf_rcu_read_unlock(void) __ksym;
/* Since "bpf: Introduce css open-coded iterator kfuncs" (6.7). */
extern int bpf_iter_css_new(struct bpf_iter_css *iter, struct cgroup_subsys_state *start,
			    unsigned int flags) __ksym;
extern struct cgroup_subsys_state *bpf_iter_css_next(struct bpf_iter_css *iter) __ksym;
extern void bpf_iter_css_destroy(struct bpf_iter_css *iter) __ksym;

HASH_MAP(places, ABI_LOOK_CALLS, u64, struct look_place);

struct look_call calls[ABI_LOOK_CALLS] = {};
struct look_control control = {};

/* The memory cgroup of a cgroup; NULL without a memory controller. */
static __always_inline struct mem_cgroup *memcg_of(struct cgroup *cgroup)
{
	u32 id = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	u32 offset = bpf_core_field_offset(struct cgroup, subsys);
	struct cgroup_subsys_state *css =
		*(struct cgroup_subsys_state **)((void *)cgroup + offset + id * 8);

	return css ? (void *)css - bpf_core_field_offset(struct mem_cgroup, css) : NULL;
}

/**
 * look_at - fill the slot of one call, and list it if it has moved
 * @cgroup: its cgroup
 * @slot: its number
 */
static __always_inline void look_at(struct cgroup *cgroup, u32 slot)
{
	struct look_call *call = &calls[slot];
	struct mem_cgroup *memcg = memcg_of(cgroup);
	u64 usage, moved;

	call->round = control.round;
	if (!memcg)
		return;
	usage = BPF_CORE_READ(memcg, memory.usage.counter) * page_bytes;
	call->before_bytes = call->usage_bytes;
	call->usage_bytes = usage;
	moved = usage > call->told_bytes ? usage - call->told_bytes : call->told_bytes - usage;
	if (moved < control.step_bytes)
		return;
	call->told_bytes = usage;
	control.list[control.listed++ & (ABI_LOOK_CALLS - 1)] = slot;
}

/* Returns 1 where there is no such root, else 0. */
SEC("syscall")
int look(void *context)
{
	struct cgroup *root = bpf_cgroup_from_id(control.root_id);
	struct cgroup_subsys_state *css;
	struct bpf_iter_css iter;
	struct look_place *place;
	u64 id;

	if (!root)
		return 1;
	control.round++;
	control.listed = 0;
	bpf_rcu_read_lock();
	bpf_iter_css_new(&iter, &root->self, BPF_CGROUP_ITER_DESCENDANTS_PRE);
	while ((css = bpf_iter_css_next(&iter))) {
		id = cgroup_id(css->cgroup);
		place = bpf_map_lookup_elem(&places, &id);
		if (place)
			look_at(css->cgroup, place->slot & (ABI_LOOK_CALLS - 1));
	}
	bpf_iter_css_destroy(&iter);
	bpf_rcu_read_unlock();
	bpf_cgroup_release(root);
	return 0;
}
