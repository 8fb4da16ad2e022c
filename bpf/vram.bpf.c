// SPDX-License-Identifier: GPL-2.0
/*
 * GPU memory of calls: probes on the functions of libcuda, which the probe's cookie (enum
 * cuda_call) tells apart. A size is taken from the quota before the driver is entered, and given
 * back if the driver fails, so that threads that ask at the same time cannot go over the quota
 * together. Over the quota the function returns CUDA_ERROR_OUT_OF_MEMORY without being entered, on
 * kernels that let a probe do that (Linux 6.19).
 *
 * The same program runs at the start and at the end of a function (a session, Linux 6.13). An
 * ordinary return probe would not do: it replaces the return address, which a function that is not
 * entered needs as it is.
 *
 * Memory whose handle cannot be noted for want of room stays in the account until its process ends.
 * What cannot be accounted for at all is refused where a quota holds.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

#define CUDA_SUCCESS		 0
#define CUDA_ERROR_OUT_OF_MEMORY 2
#define LOCATION_HOST		 2 /* CU_MEM_LOCATION_TYPE_HOST; those above are the host's too */
#define HANDLES_MAX		 (1 << 20)
#define ARRAY3D_LAYERED		 0x1
#define ARRAY3D_CUBEMAP		 0x4
#define ARRAY3D_SPARSE		 0x40
#define PITCH_BYTES		 512
#define MAPPINGS_MAX		 65536
#define TOLD_GAP_NS		 100000000UL
#define NO_QUOTA		 (~0UL)
#define NOT_OURS		 0UL /* see enter() */
#define REFUSED			 (~0UL)
#define NOT_CHARGED		 (~0UL)
#define EEXIST			 17
#define TRIES			 16

#ifdef __TARGET_ARCH_x86
#define ARG1(r)	  ((r)->di)
#define ARG2(r)	  ((r)->si)
#define ARG3(r)	  ((r)->dx)
#define ARG4(r)	  ((r)->cx)
#define RESULT(r) ((r)->ax)
#else
#define ARG1(r)	  ((r)->regs[0])
#define ARG2(r)	  ((r)->regs[1])
#define ARG3(r)	  ((r)->regs[2])
#define ARG4(r)	  ((r)->regs[3])
#define RESULT(r) ((r)->regs[0])
#endif

/* The kfuncs of a session took no argument before Linux 7.0: the flavors of that name are those. */
extern bool bpf_session_is_return(void *ctx) __ksym __weak;
extern bool bpf_session_is_return___v1(void) __ksym __weak;
extern __u64 *bpf_session_cookie(void *ctx) __ksym __weak;
extern __u64 *bpf_session_cookie___v1(void) __ksym __weak;

/* CUDA_ARRAY_DESCRIPTOR and CUDA_ARRAY3D_DESCRIPTOR of cuda.h. */
struct array_descriptor {
	u64 width, height;
	u32 format, channels;
};

struct array_3d_descriptor {
	u64 width, height, depth;
	u32 format, channels, flags, unused;
};

ID_MAP(quotas, struct vram_quota);
ID_MAP(accounts, struct vram_account);
ID_MAP(processes, struct vram_process);
HASH_MAP(allocations, HANDLES_MAX, struct vram_key, struct vram_allocation);

/* A range to which physical memory is mapped, by its start; `kind` of the key is CUDA_MAP. */
struct mapping {
	u64 size_bytes;
	u64 handle;
};

HASH_MAP(mappings, HANDLES_MAX, struct vram_key, struct mapping);

/* Memory that a context holds; `kind` of the key is CUDA_CTX_CREATE. */
struct holding {
	u64 used_bytes;
	u64 serial; /* tells it from a later context at the same address */
};

HASH_MAP(contexts, 65536, struct vram_key, struct holding);

/* A device's primary context; `kind` of the key is CUDA_PRIMARY_RETAIN. */
HASH_MAP(primaries, 65536, struct vram_key, u64);

