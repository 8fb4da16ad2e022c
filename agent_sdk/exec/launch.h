// SPDX-License-Identifier: Apache-2.0
/*
 * The launcher: asks the daemon to put this process into a cgroup, then becomes the tool. It stays
 * one process with one pid, so that stdio, signals and exit status need no forwarding. As `agentcg
 * exec` it leaves a process in its place that waits for the tool, and says how the call ended.
 */
#ifndef AGENTCG_LAUNCH_H
#define AGENTCG_LAUNCH_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "options.h"
#include "retry.h"
#include "say.h"
#include "sealed.h"
#include "user.h"
#include "wait.h"

enum { PACKET_MAX = 16384, ARGS_MAX = 4096, TIMEOUT_S = 10 };

static struct sockaddr_un server = { .sun_family = AF_UNIX };
static char request[PACKET_MAX], reply[PACKET_MAX + 3]; /* bytes not received read as "" */
static size_t request_len;

/* Appends at most `max` bytes of value, cut between UTF-8 characters; returns how many it took. */
static size_t add(const char *key, const char *value, size_t max)
{
	size_t len = strnlen(value, max), room = sizeof(request) - request_len;
	char *at = request + request_len;

	while (len && (value[len] & 0xc0) == 0x80)
		len--;
	if (strlen(key) + len + 2 > room)
		die(REFUSED, "request too long: '%s' has %zu bytes", key, len);
	request_len += sprintf(at, "%s=%.*s", key, (int)len, value) + 1;
	for (; *at != '='; at++)
		*at = *at == '-' ? '_' : *at;
	return len;
}

static void make_request(int what, int argc, char **argv)
{
	ssize_t left = ARGS_MAX, room, len;
	char count[16];

	request_len = sprintf(request, "ACG1%c%s", 0, verbs[what]) + 1;
	if (what == NAME && !values[FIELD_hint]) {
		values[FIELD_hint] = getenv("AGENT_RESOURCE_HINT");
		hint_source = "$AGENT_RESOURCE_HINT";
	}
	for (int o = 0; o < KEYS; o++)
		if (values[o])
			add(names[o], values[o], -1);
	if (what != NAME)
		return;
	sprintf(count, "%d", argc);
	add("argc", count, -1);
	/* The rest of the packet holds as many of the arguments as fit. */
	for (; *argv && left > 0 && (room = PACKET_MAX - request_len - sizeof("arg=")) > 0;
	     argv++) {
		len = add("arg", *argv, left < room ? left : room);
		left = (*argv)[len] ? 0 : left - len;
	}
}

/* Sets a variable that tells a program how much it gets, where the user has set none. */
static void set_cap(char *word)
{
	char *value = strncmp(word, "cap=", 4) ? NULL : strchr(word + 4, '=');

	if (!value)
		return;
	*value = 0;
	if (setenv(word + 4, value + 1, 0))
		die(REFUSED, "out of memory");
	*value = '=';
}

static const char hung_up[] = "it hung up";
static int connected = -1; /* a connection that was made early */

/* Opens a connection, whose sends have a time limit. Returns -1 with errno set where it cannot. */
static int open_connection(void)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), error;
	struct timeval timeout = { .tv_sec = TIMEOUT_S };

	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	if (fd < 0 || !TEMP_FAILURE_RETRY(connect(fd, (struct sockaddr *)&server, sizeof(server))))
		return fd;
	error = errno;
	close(fd);
	errno = error;
	return -1;
}

/*
 * Waits for the id of the call, which is being begun meanwhile. The daemon finds out who is there
 * in the same time. Who started this ends it by closing the descriptor, without a word.
 */
static void wait_for_call(int fd)
{
	static char id[ID_MAX];
	size_t len = 0;
	ssize_t got;

	connected = open_connection();
	while (len < sizeof(id) - 1 && !memchr(id, '\n', len)) {
		got = TEMP_FAILURE_RETRY(read(fd, id + len, sizeof(id) - 1 - len));
		if (got <= 0)
			exit(REFUSED);
		len += got;
	}
	id[strcspn(id, "\n")] = 0;
	values[CALL] = id;
}

