// SPDX-License-Identifier: GPL-2.0
/*
 * Memory of the GPU by call: probes on libcuda's own functions, told apart by their cookie. A size
 * is taken from the quota before the driver is entered, and given back if it fails, so that threads
 * that ask at the same time cannot pass together. Over the quota the function returns
 * CUDA_ERROR_OUT_OF_MEMORY at once, where the kernel lets a probe say so (Linux 6.19).
 *
 * One program runs at the start and at the end of a function (a session, Linux 6.13): an ordinary
 * return probe would put its own return address in place, also where the function is left out.
 *
 * What cannot be known is counted, never forgotten: a handle that finds no room stays counted until
 * its process ends.
 */
#include "compat.h"

char LICENSE[] SEC("license") = "GPL";

#define CUDA_SUCCESS		 0
#define CUDA_ERROR_OUT_OF_MEMORY 2
#define LOCATION_HOST		 2 /* CU_MEM_LOCATION_TYPE_HOST and those after it */
#define ARRAY3D_LAYERED		 0x1
#define ARRAY3D_CUBEMAP		 0x4
#define ARRAY3D_SPARSE		 0x40
#define PITCH_BYTES		 512
#define MAPPINGS_MAX		 65536
#define TOLD_GAP_NS		 100000000UL
#define NO_QUOTA		 (~0UL)

#ifdef __TARGET_ARCH_x86
#define ARG1(regs)   ((regs)->di)
#define ARG2(regs)   ((regs)->si)
#define ARG3(regs)   ((regs)->dx)
#define ARG4(regs)   ((regs)->cx)
#define RESULT(regs) ((regs)->ax)
#else
#define ARG1(regs)   ((regs)->regs[0])
#define ARG2(regs)   ((regs)->regs[1])
#define ARG3(regs)   ((regs)->regs[2])
#define ARG4(regs)   ((regs)->regs[3])
#define RESULT(regs) ((regs)->regs[0])
#endif

/* The kfuncs of a session took no argument until Linux 7.0. */
extern bool bpf_session_is_return(void *ctx) __ksym __weak;
extern bool bpf_session_is_return___v1(void) __ksym __weak;
extern __u64 *bpf_session_cookie(void *ctx) __ksym __weak;
extern __u64 *bpf_session_cookie___v1(void) __ksym __weak;

/* As in cuda.h. */
struct array_descriptor {
	u64 width, height;
	u32 format, channels;
};

struct array_3d_descriptor {
	u64 width, height, depth;
	u32 format, channels, flags, unused;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct vram_quota);
} quotas SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct vram_account);
} accounts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct vram_process);
} processes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20);
	__type(key, struct vram_key);
	__type(value, struct vram_allocation);
} allocations SEC(".maps");

/* Where physical memory is mapped; `kind` of the key is CUDA_MAP. */
struct mapping {
	u64 size_bytes;
	u64 handle;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 20);
	__type(key, struct vram_key);
	__type(value, struct mapping);
} mappings SEC(".maps");

/* What a context holds; `kind` of the key is CUDA_CTX_CREATE. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct vram_key);
	__type(value, u64);
} contexts SEC(".maps");

/* A device's primary context; `kind` of the key is CUDA_PRIMARY_RETAIN. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct vram_key);
	__type(value, u64);
} primaries SEC(".maps");

/* A thread's current contexts. */
#define STACK_DEPTH 8
struct context_stack {
	u64 context[STACK_DEPTH];
	u32 depth;
	u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct context_stack);
} threads SEC(".maps");

/* A function that has been entered and has not returned. */
struct pending {
	u64 account;
	u64 process; /* tgid */
	u64 start_ns;
	u64 size_bytes; /* taken from the quota */
	u64 out;	/* where the handle will be */
	u64 first;	/* arguments, by function */
	u64 second;
	u64 fourth;
	struct vram_allocation taken;
	u32 call;
	u32 has_taken;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, u64);
	__type(value, struct pending);
} pendings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 << 10);
} events SEC(".maps");

