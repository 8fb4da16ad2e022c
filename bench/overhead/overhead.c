// SPDX-License-Identifier: Apache-2.0
/*
 * The work that the benchmark `overhead` times, a line of commands at a time so that no measurement
 * holds the start of a program:
 *
 *	<what> <operations> <times>
 *
 * runs that many operations as often as asked and answers with one line: ns for one operation, each
 * time. <what> is
 *
 *	faults	the first touch of a page of anonymous memory, mapped before and unmapped after the
 * clock mmap	a page mapped and unmapped, never touched fork	fork, _exit in the child, waitpid
 *	spawn	posix_spawn of this program, which exits at once, waitpid
 */
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NSEC_PER_SEC   1000000000LL
#define PAGE_BYTES     4096
#define OPERATIONS_MAX (1L << 24)
#define TIMES_MAX      10000
#define ARGUMENT_BYTES 512 /* longer than what of argv goes into an event */

static char *self;
static char argument[ARGUMENT_BYTES];

static void fail(const char *what)
{
	fprintf(stderr, "overhead: %s: %s\n", what, errno ? strerror(errno) : "failed");
	exit(1);
}

static long long now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * NSEC_PER_SEC + time.tv_nsec;
}

static long minor_faults(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_SELF, &usage))
		fail("getrusage");
	return usage.ru_minflt;
}

static char *map(size_t bytes)
{
	char *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		fail("mmap");
	return start;
}

static void unmap(char *start, size_t bytes)
{
	if (munmap(start, bytes))
		fail("munmap");
}

static long long faults(long pages)
{
	size_t bytes = (size_t)pages * PAGE_BYTES;
	char *start = map(bytes);
	long before, after;
	long long from, to;

	/* EINVAL: a kernel without huge pages. */
	if (madvise(start, bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
		fail("madvise");
	before = minor_faults();
	from = now_ns();
	for (size_t offset = 0; offset < bytes; offset += PAGE_BYTES)
		*(volatile char *)(start + offset) = 1;
	to = now_ns();
	after = minor_faults();
	unmap(start, bytes);
	errno = 0;
	if (after - before < pages)
		fail("a fault for each page");
	return to - from;
}

static long long maps(long count)
{
	long long from = now_ns();

	for (long i = 0; i < count; i++)
		unmap(map(PAGE_BYTES), PAGE_BYTES);
	return now_ns() - from;
}

static void reap(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	errno = 0;
	if (status)
		fail("a child");
}

static long long forks(long count)
{
	long long from = now_ns();

	for (long i = 0; i < count; i++) {
		pid_t child = fork();

		if (child < 0)
			fail("fork");
		if (!child)
			_exit(0);
		reap(child);
	}
	return now_ns() - from;
}

static long long spawns(long count)
{
	char *argv[] = { self, "exit", argument, NULL }, *environment[] = { NULL };
	long long from = now_ns();

	for (long i = 0; i < count; i++) {
		pid_t child;

		errno = posix_spawn(&child, self, NULL, NULL, argv, environment);
		if (errno)
			fail(self);
		reap(child);
	}
	return now_ns() - from;
}

static const struct {
	const char *name;
	long long (*run)(long operations);
} modes[] = {
	{ "faults", faults },
	{ "mmap", maps },
	{ "fork", forks },
	{ "spawn", spawns },
};

static long long run(const char *what, long operations)
{
	for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++)
		if (!strcmp(modes[i].name, what))
			return modes[i].run(operations);
	errno = EINVAL;
	fail(what);
	return 0;
}

int main(int argc, char **argv)
{
	char line[128], what[16];
	long operations, times;

	if (argc > 1 && !strcmp(argv[1], "exit"))
		_exit(0);
	self = argv[0];
	memset(argument, 'a', sizeof(argument) - 1);
	while (fgets(line, sizeof(line), stdin)) {
		errno = EINVAL;
		if (sscanf(line, "%15s %ld %ld", what, &operations, &times) != 3 ||
		    operations < 1 || operations > OPERATIONS_MAX || times < 1 || times > TIMES_MAX)
			fail(line);
		for (long i = 0; i < times; i++)
			printf("%.3f ", (double)run(what, operations) / operations);
		puts("");
		fflush(stdout);
	}
	return 0;
}
