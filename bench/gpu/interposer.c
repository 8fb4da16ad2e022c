// SPDX-License-Identifier: Apache-2.0
/*
 * For comparison only: a quota of GPU memory held by LD_PRELOAD, in the way that such libraries
 * work. Functions of libcuda are answered by our own, whether they are found by the linker, by
 * dlsym() or by cuGetProcAddress(). QUOTA_BYTES in the environment says how much.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 2, NOT_FOUND = 500, TABLE = 1 << 16 };

typedef int (*any)();

static struct {
	uint64_t pointer;
	size_t size;
} table[TABLE];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t used, quota = SIZE_MAX;
static void *driver;
static void *(*next_dlsym)(void *, const char *);

__attribute__((constructor)) static void start(void)
{
	const char *text = getenv("QUOTA_BYTES");

	if (text)
		quota = strtoull(text, NULL, 10);
}

static void *real(const char *name)
{
	if (!next_dlsym)
		next_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
	if (!driver)
		driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
	return driver ? next_dlsym(driver, name) : NULL;
}

static int reserve(size_t size)
{
	int fits;

	pthread_mutex_lock(&lock);
	fits = size <= quota && used <= quota - size;
	if (fits)
		used += size;
	pthread_mutex_unlock(&lock);
	return fits;
}

static int note(int result, uint64_t pointer, size_t size)
{
	pthread_mutex_lock(&lock);
	if (result)
		used -= size;
	for (int i = 0; !result && i < TABLE; i++) {
		unsigned int at = (pointer / 512 + i) % TABLE;

		if (!table[at].size) {
			table[at].pointer = pointer;
			table[at].size = size;
			break;
		}
	}
	pthread_mutex_unlock(&lock);
	return result;
}

static int forget(int result, uint64_t pointer)
{
	pthread_mutex_lock(&lock);
	for (int i = 0; !result && i < TABLE; i++) {
		unsigned int at = (pointer / 512 + i) % TABLE;

		if (table[at].size && table[at].pointer == pointer) {
			used -= table[at].size;
			table[at].size = 0;
			break;
		}
	}
	pthread_mutex_unlock(&lock);
	return result;
}

#define ALLOCATES(name, size, parameters, arguments)                     \
	int name parameters                                              \
	{                                                                \
		any function = (any)real(#name);                         \
                                                                         \
		if (!function)                                           \
			return NOT_FOUND;                                \
		if (!reserve(size))                                      \
			return OUT_OF_MEMORY;                            \
		return note(function arguments, *(uint64_t *)out, size); \
	}
#define FREES(name, parameters, arguments)                  \
	int name parameters                                 \
	{                                                   \
		any function = (any)real(#name);            \
                                                            \
		if (!function)                              \
			return NOT_FOUND;                   \
		return forget(function arguments, pointer); \
	}

ALLOCATES(cuMemAlloc_v2, size, (void *out, size_t size), (out, size))
ALLOCATES(cuMemAllocManaged, size, (void *out, size_t size, unsigned int f), (out, size, f))
ALLOCATES(cuMemAllocAsync, size, (void *out, size_t size, void *s), (out, size, s))
ALLOCATES(cuMemAllocAsync_ptsz, size, (void *out, size_t size, void *s), (out, size, s))
ALLOCATES(cuMemCreate, size, (void *out, size_t size, void *p, unsigned long long f),
	  (out, size, p, f))
FREES(cuMemFree_v2, (uint64_t pointer), (pointer))
FREES(cuMemFreeAsync, (uint64_t pointer, void *s), (pointer, s))
FREES(cuMemFreeAsync_ptsz, (uint64_t pointer, void *s), (pointer, s))
FREES(cuMemRelease, (uint64_t pointer), (pointer))

static const struct {
	const char *name, *plain;
	void *ours;
} hooks[] = {
	{ "cuMemAlloc_v2", "cuMemAlloc", cuMemAlloc_v2 },
	{ "cuMemAllocManaged", "cuMemAllocManaged", cuMemAllocManaged },
	{ "cuMemAllocAsync", "cuMemAllocAsync", cuMemAllocAsync },
	{ "cuMemAllocAsync_ptsz", "-", cuMemAllocAsync_ptsz },
	{ "cuMemCreate", "cuMemCreate", cuMemCreate },
	{ "cuMemFree_v2", "cuMemFree", cuMemFree_v2 },
	{ "cuMemFreeAsync", "cuMemFreeAsync", cuMemFreeAsync },
	{ "cuMemFreeAsync_ptsz", "-", cuMemFreeAsync_ptsz },
	{ "cuMemRelease", "cuMemRelease", cuMemRelease },
};

static void *ours(const char *name, int plain)
{
	for (size_t i = 0; i < sizeof(hooks) / sizeof(*hooks); i++)
		if (!strcmp(plain ? hooks[i].plain : hooks[i].name, name))
			return hooks[i].ours;
	return NULL;
}

int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, void *status)
{
	any function = (any)real("cuGetProcAddress_v2");
	void *hook = ours(name, 1);
	int result;

	if (!function)
		return NOT_FOUND;
	result = function(name, out, version, flags, status);
	if (!result && hook)
		*out = hook;
	if (!result && !strcmp(name, "cuGetProcAddress"))
		*out = (void *)cuGetProcAddress_v2;
	return result;
}

void *dlsym(void *handle, const char *name)
{
	void *hook = ours(name, 0);

	if (!next_dlsym)
		next_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
	if (hook && handle != RTLD_NEXT)
		return hook;
	if (!strcmp(name, "cuGetProcAddress_v2"))
		return (void *)cuGetProcAddress_v2;
	return next_dlsym(handle, name);
}
