/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Structs and constants that the programs share with the daemon. They are written here only:
 * daemon/agentcgroupd/bpf/abi.py is made from the type information of the compiled abi.bpf.c
 * (`python -m agentcgroupd.bpf.generate`), and a test fails when the two differ.
 *
 * Names end in units. Times named at_ns are CLOCK_MONOTONIC; start_ns is CLOCK_BOOTTIME, as in
 * /proc/<pid>/stat. Members are aligned by hand, because padding could carry the kernel's memory to
 * the daemon.
 */
#ifndef AGENTCG_ABI_H
#define AGENTCG_ABI_H

enum abi {
	ABI_VERSION = 1,
	ABI_ARGV_BYTES = 512,
	ABI_COMM_BYTES = 16,
	ABI_PATH_BYTES = 256,
	ABI_PROTECTED_MAX = 64,
	ABI_SMALL_REQUEST_BYTES = 1114112, /* an allocator's arena of 1 MiB, and its head */
	ABI_DEPTH_MAX = 8,		   /* levels looked up above a task's own cgroup */
	ABI_DELAY_CAP_MS = 2000,	   /* MEMCG_MAX_HIGH_DELAY_JIFFIES, mm/memcontrol.c */
	ABI_GPU_MINORS = 256,
	ABI_GPU_SHARED_MINOR = 254, /* nvidia-modeset; nvidiactl is 255: of no single GPU */
	ABI_VRAM_GRAIN_BYTES = 512, /* allocations start at multiples, so take multiples */
	ABI_SCHED_CGROUPS = 16384,  /* cgroups that the scheduler tells apart; a power of two */
	ABI_SCHED_CPUS = 1024,	    /* a power of two */
	ABI_LEVELS_MAX = 256,	    /* levels above a cgroup in which its call is looked for */
	ABI_LEFT_MOST = 64,	    /* processes told in a second that left one call */
	ABI_LOOK_CALLS = 16384,	    /* calls that are looked at at once; a power of two */
	ABI_SCHED_REASON_BYTES = 64,
	ABI_SCHED_MESSAGE_BYTES = 256,
};

/* The part that a managed cgroup plays. */
enum cgroup_kind {
	KIND_NONE = 0,
	KIND_POOL = 1,
	KIND_SESSION = 2,
	KIND_AGENT = 3, /* the agent leaf of a session */
	KIND_CALL = 4,
};

enum event_type {
	EVENT_NONE = 0,
	EVENT_FORK = 1,
	EVENT_EXEC = 2,
	EVENT_EXIT = 3,
	EVENT_OOM_VICTIM = 4,
	EVENT_MARK = 5,	  /* usage rose above a soft mark, or fell below its lower edge */
	EVENT_HIGH = 6,	  /* memory.high was passed */
	EVENT_RATES = 7,  /* faults or refaults passed their rate, or fell below half of it */
	EVENT_DENIED = 8, /* growth was refused for the first time since it was denied */
	EVENT_URGENT = 9, /* a protected session stalled; the program denies growth by itself */
	EVENT_LEFT = 10,  /* a process was moved out of a call, or made outside of it */
	EVENT_TYPES = 11,
};

/* lifecycle.bpf.c: one entry for each managed cgroup, by cgroup id. */
struct managed {
	__u32 kind;
	__u16 left;	   /* processes that left in the second below and were told */
	__u16 left_second; /* units of 2^30 ns, the low bits */
};

/* The head of every event. */
struct event {
	__u32 type;
	__u32 size_bytes;
	__u64 at_ns;
	__u64 cgroup_id; /* the managed cgroup */
};

struct process {
	__u64 start_ns;
	__s32 pid; /* thread group id in the daemon's pid namespace; 0: not visible there */
	__s32 parent_pid;
	char comm[ABI_COMM_BYTES];
};

struct fork_event {
	struct event event;
	struct process child;
	__u64 parent_start_ns;
};

struct exec_event {
	struct event event;
	struct process process;
	__u64 own_cgroup_id; /* at or below event.cgroup_id */
	__u32 argv_bytes;    /* used in argv; each argument ends in a NUL */
	__u32 argv_cut;	     /* 1: the arguments were longer */
	__u32 at_startup;    /* 1: a shell executes it from its startup files */
	__u32 reserved;
	__u8 argv[ABI_ARGV_BYTES];
};

