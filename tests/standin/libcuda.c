// SPDX-License-Identifier: Apache-2.0
/*
 * A stand-in for libcuda: the driver's names and argument lists, with a table for a GPU. It hands
 * out handles, takes them back, and counts how often it was entered, so that a test can tell a
 * refusal by the kernel (not entered) from one by the driver. Handles are reused at once, newest
 * first, as an allocator's are.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { POINTER, MEMORY, ARRAY, MIPMAP, KINDS };
enum { SLOTS = 65536, PITCH = 512, CONTEXTS = 64 };

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

struct slot {
	size_t size;
	uint64_t context;
	unsigned int refs;
	int kind, live;
};

static struct slot slots[SLOTS];
static int free_slots[SLOTS], free_count = -1;
static uint64_t contexts[CONTEXTS], primary;
static __thread uint64_t stack[16];
static __thread int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used, total = (size_t)64 << 30;
static long entered;

struct mapping {
	CUdeviceptr at;
	size_t size;
	uint64_t handle;
};
static struct mapping mappings[SLOTS];
static int mapping_count;

long standin_entered(void)
{
	return entered;
}

size_t standin_used(void)
{
	return used;
}

void standin_total(size_t bytes)
{
	total = bytes;
}

static uint64_t handle_of(int slot)
{
	return 0x700000000000ull + (uint64_t)slot * 4096;
}

static struct slot *slot_of(uint64_t handle, int kind)
{
	uint64_t slot = (handle - 0x700000000000ull) / 4096;

	if (slot >= SLOTS || !slots[slot].live || slots[slot].kind != kind)
		return NULL;
	return &slots[slot];
}

static CUresult give(uint64_t *out, size_t size, int kind)
{
	CUresult result = OUT_OF_MEMORY;
	int slot;

	pthread_mutex_lock(&lock);
	entered++;
	if (free_count < 0)
		for (free_count = 0; free_count < SLOTS; free_count++)
			free_slots[free_count] = SLOTS - 1 - free_count;
	if (free_count && size && size <= total - used) {
		slot = free_slots[--free_count];
		slots[slot] = (struct slot){ size, depth ? stack[depth - 1] : 0, 1, kind, 1 };
		used += size;
		*out = handle_of(slot);
		result = SUCCESS;
	}
	pthread_mutex_unlock(&lock);
	return result;
}

static void end_slot(struct slot *slot)
{
	used -= slot->size;
	slot->live = 0;
	free_slots[free_count++] = slot - slots;
}

static CUresult take(uint64_t handle, int kind)
{
	CUresult result = INVALID_VALUE;
	struct slot *slot;

	pthread_mutex_lock(&lock);
	entered++;
	slot = slot_of(handle, kind);
	if (slot) {
		if (!--slot->refs)
			end_slot(slot);
		result = SUCCESS;
	}
	pthread_mutex_unlock(&lock);
	return result;
}

CUresult cuInit(unsigned int flags)
{
	return flags ? INVALID_VALUE : SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size)
{
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemAllocPitch_v2(CUdeviceptr *out, size_t *pitch, size_t width, size_t height,
			    unsigned int element)
{
	(void)element;
	*pitch = (width + PITCH - 1) / PITCH * PITCH;
	return give((uint64_t *)out, *pitch * height, POINTER);
}

CUresult cuMemAllocManaged(CUdeviceptr *out, size_t size, unsigned int flags)
{
	(void)flags;
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemAllocAsync(CUdeviceptr *out, size_t size, void *stream)
{
	(void)stream;
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemAllocAsync_ptsz(CUdeviceptr *out, size_t size, void *stream)
{
	(void)stream;
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr *out, size_t size, void *pool, void *stream)
{
	(void)pool, (void)stream;
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr *out, size_t size, void *pool, void *stream)
{
	(void)pool, (void)stream;
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuMemFree_v2(CUdeviceptr pointer)
{
	return take(pointer, POINTER);
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, void *stream)
{
	(void)stream;
	return take(pointer, POINTER);
}

CUresult cuMemFreeAsync_ptsz(CUdeviceptr pointer, void *stream)
{
	(void)stream;
	return take(pointer, POINTER);
}

struct properties {
	int type, handles;
	struct {
		int type, id;
	} location;
};

CUresult cuMemCreate(uint64_t *out, size_t size, const struct properties *properties,
		     unsigned long long flags)
{
	(void)properties, (void)flags;
	return give(out, size, MEMORY);
}

CUresult cuMemRelease(uint64_t handle)
{
	return take(handle, MEMORY);
}

CUresult cuMemMap(CUdeviceptr at, size_t size, size_t offset, uint64_t handle,
		  unsigned long long flags)
{
	struct slot *slot;

	(void)offset, (void)flags;
	pthread_mutex_lock(&lock);
	entered++;
	slot = slot_of(handle, MEMORY);
	if (slot) {
		slot->refs++;
		mappings[mapping_count++] = (struct mapping){ at, size, handle };
	}
	pthread_mutex_unlock(&lock);
	return slot ? SUCCESS : INVALID_VALUE;
}

CUresult cuMemUnmap(CUdeviceptr at, size_t size)
{
	CUresult result = INVALID_VALUE;

	pthread_mutex_lock(&lock);
	entered++;
	for (int i = 0; i < mapping_count;) {
		struct mapping *mapping = &mappings[i];
		struct slot *slot;

		if (mapping->at < at || mapping->at >= at + size) {
			i++;
			continue;
		}
		slot = slot_of(mapping->handle, MEMORY);
		if (slot && !--slot->refs)
			end_slot(slot);
		mappings[i] = mappings[--mapping_count];
		result = SUCCESS;
	}
	pthread_mutex_unlock(&lock);
	return result;
}

struct array {
	size_t width, height;
	int format;
	unsigned int channels;
};

struct array_3d {
	size_t width, height, depth;
	int format;
	unsigned int channels, flags;
};

static size_t one(size_t number)
{
	return number ? number : 1;
}

static size_t format_bytes(int format)
{
	return format == 1 || format == 8 ? 1 : format == 2 || format == 9 || format == 16 ? 2 : 4;
}

CUresult cuArrayCreate_v2(uint64_t *out, const struct array *a)
{
	return give(out, a->width * one(a->height) * a->channels * format_bytes(a->format), ARRAY);
}

CUresult cuArray3DCreate_v2(uint64_t *out, const struct array_3d *a)
{
	return give(out,
		    a->width * one(a->height) * one(a->depth) * a->channels *
			    format_bytes(a->format),
		    ARRAY);
}

CUresult cuArrayDestroy(uint64_t handle)
{
	return take(handle, ARRAY);
}

CUresult cuMipmappedArrayCreate(uint64_t *out, const struct array_3d *a, unsigned int levels)
{
	size_t size = 0;

	for (unsigned int i = 0; i < levels; i++)
		size += one(a->width >> i) * one(a->height >> i) * one(a->depth >> i) *
			a->channels * format_bytes(a->format);
	return give(out, size, MIPMAP);
}

CUresult cuMipmappedArrayDestroy(uint64_t handle)
{
	return take(handle, MIPMAP);
}

CUresult cuCtxCreate_v2(uint64_t *out, unsigned int flags, int device)
{
	(void)flags, (void)device;
	pthread_mutex_lock(&lock);
	entered++;
	for (int i = 0; i < CONTEXTS; i++)
		if (!contexts[i]) {
			*out = contexts[i] = 0x560000000000ull + (uint64_t)i * 64;
			stack[depth++] = *out;
			pthread_mutex_unlock(&lock);
			return SUCCESS;
		}
	pthread_mutex_unlock(&lock);
	return OUT_OF_MEMORY;
}

static CUresult end_context(uint64_t context)
{
	CUresult result = INVALID_CONTEXT;

	pthread_mutex_lock(&lock);
	entered++;
	for (int i = 0; i < CONTEXTS; i++)
		if (context && contexts[i] == context) {
			contexts[i] = 0;
			for (int s = 0; s < SLOTS; s++)
				if (slots[s].live && slots[s].context == context &&
				    slots[s].kind != MEMORY)
					end_slot(&slots[s]);
			result = SUCCESS;
		}
	if (result == SUCCESS && depth && stack[depth - 1] == context)
		depth--;
	pthread_mutex_unlock(&lock);
	return result;
}

CUresult cuCtxDestroy_v2(uint64_t context)
{
	return end_context(context);
}

CUresult cuCtxSetCurrent(uint64_t context)
{
	if (!depth)
		depth = 1;
	stack[depth - 1] = context;
	return SUCCESS;
}

CUresult cuCtxPushCurrent_v2(uint64_t context)
{
	stack[depth++] = context;
	return SUCCESS;
}

CUresult cuCtxPopCurrent_v2(uint64_t *out)
{
	if (!depth)
		return INVALID_CONTEXT;
	*out = stack[--depth];
	return SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(uint64_t *out, int device)
{
	int before = depth;

	if (!primary) {
		cuCtxCreate_v2(&primary, 0, device);
		depth = before;
	}
	*out = primary;
	return SUCCESS;
}

CUresult cuDevicePrimaryCtxReset_v2(int device)
{
	CUresult result = end_context(primary);

	(void)device;
	primary = 0;
	return result;
}

CUresult cuLaunchKernel(void *function, unsigned int x)
{
	(void)function, (void)x;
	pthread_mutex_lock(&lock);
	entered++;
	pthread_mutex_unlock(&lock);
	return SUCCESS;
}

/* What cuGetProcAddress gives out need not be what the symbol table has. */
__attribute__((noinline)) static CUresult inner_alloc(CUdeviceptr *out, size_t size)
{
	__asm__ volatile("");
	return give((uint64_t *)out, size, POINTER);
}

CUresult cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status)
{
	(void)version, (void)flags;
	*out = !strcmp(name, "cuMemAlloc") ? (void *)inner_alloc : NULL;
	if (status)
		*status = *out ? 0 : 1;
	return *out ? SUCCESS : NOT_FOUND;
}
