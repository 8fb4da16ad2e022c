// SPDX-License-Identifier: Apache-2.0
/*
 * What the launcher asks the daemon for: to be put into a cgroup, by a packet of words over its
 * attach socket (docs/protocol.md).
 */
#ifndef AGENTCG_ENTER_H
#define AGENTCG_ENTER_H

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "options.h"
#include "retry.h"
#include "say.h"
#include "sealed.h"
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
 * Waits for the id of the call, which is being begun meanwhile. Who started this ends it by closing
 * the descriptor, without a word.
 */
static void wait_for_call(int fd)
{
	static char id[ID_MAX];
	size_t len = 0;
	ssize_t got;

	while (len < sizeof(id) - 1 && !memchr(id, '\n', len)) {
		got = TEMP_FAILURE_RETRY(read(fd, id + len, sizeof(id) - 1 - len));
		if (got <= 0)
			exit(REFUSED);
		len += got;
	}
	id[strcspn(id, "\n")] = 0;
	values[CALL] = id;
}

/* Does what a reply asks for whose second word and those after it are `words`. */
static void take_words(const char *words)
{
	/* putenv() points into the buffer, which stays. An empty word ends the list. */
	for (char *word = (char *)words; *word; word += strlen(word) + 1) {
		if (!strncmp(word, "env=", 4) && putenv(word + 4))
			die(REFUSED, "out of memory");
		set_cap(word);
		if (!strncmp(word, "say=", 4) && speaks())
			say_in_options("warning: ", word + 4);
	}
}

/* Receives a reply of words that each end in a NUL. Returns recv()'s result. */
static ssize_t receive(int fd, time_t most_s)
{
	struct timeval timeout = { .tv_sec = most_s };
	ssize_t len;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	memset(reply, 0, sizeof(reply));
	len = TEMP_FAILURE_RETRY(recv(fd, reply, PACKET_MAX, MSG_TRUNC));
	if (len > PACKET_MAX || (len > 0 && reply[len - 1]))
		*reply = 0;
	return len;
}

/*
 * Returns NULL when this process is in its cgroup, `hung_up` when there was no answer, `sealed`
 * where nothing can be asked at all, or why the daemon is taken to be away: it is only where nobody
 * listens.
 */
static const char *enter_cgroup(int what)
{
	const char *done = what == SESSION ? "session=" : "call=", *second = reply;
	int fd = open_connection();
	unsigned int seconds = 0;
	ssize_t len = -1;
	char rest;

	if (fd >= 0)
		len = TEMP_FAILURE_RETRY(send(fd, request, request_len, MSG_NOSIGNAL));
	if (len < 0 && what != SESSION && is_sealed(errno)) {
		close(fd);
		return sealed;
	}
	/* A daemon may refuse and hang up before it reads the request: its reply still counts. */
	while (len > 0 || errno == EPIPE || errno == ECONNRESET) {
		len = receive(fd, TIMEOUT_S + seconds);
		second = reply + strlen(reply) + 1;
		if (len >= 0 && (strcmp(reply, "WAIT") ||
				 sscanf(second, "seconds=%5u%c", &seconds, &rest) != 1))
			break;
		if (len <= 0)
			seconds = 0;
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
		take_words(second);
		return NULL;
	}
	if (strcmp(reply, "ERR"))
		die(REFUSED, "'%s' does not speak the attach protocol", server.sun_path);
	second += strlen(second) + 1;
	say_in_options("", *second ? second : "refused without a reason");
	exit(REFUSED);
}

/*
 * Enters the call of a ticket, which who started this has just asked for. Returns whether this
 * process is in it; where it is not, the call has not begun yet, or never will.
 */
static bool enter_by_ticket(void)
{
	int fd = open_connection();
	ssize_t len = -1;

	request_len = sprintf(request, "ACG1%c%s", 0, verbs[CALL]) + 1;
	add("ticket", values[TICKET], -1);
	if (fd >= 0)
		len = TEMP_FAILURE_RETRY(send(fd, request, request_len, MSG_NOSIGNAL));
	if (len > 0)
		len = receive(fd, TIMEOUT_S);
	if (fd >= 0)
		close(fd);
	if (len <= 0 || strcmp(reply, "OK"))
		return false;
	take_words(reply + sizeof("OK"));
	return true;
}

#endif