u64 serial;

static const struct context_stack no_contexts;
static const struct vram_account no_account;

static __always_inline bool is_return(void *ctx)
{
	if (bpf_ksym_exists(bpf_session_is_return___v1))
		return bpf_session_is_return___v1();
	return bpf_session_is_return(ctx);
}

static __always_inline u64 *session_cookie(void *ctx)
{
	if (bpf_ksym_exists(bpf_session_cookie___v1))
		return bpf_session_cookie___v1();
	return bpf_session_cookie(ctx);
}

/**
 * find_quota - the quota that a task is under
 * @task: the task
 * @id: set to the id of the cgroup that has it
 *
 * Return: its entry, or NULL: nobody asks for this task to be accounted.
 */
static __always_inline struct vram_quota *find_quota(struct task_struct *task, u64 *id)
{
	struct cgroup *cgroup = task_cgroup(task);
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;
	struct vram_quota *quota;

	*id = cgroup_id(cgroup);
	quota = bpf_map_lookup_elem(&quotas, id);
	for (int i = 1; !quota && i <= ABI_DEPTH_MAX && i < level; i++) {
		css = css->parent;
		*id = cgroup_id(css->cgroup);
		quota = bpf_map_lookup_elem(&quotas, id);
	}
	return quota;
}

static __always_inline struct vram_account *account_of(u64 id)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &id);

	if (account)
		return account;
	bpf_map_update_elem(&accounts, &id, &no_account, BPF_NOEXIST);
	return bpf_map_lookup_elem(&accounts, &id);
}

/* The process's entry, made on first use. It stays with the account that it began in. */
static __always_inline struct vram_process *process_of(struct task_struct *task, u64 account)
{
	u64 tgid = task->tgid, start_ns = task->group_leader->start_boottime;
	struct vram_process *process = bpf_map_lookup_elem(&processes, &tgid);
	struct vram_process fresh = { .start_ns = start_ns, .account = account };

	if (process && process->start_ns == start_ns)
		return process;
	bpf_map_update_elem(&processes, &tgid, &fresh, BPF_ANY);
	return bpf_map_lookup_elem(&processes, &tgid);
}

static __always_inline void key_of(struct vram_key *key, struct pending *pending, u64 handle,
				   u32 kind)
{
	key->start_ns = pending->start_ns;
	key->handle = handle;
	key->tgid = pending->process;
	key->kind = kind;
}

/* Handles of memory that is read and written are of one kind, however it was asked for. */
static __always_inline u32 kind_of(u32 call)
{
	switch (call) {
	case CUDA_CREATE:
	case CUDA_RELEASE:
		return CUDA_CREATE;
	case CUDA_ARRAY:
	case CUDA_ARRAY_3D:
	case CUDA_ARRAY_DESTROY:
		return CUDA_ARRAY;
	case CUDA_MIPMAP:
	case CUDA_MIPMAP_DESTROY:
		return CUDA_MIPMAP;
	}
	return CUDA_ALLOC;
}

static __always_inline u64 context_of_thread(void)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct context_stack *stack = bpf_map_lookup_elem(&threads, &thread);
	u32 top;

	if (!stack || !stack->depth)
		return 0;
	top = stack->depth - 1;
	return top < STACK_DEPTH ? stack->context[top] : 0;
}

/* Adds to what a context holds (or takes away, for a negative number). */
static __always_inline void add_to_context(struct pending *pending, u64 context, s64 size_bytes)
{
	struct vram_key key;
	u64 *held, size = size_bytes;

	if (!context)
		return;
	key_of(&key, pending, context, CUDA_CTX_CREATE);
	held = bpf_map_lookup_elem(&contexts, &key);
	if (held)
		__sync_fetch_and_add(held, size);
	else if (size_bytes > 0)
		bpf_map_update_elem(&contexts, &key, &size, BPF_NOEXIST);
}

