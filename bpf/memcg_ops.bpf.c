// SPDX-License-Identifier: GPL-2.0
/*
 * Decisions which memory cgroups reclaim spares, and how long a charge waits: callbacks of
 * memcg_bpf_ops, a struct_ops that has been proposed for Linux but is in no release ("mm:
 * memcontrol: Add BPF struct_ops for memory controller", RFC v3 of 2026-01 to v7 of 2026-05).
 *
 * The decision about a memory cgroup is that about its session. The session is looked for from the
 * memory cgroup upwards, so calls, and cgroups that calls make below themselves, follow what the
 * daemon wrote for the session into `protections`. One object serves all versions of the proposal:
 * a callback that the kernel lacks is left out before the load (agentcgroupd/bpf/memcg_ops.py).
 *
 * The callbacks only wrap the decisions, so that decide_for() can make the same ones on any kernel.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define ENOENT 2
#define ENODEV 19

#define SHARE_SHIFT    20	    /* shares are in 2^-20, as in the kernel's own delay */
#define OVERAGE_MAX    (1ULL << 43) /* pages; a share of them still has room in 64 bits */
#define LARGEST_CHARGE 512	    /* pages at once: a huge page */
#define PERCENT	       100

/* Callbacks of all versions; libbpf finds those that the running kernel has by name. */
struct memcg_bpf_ops___v1 {
	void (*handle_cgroup_online)(struct mem_cgroup *memcg);
	void (*handle_cgroup_offline)(struct mem_cgroup *memcg);
	/* These two have had two more arguments since v7, which are not read here. */
	bool (*below_low)(struct mem_cgroup *memcg);
	bool (*below_min)(struct mem_cgroup *memcg);
	unsigned int (*get_high_delay_ms)(struct mem_cgroup *memcg); /* until v6 */
	unsigned int (*memcg_charged)(struct mem_cgroup *memcg, unsigned int nr_pages); /* v7 */
};

struct cgroup___subsys {
	struct cgroup_subsys_state *subsys[1];
} __attribute__((preserve_access_index));

struct cgroup *bpf_cgroup_from_id(u64 cgid) __ksym __weak;
void bpf_cgroup_release(struct cgroup *cgrp) __ksym __weak;

ID_MAP(protections, struct protection);

struct memcg_ops_counters counters = {};

/* Findings on the way from a memory cgroup up to its session. */
struct way {
	u64 session_id;
	u64 over_share; /* the most that a level is above its memory.high, in 2^-20 of that */
	bool at_limit;	/* a level has no room for one more charge below its own high or max */
};

/* The memory cgroup of a css of the memory controller; NULL of NULL. */
static __always_inline struct mem_cgroup *memcg_of(struct cgroup_subsys_state *css)
{
	return css ? (void *)css - bpf_core_field_offset(struct mem_cgroup, css) : NULL;
}

/* Add a level's usage and limits, in pages, to the findings. */
static __always_inline void look_at(struct mem_cgroup *memcg, struct way *way)
{
	s64 usage = BPF_CORE_READ(memcg, memory.usage.counter);
	u64 high = BPF_CORE_READ(memcg, memory.high);
	u64 max = BPF_CORE_READ(memcg, memory.max);
	u64 over, share;

	if (usage < 0) /* possible for a moment, while charges are taken back */
		usage = 0;
	if ((u64)usage + LARGEST_CHARGE > (high < max ? high : max))
		way->at_limit = true;
	if ((u64)usage <= high)
		return;
	over = usage - high;
	if (over > OVERAGE_MAX)
		over = OVERAGE_MAX;
	share = (over << SHARE_SHIFT) / (high ? high : 1);
	if (share > way->over_share)
		way->over_share = share;
}

/**
 * find_session - the session that a memory cgroup belongs to
 * @memcg: the session's own memory cgroup, or one below it
 * @way: filled in with the findings up to the session
 *
 * Return: what the daemon wrote for the session; NULL for a memory cgroup of no session.
 */
static __always_inline struct protection *find_session(struct mem_cgroup *memcg, struct way *way)
{
	struct protection *found;

	for (int i = 0; i <= ABI_DEPTH_MAX && memcg; i++) {
		u64 id = BPF_CORE_READ(memcg, css.cgroup, kn, id);

		look_at(memcg, way);
		found = bpf_map_lookup_elem(&protections, &id);
		if (found) {
			way->session_id = id;
			return found;
		}
		memcg = memcg_of(BPF_CORE_READ(memcg, css.parent));
	}
	return NULL;
}

/**
 * is_spared - whether reclaim is to leave a memory cgroup alone for now
 * @memcg: the memory cgroup that reclaim has come to
 * @always: true: as with memory.min, even if nothing else can be reclaimed; false: as with
 *          memory.low, while something else can be
 *
 * The hook does not tell for whose limit memory is reclaimed. If the limit is on the way up to the
 * session and everything below it were always spared, nothing could be reclaimed, and the call
 * would be killed for a limit that reclaim could have kept. So close to a limit nothing is always
 * spared.
 */