/*
 * Returns NULL when this process is in its cgroup, `hung_up` when there was no answer, `sealed`
 * where nothing can be asked at all, or why the daemon is taken to be away: it is only where nobody
 * listens.
 */
static const char *enter_cgroup(int what)
{
	const char *done = what == SESSION ? "session=" : "call=", *second = reply;
	int fd = connected >= 0 ? connected : open_connection();
	struct timeval timeout = { .tv_sec = TIMEOUT_S };
	unsigned int seconds;
	ssize_t len = -1;
	char rest;

	connected = -1;
	if (fd >= 0)
		len = TEMP_FAILURE_RETRY(send(fd, request, request_len, MSG_NOSIGNAL));
	if (len < 0 && what != SESSION && is_sealed(errno)) {
		close(fd);
		return sealed;
	}
	/* A daemon may refuse and hang up before it reads the request: its reply still counts. */
	while (len > 0 || errno == EPIPE || errno == ECONNRESET) {
		setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
		memset(reply, 0, sizeof(reply));
		len = TEMP_FAILURE_RETRY(recv(fd, reply, PACKET_MAX, MSG_TRUNC));
		if (len > PACKET_MAX || (len > 0 && reply[len - 1]))
			*reply = 0;
		second = reply + strlen(reply) + 1;
		if (len >= 0 && (strcmp(reply, "WAIT") ||
				 sscanf(second, "seconds=%5u%c", &seconds, &rest) != 1))
			break;
		timeout.tv_sec = TIMEOUT_S + (len > 0 ? seconds : 0);
	}
	if (fd >= 0)
		close(fd);
	if (!len || (len < 0 && (errno == EPIPE || errno == ECONNRESET)))
		return hung_up;
	if (len < 0 && errno != ENOENT && errno != ECONNREFUSED)
		die(REFUSED, "cannot ask the daemon at '%s': %s", server.sun_path,
		    errno == EAGAIN ? "no reply in time" : strerror(errno));
	if (len < 0)
		return strerror(errno);
	if (!strcmp(reply, "OK") && !strncmp(second, done, strlen(done))) {
		tell_waiter(second + strlen(done));
		/* putenv() points into the buffer, which stays. An empty word ends the list. */
		for (char *word = (char *)second; *word; word += strlen(word) + 1) {
			if (!strncmp(word, "env=", 4) && putenv(word + 4))
				die(REFUSED, "out of memory");
			set_cap(word);
			if (!strncmp(word, "say=", 4) && speaks())
				say_in_options("warning: ", word + 4);
		}
		return NULL;
	}
	if (strcmp(reply, "ERR"))
		die(REFUSED, "'%s' does not speak the attach protocol", server.sun_path);
	second += strlen(second) + 1;
	say_in_options("", *second ? second : "refused without a reason");
	exit(REFUSED);
}

/* Executes the tool as Python's subprocess does: no file is handed to a shell. Returns errno. */
static int execute(char **argv)
{
	const char *path = strchr(argv[0], '/') ? "" : getenv("PATH"), *end;
	int found = 0;
	char *file;

	for (path = path ?: "/bin:/usr/bin";; path = end + 1) {
		end = strchrnul(path, ':');
		if (asprintf(&file, "%.*s%s%s", (int)(end - path), path, end > path ? "/" : "",
			     argv[0]) < 0)
			return ENOMEM;
		execv(file, argv);
		if (errno != ENOENT && errno != ENOTDIR && !found)
			found = errno;
		if (!*end)
			return found ?: errno;
	}
}

/*
 * A tool that signals its process group must not take along who started it. In a terminal it stays:
 * ^C is sent to the group there, and only the foreground group may read.
 */
static void leave_group(void)
{
	int tty = open("/dev/tty", O_RDONLY | O_NOCTTY | O_CLOEXEC);

	if (tty >= 0)
		close(tty);
	else if (errno == ENXIO && getpgrp() == getpgid(getppid()))
		setpgid(0, 0);
}

