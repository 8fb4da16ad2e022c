// SPDX-License-Identifier: GPL-2.0
/*
 * The gate in front of the GPUs' device files: only tasks below a cgroup that the daemon has noted
 * may open them. It is attached to the pool and to each adopted session, beside any program that a
 * container runtime has there: the kernel asks all of them, and a single refusal is enough.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define OPENED_GAP_NS  2000000UL /* a driver opens several files in a row */
#define REFUSED_GAP_NS 1000000000UL

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, u64);
	__type(value, struct gpu_major);
} majors SEC(".maps");

ID_MAP(access, struct gpu_access);

/*
 * Time of the last event in ns, by source: (tgid << 32 | 1) of a process that opened a device, or
 * (cgroup id << 1) of a cgroup that was refused one.
 */
LRU_MAP(told, 4096, u64);

RING_BUFFER(events, 256 << 10);

struct device_counters counters = {};

/**
 * find_access - the GPUs that a task may open
 * @task: the task
 * @own: set to the id of the task's own cgroup
 *
 * Return: the entry of that cgroup, or of the nearest one above it that the daemon has noted; NULL:
 * none, so no GPU.
 */
static __always_inline struct gpu_access *find_access(struct task_struct *task, u64 *own)
{
	u64 id;

	return nearest(&access, task_cgroup(task), own, &id);
}

/**
 * is_news - whether an event is worth sending, so long after the last one of its source
 * @key: the source, as in `told`
 * @gap_ns: least time between two events
 *
 * The time of the event is noted if it is.
 */
static __always_inline bool is_news(u64 key, u64 gap_ns)
{
	u64 now = bpf_ktime_get_ns(), *before = bpf_map_lookup_elem(&told, &key);

	if (before && now - *before < gap_ns)
		return false;
	bpf_map_update_elem(&told, &key, &now, BPF_ANY);
	return true;
}

/**
 * tell - send an event about a device file
 * @type: GPU_EVENT_OPENED or GPU_EVENT_CLOSED
 * @task: the current task
 * @own: id of its cgroup
 * @major, @minor: numbers of the device
 *
 * An event without room in the ring buffer is counted.
 */
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

/* Whether an entry (NULL: none) lets its tasks open the device with this minor number. */
static __always_inline bool allows(struct gpu_access *entry, u32 kind, u32 minor)
{
	if (!entry)
		return false;
	if (kind == GPU_MAJOR_SHARED || minor >= ABI_GPU_SHARED_MINOR)
		return true;
	return entry->minors[(minor >> 6) & 3] >> (minor & 63) & 1;
}

/* Runs when a task opens or makes a device file. Returns 1: allowed, 0: refused (EPERM). */
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