struct exit_event {
	struct event event;
	struct process process;
	__u64 user_ns;
	__u64 system_ns;
	__u64 rss_peak_bytes; /* of the process alone */
	__u32 wait_status;    /* as waitpid(2) gives it */
	__u32 executed;	      /* 1: the process has executed a program since its fork */
};

struct oom_event {
	struct event event;
	struct process process;
};

struct left_event {
	struct event event;	   /* of the call that it was in */
	struct process process;	   /* now elsewhere */
	struct process mover;	   /* may be the same */
	__u64 to_cgroup_id;	   /* where it is */
	__u32 more;		   /* 1: others that leave within the second are not told */
	__u32 made;		   /* 1: the mover has made it there: CLONE_INTO_CGROUP */
	__u8 path[ABI_PATH_BYTES]; /* where it is, from the root of the tree; ends in a NUL */
};

/* lifecycle.bpf.c: counts since load. */
struct lifecycle_counters {
	__u64 sent[EVENT_TYPES];
	__u64 lost[EVENT_TYPES]; /* no room in the ring buffer, or for what an event needs */
};

/* memory.bpf.c: what the daemon asks for, by cgroup id. */
enum deny_mode {
	DENY_NEVER = 0,
	DENY_OVER_MARK = 1,
};

struct memory_limits {
	__u64 parent_id; /* the managed cgroup above, 0: none */
	__u64 soft_mark_bytes;
	__u64 soft_low_bytes; /* lower edge: the mark is armed again below it */
	__u64 deny_mark_bytes;

	__u64 faults_per_s; /* 0: not watched */
	__u64 refaults_per_s;
	__u32 deny_mode;
	__u32 kind;
	__u32 priority;
	__u32 deny_round; /* raised with each new denial, which is told once */

	__u64 throttle_mark_bytes; /* growth beyond it is slowed; 0: beyond memory.high */
	__u32 willing;		   /* 1: it would rather be refused memory than wait */
	__u32 reserved;
};

/* memory.bpf.c: what the program has seen, by cgroup id. */
struct memory_state {
	__u64 window_ns; /* start of the running window */
	__u64 window_faults;
	__u64 window_refaults;
	__u64 faults; /* of tasks that charged memory, since the watch began */
	__u64 major_faults;
	__u64 refaults;
	__u64 high_events;
	__u64 high_told_ns;
	__u64 marks_crossed;
	__u64 denied;
	__u64 denied_bytes;
	__u32 above_mark;
	__u32 above_rate;
	__u32 told_round;    /* the last denial that an event was sent for; odd: an urgent one */
	__u32 allowed_round; /* the denial that allowed_bytes belongs to */
	__u64 allowed_bytes; /* small requests that passed in spite of the denial */

	/* Read by sched.bpf.c. */
	__u64 over_at_ns;    /* when a charge last found the call above its throttle mark */
	__u64 high_at_ns;    /* when memory.high was last passed, so that the cgroup reclaimed */
	__u32 over_permille; /* how far above the mark the last charge found it; 0: below */
	__u32 reserved;
};

struct mark_event {
	struct event event;
	__u64 usage_bytes;
	__u64 mark_bytes;
	__u32 above;
	__s32 pid; /* of the task that was charged */
};

struct high_event {
	struct event event;
	__u64 usage_bytes;
	__u64 high_bytes;
	__u64 count;
};

struct rates_event {
	struct event event;
	__u64 faults_per_s;
	__u64 refaults_per_s;
	__u32 above;
	__u32 reserved;
};

struct denied_event {
	struct event event;
	__u64 usage_bytes;
	__u64 mark_bytes;
	__u64 request_bytes;
	__u32 urgent; /* 1: by the program itself, because a protected session stalled */
	__s32 pid;
};

struct urgent_event {
	struct event event; /* cgroup_id: the protected session */
	__u64 stalled_ns;   /* within the window */
	__u64 until_ns;
	__u32 priority;
	__s32 pid;
};