/* Becomes the tool of the command line, or ends this process. */
__attribute__((noreturn)) static void launch(int argc, char **argv)
{
	const char *declared = argc > 1 ? argv[1] : NULL;
	bool was_declared = is_declared(&argc, &argv);
	int i = parse_options(argc, argv);
	struct stat file_stat;
	int what = values[CALL] || values[CALL_FD] ? CALL : values[SESSION] ? SESSION : NAME;
	const char *policy = values[AWAY], *run = getenv("AGENTCG_RUN_DIR"), *away, *is;
	const char *policy_source = "--on-unavailable";
	const char *file = what == SESSION ? "admin/attach.sock" : "agent/attach.sock";

	if (i >= argc || !*argv[i])
		die(REFUSED, "no command given (see %s --help)", program);
	for (int o = SESSION; o < KEYS && what != NAME; o++)
		if (values[o] && o != what)
			die(REFUSED, "option '--%s' cannot go with '--%s'", names[o], names[what]);
	if (values[USER] && what != SESSION)
		die(REFUSED, "option '--user' goes with '--session' only");
	if (!policy && what == NAME) {
		policy = getenv("AGENTCG_ON_UNAVAILABLE");
		policy_source = "$AGENTCG_ON_UNAVAILABLE";
	}
	if (!policy || !*policy)
		policy = what == NAME ? "run" : "refuse";
	if (strcmp(policy, "run") && strcmp(policy, "refuse"))
		die(REFUSED, "%s '%s' is neither 'run' nor 'refuse'", policy_source, policy);
	if (!run || !*run)
		run = "/run/agentcgroup";
	if (!values[SOCKET] && asprintf(&values[SOCKET], "%s/%s", run, file) < 0)
		die(REFUSED, "out of memory");
	if (strlen(values[SOCKET]) >= sizeof(server.sun_path))
		die(REFUSED, "socket path too long: '%s'", values[SOCKET]);
	strcpy(server.sun_path, values[SOCKET]);

	if (values[CALL_FD])
		wait_for_call(atoi(values[CALL_FD]));
	make_request(what, argc - i, argv + i);
	if (what == NAME && speaks() && !was_declared)
		start_waiter(&server);
	away = was_declared ? wait_to_be_moved(declared, !strcmp(policy, "run")) :
			      enter_cgroup(what);
	if (away == sealed)
		declare(request + strlen("ACG1") + 1, request_len - strlen("ACG1") - 1, argc, argv);
	/* The daemon is being started anew, or turns away those who ask too much at a time. */
	for (unsigned int wait_ms = 25; away == hung_up && wait_ms < 3000; wait_ms *= 2) {
		usleep(wait_ms * 1000);
		away = enter_cgroup(what);
	}
	if (away == hung_up)
		die(REFUSED, "daemon at '%s' hangs up; command not run", server.sun_path);
	is = was_declared || away == sealed ? "cannot be asked" : "is away";
	if (away && !strcmp(policy, "refuse"))
		die(REFUSED, "daemon at '%s' %s: %s; command not run", server.sun_path, is, away);
	if (away)
		say("%s: warning: daemon at '%s' %s: %s; running without limits", program,
		    server.sun_path, is, away);
	if (values[USER])
		become_user(values[USER]);
	if (values[OWN_GROUP])
		leave_group();
	if (values[ERROR_FD] && !fcntl(atoi(values[ERROR_FD]), F_SETFD, FD_CLOEXEC)) {
		errno = execute(argv + i);
		dprintf(atoi(values[ERROR_FD]), "%d", errno);
		exit(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC);
	}
	execvp(argv[i], argv + i);
	if (errno == EACCES && !stat(argv[i], &file_stat) && S_ISDIR(file_stat.st_mode))
		errno = EISDIR;
	die(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC, "%s: %s", argv[i], strerror(errno));
}

#endif