/* Adds to the account and the process (or takes away). Returns what the account held before. */
static __always_inline u64 charge(u64 id, u64 tgid, u64 start_ns, s64 size_bytes)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &id);
	struct vram_process *process = bpf_map_lookup_elem(&processes, &tgid);
	u64 before, now;

	if (!account || !process || process->start_ns != start_ns)
		return 0;
	__sync_fetch_and_add(&process->used_bytes, size_bytes);
	before = __sync_fetch_and_add(&account->used_bytes, size_bytes);
	now = before + size_bytes;
	if (size_bytes > 0 && now > account->peak_bytes)
		account->peak_bytes = now;
	return before;
}

static __always_inline void tell(struct vram_account *account, u64 id, u64 size_bytes,
				 u64 quota_bytes, u32 type, u32 refused)
{
	u64 now = bpf_ktime_get_ns();
	struct vram_event *event;

	if (type == GPU_EVENT_MEMORY) {
		if (account->told_ns && now - account->told_ns < TOLD_GAP_NS)
			return;
		account->told_ns = now;
	}
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return;
	event->event.type = type;
	event->event.size_bytes = sizeof(*event);
	event->event.at_ns = now;
	event->event.cgroup_id = id;
	event->size_bytes = size_bytes;
	event->used_bytes = account->used_bytes;
	event->quota_bytes = quota_bytes;
	event->pid = visible_pid(bpf_get_current_task_btf());
	event->refused = refused;
	bpf_ringbuf_submit(event, 0);
}

static __always_inline u64 bytes_of_format(u32 format)
{
	switch (format) {
	case 0x01: /* CU_AD_FORMAT_UNSIGNED_INT8 */
	case 0x08:
		return 1;
	case 0x02:
	case 0x09:
	case 0x10: /* half */
		return 2;
	}
	return 4; /* 32 bits, and no less for those that are packed in some other way */
}

static __always_inline u64 at_least_one(u64 number)
{
	return number ? number : 1;
}

static __always_inline u64 array_bytes(struct array_3d_descriptor *d, u32 level)
{
	u64 width = at_least_one(d->width >> level), height = at_least_one(d->height >> level);
	u64 depth = d->flags & (ARRAY3D_LAYERED | ARRAY3D_CUBEMAP) ?
			    at_least_one(d->depth) :
			    at_least_one(d->depth >> level);

	if (d->flags & ARRAY3D_SPARSE)
		return 0;
	return width * height * depth * at_least_one(d->channels) * bytes_of_format(d->format);
}

static __always_inline u64 grain(u64 size_bytes)
{
	return (size_bytes + ABI_VRAM_GRAIN_BYTES - 1) & ~((u64)ABI_VRAM_GRAIN_BYTES - 1);
}

/* What a function will take of the GPU's memory; false: it takes none of it. */
static __always_inline bool size_of(u32 call, struct pt_regs *ctx, u64 *size_bytes)
{
	struct array_3d_descriptor array = {};
	struct array_descriptor flat = {};
	u64 size = 0, location;

	switch (call) {
	case CUDA_ALLOC:
		size = ARG2(ctx);
		break;
	case CUDA_ALLOC_PITCH: /* (pointer *, pitch *, width, height, ...) */
		size = (ARG3(ctx) + PITCH_BYTES - 1) / PITCH_BYTES * PITCH_BYTES * ARG4(ctx);
		break;
	case CUDA_CREATE: /* (handle *, size, properties *, flags) */
		size = ARG2(ctx);
		location = 0;
		/* CUmemAllocationProp: type, requestedHandleTypes, location.type */
		bpf_copy_from_user(&location, 4, (void *)ARG3(ctx) + 8);
		if (location >= LOCATION_HOST)
			return false;
		break;
	case CUDA_ARRAY:
		bpf_copy_from_user(&flat, sizeof(flat), (void *)ARG2(ctx));
		array.width = flat.width;
		array.height = flat.height;
		array.format = flat.format;
		array.channels = flat.channels;
		size = array_bytes(&array, 0);
		break;
	case CUDA_ARRAY_3D:
		bpf_copy_from_user(&array, sizeof(array), (void *)ARG2(ctx));
		size = array_bytes(&array, 0);
		break;
	case CUDA_MIPMAP: { /* (handle *, descriptor *, levels) */
		u32 levels = ARG3(ctx);

		bpf_copy_from_user(&array, sizeof(array), (void *)ARG2(ctx));
		for (u32 level = 0; level < 32 && level < levels; level++)
			size += array_bytes(&array, level);
		break;
	}
	default:
		return false;
	}
	*size_bytes = grain(size);
	return size > 0;
}