/* memory.bpf.c: a session whose stalls deny less important calls growth; written by the daemon. */
struct protected_session {
	__u64 cgroup_id;
	__u32 priority;
	__u32 stalling;		 /* tasks in a memory stall now */
	__u64 stalling_since_ns; /* since when there is one of them */
	__u64 window_ns;	 /* start of the running window */
	__u64 stalled_ns;	 /* in that window, of stalls that have ended */
};

/* One for the whole object, in mapped memory. */
struct memory_control {
	__u64 allowance_bytes; /* sum of the small requests that all denied calls may still make */
	__u64 allowed_bytes;   /* of that, what has been used since calls are denied */
	__u64 stall_threshold_ns;
	__u64 stall_window_ns;
	__u64 urgent_lease_ns;
	__u64 pool_id;	       /* the pool, which must be above its mark; 0: no urgent reaction */
	__u64 lifted_until_ns; /* until when the daemon allows no urgent reaction */
	__u64 urgent_until_ns; /* until when calls below urgent_priority are denied growth */
	__u64 urgent_count;
	__u64 lost;	      /* events without room in the ring buffer */
	__u64 untracked;      /* states without room in their map */
	__u64 denying;	      /* calls whose growth the daemon has denied */
	__u64 heartbeat_ns;   /* when the daemon's loop last ran; 0: it does not say */
	__u64 alone_after_ns; /* silence after which the program denies by itself; 0: never */
	__u64 alone_until_ns; /* silence after which nothing is denied any more */
	__u64 alone_beat_ns;  /* the heartbeat before the last such silence */
	__u64 alone_count;    /* such silences while the pool was above its mark */
	__u32 urgent_priority;
	__u32 protected_count;
	__u32 pool_above; /* 1: the pool is above its soft mark */
	__u32 reserved;
	struct protected_session protected_sessions[ABI_PROTECTED_MAX];
};

/* look.bpf.c: place of a call's entry, by cgroup id. */
struct look_place {
	__u32 slot;
	__u32 reserved;
};

/* look.bpf.c: one call, in mapped memory. */
struct look_call {
	__u64 usage_bytes;
	__u64 before_bytes; /* its usage at the look before */
	__u64 told_bytes;   /* its usage when it was listed last */
	__u32 round;	    /* the look that has seen it last */
	__u32 reserved;
};

/* look.bpf.c: one for the whole object, in mapped memory. */
struct look_control {
	/* Written by the daemon before a look. */
	__u64 root_id;	  /* the cgroup below which all calls lie */
	__u64 step_bytes; /* a call is listed when its usage has moved by so much */

	__u32 round;
	__u32 listed;
	__u32 list[ABI_LOOK_CALLS];
};

/* sched.bpf.c: place of a cgroup's entry, by cgroup id. */
struct sched_place {
	__u32 slot;
	__u32 reserved;
};

/* sched.bpf.c: one cgroup with the cpu controller, in mapped memory; counts since it was made. */
struct sched_cgroup {
	__u64 cgroup_id; /* 0: the entry is free */

	/* Written by the daemon before a process enters. */
	__u64 boost_cap_ns;   /* most CPU time that its budget holds for going first; 0: none */
	__u32 boost_permille; /* rate at which the budget fills, in permille of one CPU */
	__u32 kind;	      /* enum cgroup_kind */
	__u64 hurry_until_ns; /* until when its tasks go first: before a freeze or a kill */

	__u64 run_ns;
	__u64 wait_ns; /* sum of the times that its tasks were runnable and not running */
	__u64 wait_max_ns;
	__u64 slices;	  /* times that a task of it was given a CPU */
	__u64 boosts;	  /* slices that were given ahead of others */
	__u64 boosted_ns; /* CPU time paid from the budget */
	__u64 penalties;  /* times that it was paused for its memory */
	__u64 penalty_ns;
	__u64 stalls; /* times that it was paused because cpu.max was used up */
	__u64 stalled_ns;
	__u64 rescues; /* slices that a task got for having waited too long */
};

