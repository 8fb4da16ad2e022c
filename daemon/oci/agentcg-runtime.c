// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg-runtime: split a container's cgroup before its first instruction.
 *
 * As an OCI runtime (Docker: "runtimes" in daemon.json) it hands all it is asked to the real one,
 * runc, and only after `create` does something itself: the container's init waits then, alone in
 * the container's cgroup. It is moved to agent/ below that, and the controllers are given on, as
 * the daemon would do after the start; the daemon then makes a session of it, if a label says so.
 *
 * As an OCI hook (podman: a createRuntime hook), with --hook, it does the same to the container
 * that its standard input tells of.
 *
 * It never keeps a container from starting: what cannot be done is said in the system's log.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#define AGENT_LEAF  "agent"
#define REAL_OPTION "--agentcg-real="
#define REAL_FIRST  "runc"
/* A container's state (OCI runtime specification) has some annotations; more is not read. */
#define STATE_BYTES 65536

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	openlog("agentcg-runtime", LOG_PID, LOG_DAEMON);
	vsyslog(LOG_WARNING, format, arguments);
	va_end(arguments);
}

/* Read a small file; returns its length, or -1 with errno. The text ends in NUL. */
static ssize_t read_at(int directory, const char *name, char *text, size_t size)
{
	int fd = openat(directory, name, O_RDONLY | O_CLOEXEC);
	size_t length = 0;
	ssize_t more = 0;

	if (fd < 0)
		return -1;
	while (length < size - 1 && (more = read(fd, text + length, size - 1 - length)) > 0)
		length += more;
	close(fd);
	text[length] = '\0';
	return more < 0 ? -1 : (ssize_t)length;
}

/* Write to an interface file, which is never made. Returns 0, or -1 with errno. */
static int write_at(int directory, const char *name, const char *text)
{
	int fd = openat(directory, name, O_WRONLY | O_CLOEXEC);
	ssize_t done;

	if (fd < 0)
		return -1;
	done = write(fd, text, strlen(text));
	close(fd);
	return done < 0 ? -1 : 0;
}

/* Open the cgroup of a process; -1: it cannot be told, which has been said. */
static int open_cgroup(long pid, char *path, size_t size)
{
	static const char *const mounts[] = { "/sys/fs/cgroup", "/sys/fs/cgroup/unified" };
	char name[64], text[8192], *line, *end;
	struct statfs about;

	snprintf(name, sizeof(name), "/proc/%ld/cgroup", pid);
	if (read_at(AT_FDCWD, name, text, sizeof(text)) < 0) {
		say("process %ld: %s", pid, strerror(errno));
		return -1;
	}
	/* Lines end at a newline and at nothing else; that of cgroup v2 begins with 0::. */
	line = strncmp(text, "0::", 3) ? strstr(text, "\n0::") : text;
	if (!line) {
		say("process %ld is in no cgroup of cgroup v2", pid);
		return -1;
	}
	line += *line == '\n' ? 4 : 3;
	end = strchr(line, '\n');
	if (!end || line[0] != '/' || line[1] == '\n' || strstr(line, "/../")) {
		say("process %ld: its cgroup cannot be split", pid);
		return -1;
	}
	*end = '\0';
	for (size_t i = 0; i < sizeof(mounts) / sizeof(*mounts); i++) {
		if (statfs(mounts[i], &about) || about.f_type != CGROUP2_SUPER_MAGIC)
			continue;
		if (snprintf(path, size, "%s%s", mounts[i], line) >= (int)size)
			break;
		return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
	}
	say("no cgroup v2 with %s is mounted", line);
	return -1;
}

/* Whether a process is alone in a cgroup: in any other case that is not one container's. */
static bool is_alone(int cgroup, long pid)
{
	char text[64], *end;

	if (read_at(cgroup, "cgroup.procs", text, sizeof(text)) <= 0)
		return false;
	return strtol(text, &end, 10) == pid && *end == '\n' && end[1] == '\0';
}