/* Current contexts of a thread, by (tgid << 32 | tid); the last one is in use. */
#define STACK_DEPTH 8
struct context_stack {
	u64 context[STACK_DEPTH];
	u32 depth;
	u32 reserved;
};

LRU_MAP(threads, 65536, struct context_stack);

/* A call of a function of libcuda that has not returned yet. */
struct pending {
	u64 account; /* cgroup id */
	u64 process; /* tgid */
	u64 start_ns;
	u64 size_bytes; /* taken from the quota */
	u64 out;	/* address to which the function will write the handle */
	u64 first;	/* arguments, by function */
	u64 second;
	u64 fourth;
	struct vram_allocation taken; /* what is about to be freed, if has_taken */
	u32 call;		      /* enum cuda_call */
	u32 has_taken;
};

LRU_MAP(pendings, 65536, struct pending);

RING_BUFFER(events, 256 << 10);

const volatile __u32 may_refuse = 1; /* set before the load: whether a probe may write registers */

u64 serial; /* the last number that was given to a context or a pending function */

static const struct context_stack no_contexts;
static const struct vram_account no_account;

/* Whether a session's program runs at the end of the function, not at its start. */
static __always_inline bool is_return(void *ctx)
{
	if (bpf_ksym_exists(bpf_session_is_return___v1))
		return bpf_session_is_return___v1();
	return bpf_session_is_return(ctx);
}

/* A word that the program at the start leaves for the one at the end. */
static __always_inline u64 *session_cookie(void *ctx)
{
	if (bpf_ksym_exists(bpf_session_cookie___v1))
		return bpf_session_cookie___v1();
	return bpf_session_cookie(ctx);
}

/*
 * The verifier checks a function that is not static once, on its own. If these were inlined into
 * one another, there would be more paths than it is willing to follow.
 */

/**
 * quota_id - the cgroup whose quota holds for the current task
 *
 * Return: its id: that of the task's cgroup, or of the nearest one above it with a quota; 0: the
 * task is not accounted.
 */
__noinline u64 quota_id(void)
{
	struct cgroup *cgroup = task_cgroup(bpf_get_current_task_btf());
	struct cgroup_subsys_state *css = &cgroup->self;
	int level = cgroup->level;
	u64 id = cgroup_id(cgroup);

	for (int i = 1; i <= ABI_DEPTH_MAX; i++) {
		if (bpf_map_lookup_elem(&quotas, &id))
			return id;
		if (i >= level)
			break;
		css = css->parent;
		id = cgroup_id(css->cgroup);
	}
	return 0;
}

/**
 * put - write an entry of a map
 * @map, @key, @value, @flags: as for bpf_map_update_elem()
 *
 * A map refuses an update not only for want of room. The kernel's allocator for maps has a few
 * elements on each CPU, and gets more in an interrupt (kernel/bpf/memalloc.c); a bucket's lock is
 * given up when it cannot be had soon (kernel/bpf/hashtab.c). Both pass in a moment.
 *
 * Return: 0, or the error of the last try.
 */
static __always_inline long put(void *map, const void *key, const void *value, u64 flags)
{
	long error = 0;

	for (int i = 0; i < TRIES; i++) {
		error = bpf_map_update_elem(map, key, value, flags);
		if (!error || error == -EEXIST)
			break;
	}
	return error;
}

/* The account of a cgroup, which is made on first use; NULL: there is no room. */
static __always_inline struct vram_account *account_of(u64 id)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &id);

	if (account)
		return account;
	put(&accounts, &id, &no_account, BPF_NOEXIST);
	return bpf_map_lookup_elem(&accounts, &id);
}

/**
 * process_of - the entry of a process, which is made on first use
 * @task: any thread of the process
 * @account: cgroup id of its account, if the entry is made now; an older entry keeps its account
 *
 * Return: the entry; NULL: there is no room.
 */