/* Forget a handle that was noted, and what it held. */
static __always_inline void give_back(struct pending *pending, struct vram_allocation *allocation)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &pending->account);

	charge(pending->account, pending->process, pending->start_ns, -allocation->size_bytes);
	add_to_context(pending, allocation->context, -allocation->size_bytes);
	if (account)
		__sync_fetch_and_add(&account->frees, 1);
}

/* Whether a noted handle's context is still there: what it held went with it otherwise. */
static __always_inline bool is_alive(struct pending *pending, u64 context)
{
	struct vram_key key;

	if (!context)
		return true;
	key_of(&key, pending, context, CUDA_CTX_CREATE);
	return bpf_map_lookup_elem(&contexts, &key);
}

/* Note a handle that was given out. */
static __always_inline void note(struct pending *pending, u64 handle)
{
	struct vram_allocation fresh = { .size_bytes = pending->size_bytes, .refs = 1 };
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &pending->account);
	struct vram_allocation *old;
	struct vram_key key;

	key_of(&key, pending, handle, kind_of(pending->call));
	/* Physical memory is no context's. */
	if (key.kind != CUDA_CREATE)
		fresh.context = context_of_thread();
	old = bpf_map_lookup_elem(&allocations, &key);
	/* One whose end was not seen: it cannot be there any more. */
	if (old && is_alive(pending, old->context))
		give_back(pending, old);
	if (bpf_map_update_elem(&allocations, &key, &fresh, BPF_ANY)) {
		if (account)
			__sync_fetch_and_add(&account->untracked, 1);
		return;
	}
	add_to_context(pending, fresh.context, fresh.size_bytes);
	if (account)
		__sync_fetch_and_add(&account->allocations, 1);
}

/* One reference of physical memory less; the last one gives it back. */
static __always_inline void drop(struct pending *pending, u64 handle)
{
	struct vram_allocation *allocation, copy;
	struct vram_key key;

	key_of(&key, pending, handle, CUDA_CREATE);
	allocation = bpf_map_lookup_elem(&allocations, &key);
	if (!allocation || __sync_fetch_and_add(&allocation->refs, -1) != 1)
		return;
	copy = *allocation;
	if (!bpf_map_delete_elem(&allocations, &key))
		give_back(pending, &copy);
}

struct unmap {
	struct pending *pending;
	u64 at, end;
};

static long unmap_one(u64 index, struct unmap *range)
{
	struct pending pending = *range->pending;
	struct mapping *mapping, copy;
	struct vram_key key;

	if (range->at >= range->end)
		return 1;
	key_of(&key, &pending, range->at, CUDA_MAP);
	mapping = bpf_map_lookup_elem(&mappings, &key);
	if (!mapping || !mapping->size_bytes)
		return 1;
	copy = *mapping;
	if (!bpf_map_delete_elem(&mappings, &key))
		drop(&pending, copy.handle);
	range->at += copy.size_bytes;
	return 0;
}

static __always_inline void set_context(u64 context, bool push)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct context_stack *stack = bpf_map_lookup_elem(&threads, &thread);
	u32 top;

	if (!stack) {
		bpf_map_update_elem(&threads, &thread, &no_contexts, BPF_NOEXIST);
		stack = bpf_map_lookup_elem(&threads, &thread);
		if (!stack)
			return;
	}
	if (push || !stack->depth) {
		if (stack->depth < STACK_DEPTH)
			stack->depth++;
	}
	top = stack->depth - 1;
	if (top < STACK_DEPTH)
		stack->context[top] = context;
}

