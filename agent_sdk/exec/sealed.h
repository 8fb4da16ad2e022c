// SPDX-License-Identifier: Apache-2.0
/*
 * A declaration without a socket, for sandboxes that refuse those. The launcher executes itself
 * once more with its request as arguments. The kernel's program sees that exec and tells the
 * daemon, which moves this process and answers with a signal that is ignored by default, so that a
 * late one harms nobody. Meanwhile this process waits, for a bounded time.
 */
#ifndef AGENTCG_SEALED_H
#define AGENTCG_SEALED_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "beside.h"
#include "options.h"
#include "retry.h"
#include "say.h"

/* How the kernel's program knows such an exec: bpf/lifecycle.bpf.c, with the name before it. */
#define SEALED_NAME   "agentcg-exec"
#define SEALED_OPTION "--sealed="

enum { ANSWER_SIGNAL = SIGURG, RUN_WAIT_MS = 100, REFUSE_WAIT_MS = 5000, QUEUE_MORE_MS = 10000 };
/*
 * An answer is the value of a signal: MAGIC; 24 bits, which are seconds to wait, or the name_mark()
 * of a field and a gRPC status; and one of these.
 */
enum { ANSWER_OK = 1, ANSWER_REFUSED = 2, ANSWER_WAIT = 3 };
#define ANSWER_MAGIC 0x41434731ULL /* ACG1 */

static const char sealed[] = "the sandbox refuses sockets";

static bool is_sealed(int error)
{
	return error == EPERM || error == EACCES || error == EAFNOSUPPORT;
}

static uint32_t fnv1a(uint32_t mark, const void *bytes, size_t len)
{
	const unsigned char *at = bytes;

	while (len--)
		mark = (mark ^ *at++) * 16777619U;
	return mark;
}

/* 16 bits of the name of a field, as daemon/agentcgroupd/rpc/sealed.py makes them. */
static unsigned int name_mark(const char *option)
{
	uint32_t mark = 2166136261U;

	for (; *option; option++)
		mark = fnv1a(mark, *option == '-' ? "_" : option, 1);
	return (mark ^ mark >> 16) & 0xffff;
}

/* A number that changes when this process is moved; 0: its cgroup cannot be read. */
static uint32_t cgroup_mark(void)
{
	int fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);
	uint32_t mark = 2166136261U;
	char text[4096];
	ssize_t len;

	if (fd < 0)
		return 0;
	while ((len = TEMP_FAILURE_RETRY(read(fd, text, sizeof(text)))) > 0)
		mark = fnv1a(mark, text, len);
	close(fd);
	return len < 0 ? 0 : mark ?: 1;
}

/*
 * Executes the launcher anew with the words of a request (each ended by a NUL, from the verb on)
 * before its own arguments. Returns where that cannot be done.
 */
static void declare(const char *words, size_t len, int argc, char **argv)
{
	char option[32], **all;
	sigset_t answer, before;
	size_t count = 0, at = 0;

	for (size_t i = 0; i < len; i++)
		count += !words[i];
	all = calloc(count + argc + 4, sizeof(*all));
	if (!all)
		return;
	/* Blocked over the exec, so that no answer is lost. */
	sigemptyset(&answer);
	sigaddset(&answer, ANSWER_SIGNAL);
	sigprocmask(SIG_BLOCK, &answer, &before);
	snprintf(option, sizeof(option), SEALED_OPTION "%d:%x",
		 sigismember(&before, ANSWER_SIGNAL) == 1, cgroup_mark());
	all[at++] = (char *)SEALED_NAME;
	all[at++] = option;
	for (const char *word = words; count; count--, word += strlen(word) + 1)
		all[at++] = (char *)word;
	all[at++] = (char *)"--";
	memcpy(all + at, argv, argc * sizeof(*argv));
	execute_beside(SEALED_NAME, all);
	sigprocmask(SIG_SETMASK, &before, NULL);
	free(all);
}

/* Whether this process was started by declare(); sets its arguments to those it had before. */
static bool is_declared(int *argc, char ***argv)
{
	int i = 2;

	if (*argc < 2 || strncmp((*argv)[1], SEALED_OPTION, strlen(SEALED_OPTION)))
		return false;
	while (i < *argc && strcmp((*argv)[i], "--"))
		i++;
	if (++i >= *argc)
		die(REFUSED, "'" SEALED_OPTION "' is not for people");
	*argc -= i;
	*argv += i;
	return true;
}

/* Says why the daemon has refused a call, and ends this process. */
__attribute__((noreturn)) static void die_refused(unsigned int status, unsigned int field)
{
	static const char *const reasons[] = {
		[3] = "cannot be used",	  [5] = "there is no such call",
		[7] = "not allowed here", [8] = "there is no room",
		[9] = "not now",	  [14] = "it cannot be done now",
	};
	const char *reason = status < sizeof(reasons) / sizeof(*reasons) ? reasons[status] : NULL;

	reason = reason ?: "no reason given";
	for (int o = 0; o < KEYS && field; o++)
		if (name_mark(names[o]) == field)
			die(REFUSED, "refused by the daemon: --%s '%s': %s", names[o],
			    values[o] ?: "", reason);
	die(REFUSED, "refused by the daemon: %s", reason);
}

/*
 * Waits until the daemon has moved this process. `option`: what declare() has told of the time
 * before. Returns NULL when it was moved, or why it was not; ends the process where the daemon has
 * refused it.
 */
static const char *wait_to_be_moved(const char *option, bool may_run)
{
	static char why[96];
	int ms = may_run ? RUN_WAIT_MS : REFUSE_WAIT_MS, was_blocked = 0, number;
	struct timespec now, end;
	unsigned int before = 0;
	const char *away = why;
	sigset_t answer;
	siginfo_t info;

	sscanf(option + strlen(SEALED_OPTION), "%d:%x", &was_blocked, &before);
	snprintf(why, sizeof(why), "%s, and nobody moved this process within %d ms", sealed, ms);
	sigemptyset(&answer);
	sigaddset(&answer, ANSWER_SIGNAL);
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += ms / 1000;
	end.tv_nsec += ms % 1000 * 1000000L;
	for (;;) {
		struct timespec left;
		int64_t ns;
		uint64_t value;

		clock_gettime(CLOCK_MONOTONIC, &now);
		ns = (end.tv_sec - now.tv_sec) * 1000000000LL + end.tv_nsec - now.tv_nsec;
		left.tv_sec = ns > 0 ? ns / 1000000000LL : 0;
		left.tv_nsec = ns > 0 ? ns % 1000000000LL : 0;
		number = sigtimedwait(&answer, &info, &left);
		if (number < 0 && errno == EINTR)
			continue;
		if (number < 0)
			break;
		value = (uintptr_t)info.si_value.sival_ptr;
		if (info.si_code != SI_QUEUE || value >> 32 != ANSWER_MAGIC)
			continue;
		if ((value & 0xff) == ANSWER_REFUSED)
			die_refused(value >> 8 & 0xff, value >> 16 & 0xffff);
		if ((value & 0xff) == ANSWER_WAIT) {
			end = now;
			end.tv_sec += (value >> 8 & 0xffff) + QUEUE_MORE_MS / 1000;
			continue;
		}
		if (value >> 8 & 0xffff)
			say("%s: warning: %s, so the variables that the grant has for the command "
			    "do "
			    "not reach it",
			    program, sealed);
		away = NULL;
		break;
	}
	/* An answer may have been lost, but not a move. */
	if (away && before && cgroup_mark() != before)
		away = NULL;
	if (!was_blocked)
		sigprocmask(SIG_UNBLOCK, &answer, NULL);
	return away;
}

#endif
