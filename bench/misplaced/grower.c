// SPDX-License-Identifier: Apache-2.0
/*
 * grower MIB CGROUP_ID: touches memory as fast as it can. Then it says how many bytes it had
 * touched when it found itself in a call, to within STEP_BYTES, and how many bytes of all that is
 * its own are charged to the cgroup of that id (Documentation/admin-guide/mm/pagemap.rst); 0 for an
 * id of 0. It waits for the end of its input. Needs root.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PRESENT	   (1ULL << 63)
#define OF_A_FILE  (1ULL << 61)
#define PFN	   ((1ULL << 55) - 1)
#define PAGE_BYTES 4096UL
#define STEP_BYTES (64UL << 10)

static int pagemap, cgroups;

static unsigned long charged(unsigned long at, unsigned long end, uint64_t cgroup)
{
	unsigned long count = 0;
	uint64_t entry, owner;

	for (; at < end; at += PAGE_BYTES) {
		if (pread(pagemap, &entry, 8, at / PAGE_BYTES * 8) != 8)
			break;
		if (!(entry & PRESENT) || entry & OF_A_FILE)
			continue;
		if (pread(cgroups, &owner, 8, (entry & PFN) * 8) != 8)
			exit(3);
		count += owner == cgroup;
	}
	return count;
}

static int is_in_call(int fd)
{
	char text[4096];
	ssize_t len = pread(fd, text, sizeof(text) - 1, 0);

	text[len > 0 ? len : 0] = 0;
	return strstr(text, "/call-") != NULL;
}

int main(int argc, char **argv)
{
	size_t bytes = argc > 2 ? strtoul(argv[1], NULL, 10) << 20 : 0;
	uint64_t cgroup = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
	unsigned long begin, end, count = 0, touched = bytes;
	char line[512], *grown;
	FILE *maps;
	int own;

	grown = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!bytes || grown == MAP_FAILED)
		return 2;
	madvise(grown, bytes, MADV_NOHUGEPAGE);
	own = open("/proc/self/cgroup", O_RDONLY);
	for (size_t at = 0; at < bytes; at += PAGE_BYTES) {
		grown[at] = 1;
		if (at % STEP_BYTES == 0 && touched == bytes && is_in_call(own))
			touched = at;
	}
	if (!cgroup) {
		printf("%lu 0\n", touched);
		fflush(stdout);
		return read(0, line, sizeof(line)) < 0;
	}
	pagemap = open("/proc/self/pagemap", O_RDONLY);
	cgroups = open("/proc/kpagecgroup", O_RDONLY);
	maps = fopen("/proc/self/maps", "r");
	if (pagemap < 0 || cgroups < 0 || !maps)
		return 2;
	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx", &begin, &end) == 2 && !strstr(line, "[v"))
			count += charged(begin, end, cgroup);
	printf("%lu %lu\n", touched, count * PAGE_BYTES);
	fflush(stdout);
	while (read(0, line, sizeof(line)) > 0)
		;
	return 0;
}