static __always_inline void pop_context(void)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct context_stack *stack = bpf_map_lookup_elem(&threads, &thread);

	if (stack && stack->depth)
		stack->depth--;
}

/* All that a context held is gone with it. */
static __always_inline void end_context(struct pending *pending, u64 context)
{
	struct vram_key key;
	u64 *held, size;

	key_of(&key, pending, context, CUDA_CTX_CREATE);
	held = bpf_map_lookup_elem(&contexts, &key);
	if (!held)
		return;
	size = *held;
	if (!bpf_map_delete_elem(&contexts, &key))
		charge(pending->account, pending->process, pending->start_ns, -size);
}

/* The allocation of a pointer or array that is to be freed, taken out before the driver can give
 * the handle to another thread. */
static __always_inline void take(struct pending *pending, u64 handle)
{
	struct vram_allocation *allocation;
	struct vram_key key;

	key_of(&key, pending, handle, kind_of(pending->call));
	allocation = bpf_map_lookup_elem(&allocations, &key);
	if (!allocation)
		return;
	pending->taken = *allocation;
	pending->has_taken = !bpf_map_delete_elem(&allocations, &key);
}

static __always_inline void untake(struct pending *pending, u64 handle)
{
	struct vram_key key;

	key_of(&key, pending, handle, kind_of(pending->call));
	bpf_map_update_elem(&allocations, &key, &pending->taken, BPF_NOEXIST);
}

/**
 * enter - a function of libcuda begins
 * @ctx: registers
 * @call: which
 * @may_refuse: this kernel lets it be left out
 * @serial_id: set to where what is known of it is kept until it returns
 *
 * Return: 0: see it return; 1: it is of no interest; 2: leave it out, it is out of memory.
 */
static __always_inline int enter(struct pt_regs *ctx, u32 call, bool may_refuse, u64 *serial_id)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pending pending = { .call = call };
	struct vram_account *account;
	struct vram_process *process;
	struct vram_quota *quota;
	u64 before, quota_bytes;

	quota = find_quota(task, &pending.account);
	if (!quota)
		return 1;
	account = account_of(pending.account);
	process = process_of(task, pending.account);
	if (!account || !process)
		return 1;
	if (process->account != pending.account) { /* it has been moved since it began */
		pending.account = process->account;
		quota = bpf_map_lookup_elem(&quotas, &pending.account);
		account = bpf_map_lookup_elem(&accounts, &pending.account);
		if (!quota || !account)
			return 1;
	}
	pending.process = task->tgid;
	pending.start_ns = process->start_ns;
	pending.out = pending.first = ARG1(ctx);
	pending.second = ARG2(ctx);
	pending.fourth = ARG4(ctx);
	switch (call) {
	case CUDA_FREE:
	case CUDA_ARRAY_DESTROY:
	case CUDA_MIPMAP_DESTROY:
		take(&pending, pending.first);
		break;
	case CUDA_MAP:
	case CUDA_PRIMARY_RETAIN:
	case CUDA_RELEASE:
	case CUDA_UNMAP:
	case CUDA_RETAIN:
	case CUDA_CTX_CREATE:
	case CUDA_CTX_SET:
	case CUDA_CTX_PUSH:
	case CUDA_CTX_POP:
	case CUDA_CTX_DESTROY:
	case CUDA_PRIMARY_RESET:
		break;
	default:
		if (!size_of(call, ctx, &pending.size_bytes))
			return 1;
		quota_bytes = quota->quota_bytes;
		before = charge(pending.account, pending.process, pending.start_ns,
				pending.size_bytes);
		/* Compared so that a size near the end of the range does not wrap around. */
		if (quota_bytes == NO_QUOTA ||
		    (before <= quota_bytes && pending.size_bytes <= quota_bytes - before))
			break;
		if (!may_refuse) {
			__sync_fetch_and_add(&account->over, 1);
			tell(account, pending.account, pending.size_bytes, quota_bytes,
			     GPU_EVENT_MEMORY, 0);
			break;
		}
		charge(pending.account, pending.process, pending.start_ns, -pending.size_bytes);
		__sync_fetch_and_add(&account->refused, 1);
		__sync_fetch_and_add(&account->refused_bytes, pending.size_bytes);
		tell(account, pending.account, pending.size_bytes, quota_bytes, GPU_EVENT_MEMORY,
		     1);
		return 2;
	}
	*serial_id = __sync_fetch_and_add(&serial, 1) + 1;
	bpf_map_update_elem(&pendings, serial_id, &pending, BPF_ANY);
	return 0;
}