static __always_inline struct vram_process *process_of(struct task_struct *task, u64 account)
{
	u64 tgid = task->tgid, start_ns = task->group_leader->start_boottime;
	struct vram_process *process = bpf_map_lookup_elem(&processes, &tgid);
	struct vram_process fresh = { .start_ns = start_ns, .account = account };

	if (process && process->start_ns == start_ns)
		return process;
	/* What another thread of the process has just made stays; an entry of a process that had
	 * this pid before does not. */
	put(&processes, &tgid, &fresh, process ? BPF_ANY : BPF_NOEXIST);
	return bpf_map_lookup_elem(&processes, &tgid);
}

/* Fill in the key of a handle that a function's process has. */
static __always_inline void key_of(struct vram_key *key, struct pending *pending, u64 handle,
				   u32 kind)
{
	key->start_ns = pending->start_ns;
	key->handle = handle;
	key->tgid = pending->process;
	key->kind = kind;
}

/* The kind of handle that a function (enum cuda_call) gives out or takes, for its key. */
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

/* The current context of the current thread; 0: none is known. */
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

/* The entry of a context, which is made on first use; NULL: no context, or no room. */
static __always_inline struct holding *holding_of(struct pending *pending, u64 context)
{
	struct holding fresh = { 0, __sync_fetch_and_add(&serial, 1) + 1 }, *found;
	struct vram_key key;

	if (!context)
		return NULL;
	key_of(&key, pending, context, CUDA_CTX_CREATE);
	found = bpf_map_lookup_elem(&contexts, &key);
	if (found)
		return found;
	put(&contexts, &key, &fresh, BPF_NOEXIST);
	return bpf_map_lookup_elem(&contexts, &key);
}

/* The entry of the context of a noted handle; NULL: the context is gone, or was never known. */
static __always_inline struct holding *holding_with(struct pending *pending,
						    struct vram_allocation *allocation)
{
	struct holding *found;
	struct vram_key key;

	if (!allocation->context)
		return NULL;
	key_of(&key, pending, allocation->context, CUDA_CTX_CREATE);
	found = bpf_map_lookup_elem(&contexts, &key);
	return found && found->serial == allocation->context_serial ? found : NULL;
}

/**
 * charge - add to what a process and its account use
 * @id: cgroup id of the account
 * @tgid, @start_ns: the process
 * @size_bytes: how much; negative: to take away
 *
 * Return: use of the account before, in bytes; NOT_CHARGED, and nothing is added, if the account or
 * the process is not known any more.
 */
static __always_inline u64 charge(u64 id, u64 tgid, u64 start_ns, s64 size_bytes)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &id);
	struct vram_process *process = bpf_map_lookup_elem(&processes, &tgid);
	u64 before;

	if (!account || !process || process->start_ns != start_ns)
		return NOT_CHARGED;
	__sync_fetch_and_add(&process->used_bytes, size_bytes);
	before = __sync_fetch_and_add(&account->used_bytes, size_bytes);
	return before;
}

/* Raise an account's peak to its use. After eight lost races the peak stays a little too low. */
static __always_inline void raise_peak(struct vram_account *account, u64 used_bytes)
{
	u64 peak = account->peak_bytes;

	for (int i = 0; i < 8 && used_bytes > peak; i++) {
		u64 seen = __sync_val_compare_and_swap(&account->peak_bytes, peak, used_bytes);

		if (seen == peak)
			break;
		peak = seen;
	}
}

/**
 * tell - send an event about an account
 * @account: the account
 * @id: its cgroup id
 * @size_bytes: the request, for GPU_EVENT_MEMORY
 * @quota_bytes: its quota
 * @type: GPU_EVENT_MEMORY, at most one in TOLD_GAP_NS; or GPU_EVENT_ACTIVE
 * @refused: 1: the request was refused
 */
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

