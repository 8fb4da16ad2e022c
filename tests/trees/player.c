// SPDX-License-Identifier: Apache-2.0
/*
 * Plays a part in a process tree: does what the words in a file say, from the place on that
 * $AGENTCG_TREE names (FILE:OFFSET). Linked under the names of programs, it is each of them, with
 * exactly the arguments, the order of forks and the names that were recorded. Its parent directory
 * holds the links.
 *
 *   fork N, spawn N	a child does the next N words; spawn is posix_spawn(3), so its first is an
 *			exec, or that behind setsid
 *   thread NAME N	as fork, by a thread of that name
 *   exec FILE ARGC ARGS...	becomes another program, which goes on behind
 *   name NAME		changes its own name, as prctl(2) does
 *   setsid, group, join	has a session, or a process group, of its own; or the group of the
 *			child that was forked before it
 *   nap MS, wait, end STATUS
 *   inside LABEL		waits until it is in a call, and notes its cgroup
 *   outside LABEL	notes its cgroup, some time later
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { OUTSIDE_MS = 60, INSIDE_MS = 30000, BROKEN = 99, STACK_BYTES = 1 << 18 };
#define VARIABLE "AGENTCG_TREE="

static const char *words, *file;
static pid_t newest;

static const char *next(const char *word)
{
	return word + strlen(word) + 1;
}

static const char *skip(const char *word, int count)
{
	while (count--)
		word = next(word);
	return word;
}

static void nap_ms(int ms)
{
	usleep(ms * 1000);
}

/* Reads this process's cgroup into `text`; returns whether it is a call's. */
static int in_call(char *text, size_t size)
{
	char all[8192] = {}, *found, *end;
	int fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || read(fd, all, sizeof(all) - 1) < 0)
		_exit(BROKEN);
	close(fd);
	found = strstr(all, "0::");
	if (!found)
		_exit(BROKEN);
	end = strchrnul(found, '\n');
	snprintf(text, size, "%.*s", (int)(end - found - 3), found + 3);
	return strstr(text, "/call-") != NULL;
}

static void note(const char *label, int wants_call)
{
	char cgroup[4096], line[8192], path[4096];
	int fd, len;

	if (!wants_call)
		nap_ms(OUTSIDE_MS);
	for (int ms = 0; !in_call(cgroup, sizeof(cgroup)) && wants_call && ms < INSIDE_MS; ms++)
		nap_ms(1);
	len = snprintf(line, sizeof(line), "%s\t%s\t%d\t%s\n", wants_call ? "inside" : "outside",
		       label, getpid(), cgroup);
	snprintf(path, sizeof(path), "%s.notes", file);
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, len) != len)
		_exit(BROKEN);
	close(fd);
}

/* Changes no memory that a parent could share. */
static void become(const char *word)
{
	const char *program = word;
	int argc = atoi(next(word)), count = 0;
	char path[4096], *slash;
	char **argv = alloca((argc + 1) * sizeof(*argv)), **env;
	char *variable = alloca(strlen(file) + 64);

	word = next(next(word));
	for (int i = 0; i < argc; i++, word = next(word))
		argv[i] = (char *)word;
	argv[argc] = NULL;
	sprintf(variable, VARIABLE "%s:%zu", file, (size_t)(word - words));
	while (environ[count])
		count++;
	env = alloca((count + 1) * sizeof(*env));
	for (int i = 0; i <= count; i++) {
		int is_mine = environ[i] && !strncmp(environ[i], VARIABLE, strlen(VARIABLE));

		env[i] = is_mine ? variable : environ[i];
	}
	snprintf(path, sizeof(path), "%s", file);
	slash = strrchr(path, '/');
	snprintf(slash, sizeof(path) - (slash - path), "/bin/%s", program);
	execve(path, argv, env);
	_exit(BROKEN);
}

static int spawned(void *given)
{
	const char *word = given;

	if (!strcmp(word, "setsid")) {
		setsid();
		word = next(word);
	}
	become(next(word));
	return BROKEN;
}

/* As posix_spawn(3) does it. */
static void spawn(const char *word)
{
	char *stack = malloc(STACK_BYTES);

	if (!stack ||
	    clone(spawned, stack + STACK_BYTES, CLONE_VM | CLONE_VFORK | SIGCHLD, (void *)word) < 0)
		_exit(BROKEN);
	free(stack);
}

/* Parent and child do it, as in a shell: each could be too late alone. */
static void set_group(pid_t child, const char *word)
{
	if (!strcmp(word, "group"))
		setpgid(child, 0);
	else if (!strcmp(word, "join"))
		setpgid(child, newest);
}

static void play(const char *word);

static void *fork_in_thread(void *given)
{
	const char *word = given;

	prctl(PR_SET_NAME, word);
	if (!fork())
		play(next(next(word)));
	return NULL;
}

static void play(const char *word)
{
	pthread_t thread;
	pid_t child;

	for (;;) {
		const char *what = word;

		word = next(word);
		if (!strcmp(what, "fork")) {
			child = fork();
			if (child)
				set_group(child, next(word));
			newest = child ?: newest;
			word = child ? skip(next(word), atoi(word)) : next(word);
		} else if (!strcmp(what, "spawn")) {
			spawn(next(word));
			word = skip(next(word), atoi(word));
		} else if (!strcmp(what, "thread")) {
			if (pthread_create(&thread, NULL, fork_in_thread, (void *)word))
				_exit(BROKEN);
			pthread_join(thread, NULL);
			word = skip(next(next(word)), atoi(next(word)));
		} else if (!strcmp(what, "exec")) {
			become(word);
		} else if (!strcmp(what, "name")) {
			prctl(PR_SET_NAME, word);
			word = next(word);
		} else if (!strcmp(what, "setsid")) {
			setsid();
		} else if (!strcmp(what, "group") || !strcmp(what, "join")) {
			set_group(0, what);
		} else if (!strcmp(what, "nap")) {
			nap_ms(atoi(word));
			word = next(word);
		} else if (!strcmp(what, "wait")) {
			while (wait(NULL) > 0)
				;
		} else if (!strcmp(what, "inside") || !strcmp(what, "outside")) {
			note(word, *what == 'i');
			word = next(word);
		} else if (!strcmp(what, "end")) {
			_exit(atoi(word));
		} else {
			_exit(BROKEN);
		}
	}
}

int main(void)
{
	char *place = getenv("AGENTCG_TREE"), *offset = place ? strrchr(place, ':') : NULL;
	struct stat stat_of;
	int fd;

	if (!offset)
		return BROKEN;
	file = strndup(place, offset - place);
	fd = open(file, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &stat_of))
		return BROKEN;
	words = mmap(NULL, stat_of.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (words == MAP_FAILED)
		return BROKEN;
	close(fd);
	play(words + atol(offset + 1));
}