static __always_inline bool is_spared(struct mem_cgroup *memcg, bool always)
{
	struct way way = {};
	struct protection *session = find_session(memcg, &way);

	if (!session || !session->protect || !session->stalled)
		return false;
	if (always && way.at_limit)
		return false;
	__sync_fetch_and_add(always ? &counters.spared_min : &counters.spared_low, 1);
	return true;
}

/**
 * delay_ms - how long a task that was charged is to wait
 * @memcg: the memory cgroup that was charged
 *
 * The kernel takes the larger of this and its own delay, which rises with the square of the
 * overage, and at most 2 s of either.
 *
 * Return: the delay in ms: protection.delay_percent for each percent above memory.high, up to
 * delay_cap_ms; 0 for protected sessions.
 */
static __always_inline u32 delay_ms(struct mem_cgroup *memcg)
{
	struct way way = {};
	struct protection *session = find_session(memcg, &way);
	u64 factor, cap;
	u32 delay;

	if (!session || session->protect || !session->delay_percent || !way.over_share)
		return 0;
	factor = (u64)session->delay_percent * PERCENT;
	cap = session->delay_cap_ms;
	/* Up to that quotient the product below is at most cap << SHARE_SHIFT: no overflow. */
	if (way.over_share > (cap << SHARE_SHIFT) / factor)
		delay = cap;
	else
		delay = way.over_share * factor >> SHARE_SHIFT;
	if (delay)
		__sync_fetch_and_add(&counters.delayed, 1);
	return delay;
}

SEC("struct_ops/below_low")
bool BPF_PROG(below_low, struct mem_cgroup *memcg)
{
	return is_spared(memcg, false);
}

SEC("struct_ops/below_min")
bool BPF_PROG(below_min, struct mem_cgroup *memcg)
{
	return is_spared(memcg, true);
}

SEC("struct_ops/get_high_delay_ms")
unsigned int BPF_PROG(get_high_delay_ms, struct mem_cgroup *memcg)
{
	return delay_ms(memcg);
}

/* The kernel calls this for charges below memory.high too; the delay is 0 then. */
SEC("struct_ops/memcg_charged")
unsigned int BPF_PROG(memcg_charged, struct mem_cgroup *memcg)
{
	return delay_ms(memcg);
}

SEC("struct_ops/handle_cgroup_online")
void BPF_PROG(handle_cgroup_online)
{
	__sync_fetch_and_add(&counters.online, 1);
}

SEC("struct_ops/handle_cgroup_offline")
void BPF_PROG(handle_cgroup_offline)
{
	__sync_fetch_and_add(&counters.offline, 1);
}

/* The ? makes the map optional: otherwise libbpf refuses the object if the kernel lacks the type.
 */
SEC("?.struct_ops.link")
struct memcg_bpf_ops___v1 hooks = {
	.handle_cgroup_online = (void *)handle_cgroup_online,
	.handle_cgroup_offline = (void *)handle_cgroup_offline,
	.below_low = (void *)below_low,
	.below_min = (void *)below_min,
	.get_high_delay_ms = (void *)get_high_delay_ms,
	.memcg_charged = (void *)memcg_charged,
};

/**
 * decide_for - make the decisions of the callbacks for a cgroup; loaded by tests only
 * @decision: its cgroup_id is read, the other members are filled in
 *
 * Return: 0; -ENOENT: there is no such cgroup; -ENODEV: it has no memory controller.
 */
SEC("syscall")
int decide_for(struct memcg_decision *decision)
{
	u32 controller = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	u32 offset = bpf_core_field_offset(struct cgroup___subsys, subsys);
	struct cgroup_subsys_state *css = NULL;
	struct mem_cgroup *memcg;
	struct cgroup *cgroup;
	struct way way = {};

	cgroup = bpf_cgroup_from_id(decision->cgroup_id);
	if (!cgroup)
		return -ENOENT;
	bpf_probe_read_kernel(&css, sizeof(css), (void *)cgroup + offset + controller * 8);
	memcg = memcg_of(css);
	if (memcg) {
		find_session(memcg, &way);
		decision->session_id = way.session_id;
		decision->usage_bytes = BPF_CORE_READ(memcg, memory.usage.counter) * page_bytes;
		decision->high_bytes = BPF_CORE_READ(memcg, memory.high) * page_bytes;
		decision->below_low = is_spared(memcg, false);
		decision->below_min = is_spared(memcg, true);
		decision->delay_ms = delay_ms(memcg);
	}
	bpf_cgroup_release(cgroup);
	return memcg ? 0 : -ENODEV;
}
