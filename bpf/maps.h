/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Maps in the forms that more than one object uses. Each macro defines one map; names, keys and
 * values are what the daemon looks up (daemon/agentcgroupd/bpf).
 */
#ifndef AGENTCG_MAPS_H
#define AGENTCG_MAPS_H

/* Cgroups, or processes, that a map has room for. */
#define IDS_MAX 65536

/* A hash of up to @entries values by @key; the memory of an entry is allocated when it is made. */
#define HASH_MAP(name, entries, key_type, value_type) \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_HASH);      \
		__uint(map_flags, BPF_F_NO_PREALLOC); \
		__uint(max_entries, entries);         \
		__type(key, key_type);                \
		__type(value, value_type);            \
	} name SEC(".maps")

/* A hash of values by the id of a cgroup or process. */
#define ID_MAP(name, value_type) HASH_MAP(name, IDS_MAX, u64, value_type)

/* A hash that makes room by dropping the entry that was used least recently. */
#define LRU_MAP(name, entries, value_type)           \
	struct {                                     \
		__uint(type, BPF_MAP_TYPE_LRU_HASH); \
		__uint(max_entries, entries);        \
		__type(key, u64);                    \
		__type(value, value_type);           \
	} name SEC(".maps")

/* A value for each task that was given one, which goes with the task. */
#define TASK_MAP(name, value_type)                       \
	struct {                                         \
		__uint(type, BPF_MAP_TYPE_TASK_STORAGE); \
		__uint(map_flags, BPF_F_NO_PREALLOC);    \
		__type(key, int);                        \
		__type(value, value_type);               \
	} name SEC(".maps")

/* A ring buffer of @size_bytes, a power of two; the daemon may choose another size at the load. */
#define RING_BUFFER(name, size_bytes)               \
	struct {                                    \
		__uint(type, BPF_MAP_TYPE_RINGBUF); \
		__uint(max_entries, size_bytes);    \
	} name SEC(".maps")

#endif