/* Size of a component of an array, by CUarray_format of cuda.h. */
static __always_inline u64 bytes_of_format(u32 format)
{
	switch (format) {
	case 0x01: /* CU_AD_FORMAT_UNSIGNED_INT8 */
	case 0x08:
		return 1;
	case 0x02:
	case 0x09:
	case 0x10: /* CU_AD_FORMAT_HALF */
		return 2;
	}
	return 4; /* 32 bits; packed formats, which are not told apart here, count the same */
}

static __always_inline u64 at_least_one(u64 number)
{
	return number ? number : 1;
}

/* Size of a mip level of an array; 0: a sparse array, which takes no memory by itself. */
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

struct levels {
	struct array_3d_descriptor array;
	u64 size_bytes;
};

static long add_level(u64 level, struct levels *levels)
{
	struct array_3d_descriptor array = levels->array;

	levels->size_bytes += array_bytes(&array, level & 31);
	return 0;
}

/* A size, rounded up to what an allocation takes. */
static __always_inline u64 grain(u64 size_bytes)
{
	return (size_bytes + ABI_VRAM_GRAIN_BYTES - 1) & ~((u64)ABI_VRAM_GRAIN_BYTES - 1);
}

/**
 * size_of - how much of the GPU's memory a function will take
 * @call: the function, enum cuda_call
 * @second, @third, @fourth: its arguments
 *
 * Return: size in bytes; 0: it takes none.
 */
__noinline u64 size_of(u32 call, u64 second, u64 third, u64 fourth)
{
	struct array_descriptor flat = {};
	struct levels levels = {};
	u32 location = 0, count;

	switch (call) {
	case CUDA_ALLOC:
		return grain(second);
	case CUDA_ALLOC_PITCH: /* (pointer *, pitch *, width, height, ...) */
		return (third + PITCH_BYTES - 1) / PITCH_BYTES * PITCH_BYTES * fourth;
	case CUDA_CREATE: /* (handle *, size, properties *, flags) */
		/* CUmemAllocationProp: type, requestedHandleTypes, location.type */
		bpf_copy_from_user(&location, sizeof(location), (void *)third + 8);
		return location >= LOCATION_HOST ? 0 : grain(second);
	case CUDA_ARRAY:
		bpf_copy_from_user(&flat, sizeof(flat), (void *)second);
		levels.array.width = flat.width;
		levels.array.height = flat.height;
		levels.array.format = flat.format;
		levels.array.channels = flat.channels;
		return grain(array_bytes(&levels.array, 0));
	case CUDA_ARRAY_3D:
		bpf_copy_from_user(&levels.array, sizeof(levels.array), (void *)second);
		return grain(array_bytes(&levels.array, 0));
	case CUDA_MIPMAP: /* (handle *, descriptor *, levels) */
		count = third;
		bpf_copy_from_user(&levels.array, sizeof(levels.array), (void *)second);
		bpf_loop(count < 32 ? count : 32, add_level, &levels, 0);
		return grain(levels.size_bytes);
	}
	return 0;
}

/**
 * give_back - take the memory of a handle from its account
 * @pending: the function of whose process the handle is
 * @allocation: the handle's entry, which has left the map or is about to be replaced
 *
 * If the handle's context has ended, its memory was given back with the context.
 */
static __always_inline void give_back(struct pending *pending, struct vram_allocation *allocation)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &pending->account);
	struct holding *holding = holding_with(pending, allocation);

	if (allocation->context && !holding)
		return;
	if (holding)
		__sync_fetch_and_add(&holding->used_bytes, -allocation->size_bytes);
	charge(pending->account, pending->process, pending->start_ns, -allocation->size_bytes);
	if (account)
		__sync_fetch_and_add(&account->frees, 1);
}

/**
 * note - note a handle that a function has given out
 * @pending: the function, whose size_bytes are in the account already
 * @handle: the handle
 *
 * Without room for the handle the memory stays in the account, and `untracked` counts it.
 */