/* An allocation has come back. */
static __always_inline void allocated(struct pending *pending, u32 result)
{
	u64 handle = 0, pitch = 0, real;

	if (result != CUDA_SUCCESS) {
		charge(pending->account, pending->process, pending->start_ns, -pending->size_bytes);
		return;
	}
	if (bpf_copy_from_user(&handle, sizeof(handle), (void *)pending->out)) {
		struct vram_account *account = bpf_map_lookup_elem(&accounts, &pending->account);

		if (account)
			__sync_fetch_and_add(&account->untracked, 1);
		return;
	}
	if (pending->call == CUDA_ALLOC_PITCH &&
	    !bpf_copy_from_user(&pitch, sizeof(pitch), (void *)pending->second)) {
		real = grain(pitch * pending->fourth); /* the height */
		if (real > pending->size_bytes) {
			charge(pending->account, pending->process, pending->start_ns,
			       real - pending->size_bytes);
			pending->size_bytes = real;
		}
	}
	note(pending, handle);
}

static __always_inline void mapped(struct pending *pending)
{
	struct mapping mapping = { pending->second, pending->fourth };
	struct vram_allocation *allocation;
	struct vram_key key;

	key_of(&key, pending, mapping.handle, CUDA_CREATE);
	allocation = bpf_map_lookup_elem(&allocations, &key);
	if (!allocation)
		return;
	__sync_fetch_and_add(&allocation->refs, 1);
	key_of(&key, pending, pending->first, CUDA_MAP);
	bpf_map_update_elem(&mappings, &key, &mapping, BPF_ANY);
}

static __always_inline void retained(struct pending *pending)
{
	struct vram_allocation *allocation;
	struct vram_key key;
	u64 handle = 0;

	if (bpf_copy_from_user(&handle, sizeof(handle), (void *)pending->out))
		return;
	key_of(&key, pending, handle, CUDA_CREATE);
	allocation = bpf_map_lookup_elem(&allocations, &key);
	if (allocation)
		__sync_fetch_and_add(&allocation->refs, 1);
}

static __always_inline void left(struct pending *pending, u32 result)
{
	struct vram_key key;
	u64 context = 0, *primary;

	if (pending->has_taken) {
		if (result != CUDA_SUCCESS)
			untake(pending, pending->first);
		else if (is_alive(pending, pending->taken.context))
			give_back(pending, &pending->taken);
		return;
	}
	if (result != CUDA_SUCCESS)
		return;
	switch (pending->call) {
	case CUDA_RELEASE:
		drop(pending, pending->first);
		break;
	case CUDA_MAP:
		mapped(pending);
		break;
	case CUDA_RETAIN:
		retained(pending);
		break;
	case CUDA_UNMAP: {
		struct unmap range = { pending, pending->first, pending->first + pending->second };

		bpf_loop(MAPPINGS_MAX, unmap_one, &range, 0);
		break;
	}
	case CUDA_CTX_CREATE:
		if (!bpf_copy_from_user(&context, sizeof(context), (void *)pending->out))
			set_context(context, true);
		break;
	case CUDA_CTX_SET:
		set_context(pending->first, false);
		break;
	case CUDA_CTX_PUSH:
		set_context(pending->first, true);
		break;
	case CUDA_CTX_POP:
		pop_context();
		break;
	case CUDA_CTX_DESTROY:
		end_context(pending, pending->first);
		break;
	case CUDA_PRIMARY_RETAIN: /* (context *, device) */
		if (bpf_copy_from_user(&context, sizeof(context), (void *)pending->out))
			break;
		key_of(&key, pending, pending->second, CUDA_PRIMARY_RETAIN);
		bpf_map_update_elem(&primaries, &key, &context, BPF_ANY);
		break;
	case CUDA_PRIMARY_RESET: /* (device) */
		key_of(&key, pending, pending->first, CUDA_PRIMARY_RETAIN);
		primary = bpf_map_lookup_elem(&primaries, &key);
		if (primary)
			end_context(pending, *primary);
		break;
	}
}