/* sched.bpf.c: one for the whole object, in mapped memory. */
struct sched_control {
	/* Written by the daemon before the scheduler is attached. */
	__u64 slice_ns;
	__u64 wait_max_ns;	/* time after which a waiting task is looked at: see move_oldest */
	__u64 boost_lead_ns;	/* how far ahead of its share a boost may take a cgroup */
	__u32 penalty_most;	/* highest factor of CPU time for memory over the mark; 1: off */
	__u32 stall_on_purpose; /* for tests: give no task a CPU */
	__u64 exec_hold_ns;	/* longest time that a program waits at its exec; 0: none does */

	/* Counts since the scheduler was attached. */
	__u64 cgroups;	     /* now */
	__u64 queues;	     /* DSQs, now */
	__u64 waiting;	     /* tasks in the queues of cgroups, now */
	__u64 in_lanes;	     /* tasks in lanes, now */
	__u64 without_entry; /* cgroups without an entry, scheduled with their parent */
	__u64 picks;
	__u64 picks_empty;     /* choices of a queue that had no task for the CPU */
	__u64 preempted;       /* tasks that lost their CPU to one that woke */
	__u64 finishing;       /* slices for tasks that must go on at once: see enqueue */
	__u64 left;	       /* tasks that left the class while alive */
	__u64 not_asked;       /* times that there was no memory to ask a task: see ask() */
	__u64 held_at_exec;    /* programs that the daemon was to decide on before they run */
	__u64 exec_holds_over; /* of these, that went on because the time was over */
};

/* sched.bpf.c: context of the program `hurry`. */
struct sched_hurry {
	__u64 cgroup_id;
	__u64 until_ns;
};

/* sched.bpf.c: context of the program `let_go`. */
struct sched_let_go {
	__u32 pid; /* of the process, as the daemon sees it */
	__u32 reserved;
	__u64 at_ns; /* time of the event of its exec */
};

/* sched.bpf.c: reason why the kernel has detached the scheduler. */
struct sched_exit {
	__u64 at_ns;
	__s64 code;
	__u32 kind; /* enum scx_exit_kind; 0: attached, or never was */
	__u32 reserved;
	char reason[ABI_SCHED_REASON_BYTES];
	char message[ABI_SCHED_MESSAGE_BYTES];
};

/* memcg_ops.bpf.c: treatment of a session, by cgroup id. */
struct protection {
	__u32 protect; /* 1: spared by reclaim while `stalled`, and charges are not delayed */
	__u32 stalled;
	__u32 delay_percent; /* ms of delay for each percent above memory.high; 0: none */
	__u32 delay_cap_ms;
};

/* memcg_ops.bpf.c: counts since load. */
struct memcg_ops_counters {
	__u64 online; /* memory cgroups made below one that the hooks are attached to */
	__u64 offline;
	__u64 spared_low;
	__u64 spared_min;
	__u64 delayed;
};

/* memcg_ops.bpf.c: decisions of the hooks for a cgroup; context of a program for tests. */
struct memcg_decision {
	__u64 cgroup_id;
	__u64 session_id; /* 0: the cgroup is in no session */
	__u64 usage_bytes;
	__u64 high_bytes;
	__u32 below_low;
	__u32 below_min;
	__u32 delay_ms;
	__u32 reserved;
};

/* device.bpf.c: meaning of a major number. */
enum gpu_major_kind {
	GPU_MAJOR_NONE = 0,
	GPU_MAJOR_DEVICES = 1, /* minors below ABI_GPU_SHARED_MINOR are GPUs */
	GPU_MAJOR_SHARED = 2,  /* unified memory, capabilities: open to whoever has any GPU */
};

struct gpu_major {
	__u32 kind;
	__u32 reserved;
};

/* device.bpf.c: GPUs of a call or agent leaf, by its cgroup id. */
struct gpu_access {
	__u64 minors[4]; /* a bit for each of ABI_GPU_MINORS */
};

/* Events of device.bpf.c and vram.bpf.c, with other numbers than enum event_type. */
enum gpu_event_type {
	GPU_EVENT_NONE = 0,
	GPU_EVENT_OPENED = 64, /* a device file was opened */
	GPU_EVENT_CLOSED = 65, /* the opening of a device file was refused */
	GPU_EVENT_MEMORY = 66, /* an allocation went over the quota */
	GPU_EVENT_ACTIVE = 67, /* the first work was given to the GPU since vram_quota.watch */
};