static void give_controllers_on(int cgroup)
{
	static const char *const wanted[] = { "+memory", "+cpu", "+pids", "+io" };

	/* Those that are not offered here are refused, and the daemon says so. */
	for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++)
		write_at(cgroup, "cgroup.subtree_control", wanted[i]);
}

static void split(long pid)
{
	char path[PATH_MAX], number[32];
	int cgroup = open_cgroup(pid, path, sizeof(path));

	if (cgroup < 0)
		return;
	snprintf(number, sizeof(number), "%ld", pid);
	if (!is_alone(cgroup, pid)) {
		say("%s is not split: process %ld is not alone in it", path, pid);
	} else if (mkdirat(cgroup, AGENT_LEAF, 0755)) {
		say("%s is not split: %s", path, strerror(errno));
	} else if (write_at(cgroup, AGENT_LEAF "/cgroup.procs", number)) {
		say("%s is not split: process %ld cannot be moved: %s", path, pid, strerror(errno));
		unlinkat(cgroup, AGENT_LEAF, AT_REMOVEDIR);
	} else {
		give_controllers_on(cgroup);
	}
	close(cgroup);
}

/* The pid in a container's state, which is JSON; 0: there is none. Text in it cannot pass for the
 * member: a quotation mark inside a string has a backslash before it. */
static long pid_of_state(const char *state)
{
	for (const char *at = state; (at = strstr(at, "\"pid\"")); at++) {
		const char *value = at + strlen("\"pid\"");

		if (at > state && at[-1] == '\\')
			continue;
		value += strspn(value, " \t\r\n");
		if (*value++ != ':')
			continue;
		value += strspn(value, " \t\r\n");
		if (isdigit((unsigned char)*value))
			return strtol(value, NULL, 10);
	}
	return 0;
}

static int hook(void)
{
	static char state[STATE_BYTES];
	size_t length = fread(state, 1, sizeof(state) - 1, stdin);
	long pid;

	state[length] = '\0';
	pid = pid_of_state(state);
	if (pid > 0)
		split(pid);
	else
		say("the container's state has no pid");
	return 0;
}

/* The value of --pid-file in the arguments of `create`; NULL: they are of another command. */
static const char *pid_file_of_create(char **arguments)
{
	const char *file = NULL;
	bool create = false;

	for (; *arguments; arguments++) {
		if (!strcmp(*arguments, "create"))
			create = true;
		else if (!strncmp(*arguments, "--pid-file=", 11))
			file = *arguments + 11;
		else if (!strcmp(*arguments, "--pid-file") && arguments[1])
			file = *++arguments;
	}
	return create ? file : NULL;
}

static int run(const char *real, char **arguments)
{
	pid_t child = fork();
	int status;

	if (child < 0) {
		fprintf(stderr, "agentcg-runtime: %s\n", strerror(errno));
		return 1;
	}
	if (!child) {
		execvp(real, arguments);
		fprintf(stderr, "agentcg-runtime: %s: %s\n", real, strerror(errno));
		_exit(127);
	}
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			return 1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv)
{
	const char *real = REAL_FIRST, *file;
	char text[64];
	int status;

	if (argc == 2 && !strcmp(argv[1], "--hook"))
		return hook();
	if (argc > 1 && !strncmp(argv[1], REAL_OPTION, strlen(REAL_OPTION))) {
		real = argv[1] + strlen(REAL_OPTION);
		argv++;
	}
	argv[0] = (char *)real;
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 0);
	file = pid_file_of_create(argv);
	if (!file) {
		execvp(real, argv);
		fprintf(stderr, "agentcg-runtime: %s: %s\n", real, strerror(errno));
		return 127;
	}
	status = run(real, argv);
	if (status)
		return status;
	if (read_at(AT_FDCWD, file, text, sizeof(text)) > 0 && strtol(text, NULL, 10) > 0)
		split(strtol(text, NULL, 10));
	else
		say("%s has no pid", file);
	return 0;
}