static __always_inline void leave(struct pt_regs *ctx, u64 id)
{
	struct pending *found = bpf_map_lookup_elem(&pendings, &id), pending;
	u32 result = RESULT(ctx);

	if (!found)
		return;
	pending = *found;
	bpf_map_delete_elem(&pendings, &id);
	if (pending.size_bytes)
		allocated(&pending, result);
	else
		left(&pending, result);
}

/* Makes the function return without having been entered. False: its caller is not to be seen. */
static __always_inline bool leave_out(struct pt_regs *ctx)
{
#ifdef __TARGET_ARCH_x86
	u64 stack = ctx->sp, caller = 0;

	if (bpf_copy_from_user(&caller, sizeof(caller), (void *)stack))
		return false;
	ctx->ax = CUDA_ERROR_OUT_OF_MEMORY;
	ctx->sp = stack + sizeof(caller);
	ctx->ip = caller;
#else
	u64 caller = ctx->regs[30];

	ctx->regs[0] = CUDA_ERROR_OUT_OF_MEMORY;
	ctx->pc = caller;
#endif
	return true;
}

SEC("uprobe.multi.s")
int on_cuda(struct pt_regs *ctx)
{
	u64 *kept = session_cookie(ctx), id = 0;
	int result;

	if (is_return(ctx)) {
		if (*kept)
			leave(ctx, *kept);
		return 0;
	}
	result = enter(ctx, bpf_get_attach_cookie(ctx), true, &id);
	if (result == 2) {
		leave_out(ctx);
		return 1;
	}
	*kept = id;
	return result;
}

/* The same where a probe may not write registers: what is over the quota is told, not refused. */
SEC("uprobe.multi.s")
int on_cuda_seen(struct pt_regs *ctx)
{
	u64 *kept = session_cookie(ctx), id = 0;
	int result;

	if (is_return(ctx)) {
		if (*kept)
			leave(ctx, *kept);
		return 0;
	}
	result = enter(ctx, bpf_get_attach_cookie(ctx), false, &id);
	*kept = id;
	return result ? 1 : 0;
}

/* Work is given to the GPU; told once each time that it is asked for. */
SEC("uprobe.multi")
int on_launch(struct pt_regs *ctx)
{
	struct vram_account *account;
	struct vram_quota *quota;
	u64 id;

	quota = find_quota(bpf_get_current_task_btf(), &id);
	if (!quota)
		return 0;
	account = account_of(id);
	if (!account)
		return 0;
	__sync_fetch_and_add(&account->launches, 1);
	if (quota->watch && __sync_lock_test_and_set(&quota->watch, 0))
		tell(account, id, 0, quota->quota_bytes, GPU_EVENT_ACTIVE, 0);
	return 0;
}

/* A process that has ended holds nothing. What is left of its handles the daemon removes. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_end, struct task_struct *task)
{
	u64 tgid = task->tgid, start_ns = task->group_leader->start_boottime, used;
	struct vram_process *process;
	struct vram_account *account;

	if (task->signal->live.counter)
		return 0;
	process = bpf_map_lookup_elem(&processes, &tgid);
	if (!process || process->start_ns != start_ns)
		return 0;
	used = process->used_bytes;
	account = bpf_map_lookup_elem(&accounts, &process->account);
	if (!bpf_map_delete_elem(&processes, &tgid) && account)
		__sync_fetch_and_add(&account->used_bytes, -used);
	return 0;
}