struct gpu_device_event {
	struct event event; /* cgroup_id: the task's own cgroup */
	__u32 major;
	__u32 minor;
	__s32 pid;
	__u32 reserved;
	char comm[ABI_COMM_BYTES];
};

/* device.bpf.c: counts since load. */
struct device_counters {
	__u64 opened;
	__u64 refused;
	__u64 lost; /* events without room in the ring buffer */
};

/* vram.bpf.c: functions of libcuda, as cookies of their probes. Arguments are those of cuda.h. */
enum cuda_call {
	CUDA_NONE = 0,
	CUDA_ALLOC = 1, /* (pointer *, size, ...) */
	CUDA_ALLOC_PITCH = 2,
	CUDA_CREATE = 3,
	CUDA_ARRAY = 4,
	CUDA_ARRAY_3D = 5,
	CUDA_MIPMAP = 6,
	CUDA_FREE = 7, /* (pointer, ...) */
	CUDA_RELEASE = 8,
	CUDA_ARRAY_DESTROY = 9,
	CUDA_MIPMAP_DESTROY = 10,
	CUDA_MAP = 11,
	CUDA_UNMAP = 12,
	CUDA_RETAIN = 13,
	CUDA_CTX_CREATE = 14,
	CUDA_CTX_SET = 15,
	CUDA_CTX_POP = 16,
	CUDA_CTX_DESTROY = 17,
	CUDA_PRIMARY_RETAIN = 18,
	CUDA_PRIMARY_RESET = 19,
	CUDA_CTX_PUSH = 20,
};

/* vram.bpf.c: quota of a call or agent leaf, by its cgroup id; written by the daemon. */
struct vram_quota {
	__u64 quota_bytes; /* all ones: no quota, only an account */
	__u32 watch;	   /* 1: send an event for the next work given to the GPU, once */
	__u32 reserved;
};

/* vram.bpf.c: account of a cgroup with a quota, by the same id. */
struct vram_account {
	__u64 used_bytes;
	__u64 peak_bytes;
	__u64 allocations;
	__u64 frees;
	__u64 refused;
	__u64 refused_bytes;
	__u64 over;	 /* allocations over the quota that the kernel could not refuse */
	__u64 untracked; /* handles without room, whose memory counts until the process ends */
	__u64 told_ns;	 /* when an event was last sent */
	__u64 launches;	 /* work given to the GPU, seen by probes while there are any */
};

struct vram_process {
	__u64 start_ns;
	__u64 account; /* cgroup id */
	__u64 used_bytes;
};

/* vram.bpf.c: a handle that libcuda gave out. */
struct vram_key {
	__u64 start_ns;
	__u64 handle;
	__u32 tgid; /* in the initial pid namespace */
	__u32 kind; /* the cuda_call that made it: handles of two kinds can be equal */
};

struct vram_allocation {
	__u64 size_bytes;
	__u64 context;	      /* 0: not known, or none */
	__u64 context_serial; /* tells the context from a later one at the same address */
	__u32 refs;	      /* of physical memory: the handle and its mappings */
	__u32 reserved;
};

struct vram_event {
	struct event event; /* cgroup_id: the account's */
	__u64 size_bytes;
	__u64 used_bytes;
	__u64 quota_bytes;
	__s32 pid;
	__u32 refused; /* 0: the kernel could not refuse */
};

/*
 * net.bpf.c: what the sockets of a cgroup and of those below it have received and sent, and how
 * much they may send.
 */
struct net_traffic {
	__u64 receive_bytes;
	__u64 receive_packets;
	__u64 apart[8]; /* receiving and sending are often done by two CPUs: a cache line each */
	__u64 send_bytes;
	__u64 send_packets;
	__u64 refused_packets;	/* what it would have sent above its rate */
	__u64 send_bytes_per_s; /* what it may send; 0: as much as it likes */
	__u64 paid_until_ns;	/* when all that it has sent would be out at that rate
				   (CLOCK_MONOTONIC) */
};

/* What the daemon tells net.bpf.c. */
struct net_control {
	__u32 first_level; /* levels below the root where the highest cgroup with an entry is */
	__u32 reserved;
};

#endif