static __always_inline void note(struct pending *pending, u64 handle)
{
	struct vram_allocation fresh = { .size_bytes = pending->size_bytes, .refs = 1 };
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &pending->account);
	struct holding *holding = NULL;
	struct vram_allocation *old;
	struct vram_key key;

	key_of(&key, pending, handle, kind_of(pending->call));
	/* Physical memory belongs to no context. */
	if (key.kind != CUDA_CREATE)
		holding = holding_of(pending, context_of_thread());
	if (holding) {
		fresh.context = context_of_thread();
		fresh.context_serial = holding->serial;
	}
	old = bpf_map_lookup_elem(&allocations, &key);
	if (old) /* a handle whose end was not seen, since the driver gives it out again */
		give_back(pending, old);
	if (put(&allocations, &key, &fresh, BPF_ANY)) {
		if (account)
			__sync_fetch_and_add(&account->untracked, 1);
		return;
	}
	if (holding)
		__sync_fetch_and_add(&holding->used_bytes, fresh.size_bytes);
	if (account)
		__sync_fetch_and_add(&account->allocations, 1);
}

/* Drop a reference to physical memory (its handle, or a mapping); the last one gives it back. */
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

/* The rest of a range that is being unmapped, for bpf_loop(). */
struct unmap {
	struct pending *pending;
	u64 at, end;
};

/* Unmap the mapping at the start of the rest. Returns 1 if there is none, or no rest. */
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

/* Make a context the current thread's: on top of the others (push), or in place of the top one. */
static __always_inline void set_context(u64 context, bool push)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct context_stack *stack = bpf_map_lookup_elem(&threads, &thread);
	u32 top;

	if (!stack) {
		put(&threads, &thread, &no_contexts, BPF_NOEXIST);
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

/* Drop the top one of the current thread's contexts. */
static __always_inline void pop_context(void)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct context_stack *stack = bpf_map_lookup_elem(&threads, &thread);

	if (stack && stack->depth)
		stack->depth--;
}

/* Give back all memory of a context that has ended. */
static __always_inline void end_context(struct pending *pending, u64 context)
{
	struct holding *found, copy;
	struct vram_key key;

	key_of(&key, pending, context, CUDA_CTX_CREATE);
	found = bpf_map_lookup_elem(&contexts, &key);
	if (!found)
		return;
	copy = *found;
	if (!bpf_map_delete_elem(&contexts, &key))
		charge(pending->account, pending->process, pending->start_ns, -copy.used_bytes);
}

/**
 * take - take the entry of a handle that is about to be freed out of the map
 * @pending: the function, which keeps the entry until it returns
 * @handle: the handle
 *
 * After the driver has freed it, another thread may get the same handle at once.
 */
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

/* Put the entry back: the driver did not free the handle. */
static __always_inline void untake(struct pending *pending, u64 handle)
{
	struct vram_key key;

	key_of(&key, pending, handle, kind_of(pending->call));
	put(&allocations, &key, &pending->taken, BPF_NOEXIST);
}

/**
 * unaccounted - what becomes of a function that cannot be accounted for
 * @call: the function, enum cuda_call
 * @id: the cgroup whose quota holds
 *
 * Return: REFUSED: it allocates, and there is a quota that it could go over; else NOT_OURS.
 */
static __always_inline u64 unaccounted(u32 call, u64 id)
{
	struct vram_account *account = bpf_map_lookup_elem(&accounts, &id);
	struct vram_quota *quota = bpf_map_lookup_elem(&quotas, &id);

	if (call > CUDA_MIPMAP || !quota || quota->quota_bytes == NO_QUOTA)
		return NOT_OURS;
	if (account)
		__sync_fetch_and_add(may_refuse ? &account->refused : &account->over, 1);
	return may_refuse ? REFUSED : NOT_OURS;
}

/**
 * enter - account for a function of libcuda that begins
 * @call: the function, enum cuda_call
 * @first, @second, @third, @fourth: its arguments
 *
 * Return: the number of its entry in `pendings`, for leave(); NOT_OURS: the function need not be
 * seen returning; REFUSED: it goes over the quota, and is not to be entered.
 */
