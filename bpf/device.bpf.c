// SPDX-License-Identifier: GPL-2.0
/*
 * Who may open a GPU's device files: only what is below a cgroup that the daemon has noted.
 * Attached to the pool and to each adopted session, beside whatever program a runtime has there:
 * the kernel asks all of them, and one that says no is enough.
 */
#include "compat.h"

char LICENSE[] SEC("license") = "GPL";

#define OPENED_GAP_NS  2000000UL /* a driver opens several files in a row */
#define REFUSED_GAP_NS 1000000000UL

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, u64);
	__type(value, struct gpu_major);
} majors SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct gpu_access);
} access SEC(".maps");

/* When something was last told: of a process that opened, of a cgroup that was refused. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, u64);
	__type(value, u64);
} told SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 << 10);
} events SEC(".maps");

struct device_counters counters = {};

/**
 * find_access - what a task's cgroup, or the nearest one above it that is noted, may open
 * @task: the task
 * @own: set to the id of its own cgroup
 *
 * Return: its entry, or NULL.
 */
static __always_inline struct gpu_access *find_access(struct task_struct *task, u64 *own)
{
	struct cgroup *cgroup = task_cgroup(task);
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;
	struct gpu_access *entry;
	u64 id;

	*own = id = cgroup_id(cgroup);
	entry = bpf_map_lookup_elem(&access, &id);
	for (int i = 1; !entry && i <= ABI_DEPTH_MAX && i < level; i++) {
		css = css->parent;
		id = cgroup_id(css->cgroup);
		entry = bpf_map_lookup_elem(&access, &id);
	}
	return entry;
}

/* Whether it is time to tell again; what is told often says nothing new. */
static __always_inline bool is_news(u64 key, u64 gap_ns)
{
	u64 now = bpf_ktime_get_ns(), *before = bpf_map_lookup_elem(&told, &key);

	if (before && now - *before < gap_ns)
		return false;
	bpf_map_update_elem(&told, &key, &now, BPF_ANY);
	return true;
}

static __always_inline void tell(u32 type, struct task_struct *task, u64 own, u32 major, u32 minor)
{
	struct gpu_device_event *event;

	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&counters.lost, 1);
		return;
	}
	event->event.type = type;
	event->event.size_bytes = sizeof(*event);
	event->event.at_ns = bpf_ktime_get_ns();
	event->event.cgroup_id = own;
	event->major = major;
	event->minor = minor;
	event->pid = visible_pid(task);
	event->reserved = 0;
	BPF_CORE_READ_INTO(&event->comm, task, comm);
	bpf_ringbuf_submit(event, 0);
}

static __always_inline bool allows(struct gpu_access *entry, u32 kind, u32 minor)
{
	if (!entry)
		return false;
	if (kind == GPU_MAJOR_SHARED || minor >= ABI_GPU_SHARED_MINOR)
		return true;
	return entry->minors[(minor >> 6) & 3] >> (minor & 63) & 1;
}

SEC("cgroup/dev")
int on_device(struct bpf_cgroup_dev_ctx *ctx)
{
	u32 type = ctx->access_type & 0xffff, minor = ctx->minor;
	u64 major = ctx->major, own;
	struct gpu_access *entry;
	struct task_struct *task;
	struct gpu_major *known;

	if (type != BPF_DEVCG_DEV_CHAR)
		return 1;
	known = bpf_map_lookup_elem(&majors, &major);
	if (!known)
		return 1;
	task = bpf_get_current_task_btf();
	entry = find_access(task, &own);
	if (allows(entry, known->kind, minor)) {
		__sync_fetch_and_add(&counters.opened, 1);
		if (is_news(((u64)task->tgid << 32) | 1, OPENED_GAP_NS))
			tell(GPU_EVENT_OPENED, task, own, major, minor);
		return 1;
	}
	__sync_fetch_and_add(&counters.refused, 1);
	if (is_news(own << 1, REFUSED_GAP_NS))
		tell(GPU_EVENT_CLOSED, task, own, major, minor);
	return 0;
}
