// SPDX-License-Identifier: GPL-2.0
/* Never loaded: daemon/agentcgroupd/bpf/abi.py is made from the type information of this object. */
#include <linux/types.h>

#include "abi.h"

enum abi abi;
enum cgroup_kind cgroup_kind;
enum event_type event_type;
enum deny_mode deny_mode;
struct managed managed;
struct fork_event fork_event;
struct exec_event exec_event;
struct exit_event exit_event;
struct oom_event oom_event;
struct left_event left_event;
struct lifecycle_counters lifecycle_counters;
struct memory_limits memory_limits;
struct memory_state memory_state;
struct mark_event mark_event;
struct high_event high_event;
struct rates_event rates_event;
struct denied_event denied_event;
struct urgent_event urgent_event;
struct memory_control memory_control;
struct look_place look_place;
struct look_call look_call;
struct look_control look_control;
struct sched_place sched_place;
struct sched_cgroup sched_cgroup;
struct sched_control sched_control;
struct sched_exit sched_exit;
struct sched_hurry sched_hurry;
struct sched_let_go sched_let_go;
struct protection protection;
struct memcg_ops_counters memcg_ops_counters;
struct memcg_decision memcg_decision;
enum gpu_major_kind gpu_major_kind;
enum gpu_event_type gpu_event_type;
enum cuda_call cuda_call;
struct gpu_major gpu_major;
struct gpu_access gpu_access;
struct gpu_device_event gpu_device_event;
struct device_counters device_counters;
struct vram_quota vram_quota;
struct vram_account vram_account;
struct vram_process vram_process;
struct vram_key vram_key;
struct vram_allocation vram_allocation;
struct vram_event vram_event;
struct net_traffic net_traffic;
struct net_control net_control;