__noinline u64 enter(u32 call, u64 first, u64 second, u64 third, u64 fourth)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pending pending = { .call = call };
	struct vram_account *account;
	struct vram_process *process;
	struct vram_quota *quota;
	u64 before, quota_bytes, id;

	pending.account = quota_id();
	if (!pending.account)
		return NOT_OURS;
	if (!account_of(pending.account))
		return unaccounted(call, pending.account);
	process = process_of(task, pending.account);
	if (!process)
		return unaccounted(call, pending.account);
	/* Not the account found above, if the process has been moved since its first allocation. */
	pending.account = process->account;
	pending.process = task->tgid;
	pending.start_ns = process->start_ns;
	quota = bpf_map_lookup_elem(&quotas, &pending.account);
	account = bpf_map_lookup_elem(&accounts, &pending.account);
	if (!quota || !account)
		return unaccounted(call, pending.account);
	pending.out = pending.first = first;
	pending.second = second;
	pending.fourth = fourth;
	if (call == CUDA_FREE || call == CUDA_ARRAY_DESTROY || call == CUDA_MIPMAP_DESTROY)
		take(&pending, first);
	if (call <= CUDA_MIPMAP) {
		pending.size_bytes = size_of(call, second, third, fourth);
		if (!pending.size_bytes)
			return NOT_OURS;
		quota_bytes = quota->quota_bytes;
		before = charge(pending.account, pending.process, pending.start_ns,
				pending.size_bytes);
		if (before == NOT_CHARGED)
			return unaccounted(call, pending.account);
		/* A sum of the two could wrap around for a size near the end of the range. */
		if (quota_bytes != NO_QUOTA &&
		    (before > quota_bytes || pending.size_bytes > quota_bytes - before)) {
			tell(account, pending.account, pending.size_bytes, quota_bytes,
			     GPU_EVENT_MEMORY, may_refuse);
			if (may_refuse) {
				charge(pending.account, pending.process, pending.start_ns,
				       -pending.size_bytes);
				__sync_fetch_and_add(&account->refused, 1);
				__sync_fetch_and_add(&account->refused_bytes, pending.size_bytes);
				return REFUSED;
			}
			__sync_fetch_and_add(&account->over, 1);
		}
		raise_peak(account, before + pending.size_bytes);
	}
	id = __sync_fetch_and_add(&serial, 1) + 1;
	put(&pendings, &id, &pending, BPF_ANY);
	return id;
}

/**
 * allocated - account for the return of a function that allocates
 * @pending: the function
 * @result: its CUresult: a failure gives the size back
 */
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
		real = grain(pitch * pending->fourth); /* times the height */
		if (real > pending->size_bytes) {
			charge(pending->account, pending->process, pending->start_ns,
			       real - pending->size_bytes);
			pending->size_bytes = real;
		}
	}
	note(pending, handle);
}

/* Note that physical memory was mapped: cuMemMap(address, size, offset, handle, flags). */
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
	put(&mappings, &key, &mapping, BPF_ANY);
}

/* Count a reference to physical memory more: cuMemRetainAllocationHandle(handle *, address). */
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

/**
 * left - account for the return of a function that does not allocate
 * @pending: the function
 * @result: its CUresult
 */
static __always_inline void left(struct pending *pending, u32 result)
{
	struct vram_key key;
	u64 context = 0, *primary;

	if (pending->has_taken) {
		if (result != CUDA_SUCCESS)
			untake(pending, pending->first);
		else
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
		if (context_of_thread() == pending->first)
			pop_context();
		break;
	case CUDA_PRIMARY_RETAIN: /* (context *, device) */
		if (bpf_copy_from_user(&context, sizeof(context), (void *)pending->out))
			break;
		key_of(&key, pending, pending->second, CUDA_PRIMARY_RETAIN);
		put(&primaries, &key, &context, BPF_ANY);
		break;
	case CUDA_PRIMARY_RESET: /* (device) */
		key_of(&key, pending, pending->first, CUDA_PRIMARY_RETAIN);
		primary = bpf_map_lookup_elem(&primaries, &key);
		if (primary)
			end_context(pending, *primary);
		break;
	}
}

/**
 * leave - account for a function of libcuda that returns
 * @id: the number from enter()
 * @result: its CUresult
 *
 * Return: 0.
 */
__noinline int leave(u64 id, u32 result)
{
	struct pending *found = bpf_map_lookup_elem(&pendings, &id), pending;

	if (!found)
		return 0;
	pending = *found;
	bpf_map_delete_elem(&pendings, &id);
	if (pending.size_bytes)
		allocated(&pending, result);
	else
		left(&pending, result);
	return 0;
}

/**
 * leave_out - return CUDA_ERROR_OUT_OF_MEMORY to the function's caller, without entering it
 * @ctx: registers at the function's start
 *
 * Return: false if the return address could not be read; the function runs then.
 */
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

/**
 * session - account for the start or the end of a function
 * @ctx: registers there
 *
 * Return: at the start, what enter() returned; at the end, NOT_OURS.
 */
static __always_inline u64 session(struct pt_regs *ctx)
{
	u64 *kept = session_cookie(ctx), id;

	if (is_return(ctx)) {
		if (*kept)
			leave(*kept, RESULT(ctx));
		return NOT_OURS;
	}
	id = enter(bpf_get_attach_cookie(ctx), ARG1(ctx), ARG2(ctx), ARG3(ctx), ARG4(ctx));
	*kept = id == REFUSED ? 0 : id;
	return id;
}

/* False; the compiler does not know that, the verifier does. */
const volatile bool never = false;

/**
 * keep_own_stack - have the kernel use a stack of the thread's own for this program
 * @ctx: the program's context
 *
 * From Linux 6.13 on, a function of a program of this type with 64 bytes of stack or more gets one
 * stack for each CPU (kernel/bpf/verifier.c: bpf_enable_priv_stack()). For other types, the same
 * program does not run twice at once on a CPU. A probe of user space does: it can be preempted, or
 * sleep, and then another thread runs it, and both write to the same stack. Seen in accounts: sizes
 * that were addresses, and memory given back that was not. A program with a tail call anywhere gets
 * no such stack. This one is never made, nor verified.
 */
static __always_inline void keep_own_stack(void *ctx)
{
	if (never)
		bpf_tail_call(ctx, NULL, 0);
}

/* Returns 1 if the kernel need not run this program at the function's end. */
SEC("uprobe.multi.s")
int on_cuda(struct pt_regs *ctx)
{
	u64 id = session(ctx);

	keep_own_stack(ctx);
	if (id == REFUSED)
		leave_out(ctx);
	return id == REFUSED || id == NOT_OURS;
}

/* For kernels where a probe may not write registers: what is over the quota is only reported. */
SEC("uprobe.multi.s")
int on_cuda_seen(struct pt_regs *ctx)
{
	keep_own_stack(ctx);
	return session(ctx) == NOT_OURS;
}

/* Runs when work is given to the GPU. Sends an event for the first work after `watch` was set. */
SEC("uprobe.multi")
int on_launch(struct pt_regs *ctx)
{
	struct vram_account *account;
	struct vram_quota *quota;
	u64 id;

	keep_own_stack(ctx);
	id = quota_id();
	quota = bpf_map_lookup_elem(&quotas, &id);
	account = id ? account_of(id) : NULL;
	if (!quota || !account)
		return 0;
	__sync_fetch_and_add(&account->launches, 1);
	if (quota->watch && __sync_lock_test_and_set(&quota->watch, 0))
		tell(account, id, 0, quota->quota_bytes, GPU_EVENT_ACTIVE, 0);
	return 0;
}

/* Gives back all memory of a process that ends. The daemon removes the entries of its handles. */
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
