// SPDX-License-Identifier: Apache-2.0
/*
 * A question to the daemon, for programs that go on whatever the answer is: they stand between an
 * agent and its tool, and must not be in the way.
 */
#ifndef AGENTCG_ASK_H
#define AGENTCG_ASK_H

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "retry.h"

enum { QUESTION_MAX = 16384, ANSWER_MAX = 16384 };

struct question {
	char text[QUESTION_MAX];
	size_t len;
};

static void begin_question(struct question *question, const char *verb)
{
	question->len = sprintf(question->text, "ACG1%c%s", 0, verb) + 1;
}

/* Appends key=value with at most `max` bytes of value, cut between UTF-8 characters; returns how
 * many, or -1 where nothing fits any more.
 */
static ssize_t add_word(struct question *question, const char *key, const char *value, size_t max)
{
	size_t room = QUESTION_MAX - question->len, need = strlen(key) + 2, len;

	if (room <= need)
		return -1;
	if (max > room - need)
		max = room - need;
	len = strnlen(value, max);
	if (value[len])
		while (len && (value[len] & 0xc0) == 0x80)
			len--;
	question->len +=
		sprintf(question->text + question->len, "%s=%.*s", key, (int)len, value) + 1;
	return len;
}

/* Finds the daemon's socket for agents, which need not be there. */
static bool agent_socket(struct sockaddr_un *server)
{
	const char *run = getenv("AGENTCG_RUN_DIR");
	int len = snprintf(server->sun_path, sizeof(server->sun_path), "%s/agent/attach.sock",
			   run && *run ? run : "/run/agentcgroup");

	server->sun_family = AF_UNIX;
	return len < (int)sizeof(server->sun_path);
}

static void wait_at_most(int fd, unsigned int ms)
{
	struct timeval timeout = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 };

	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
}

/*
 * Asks, and waits for `ms`, or longer where the daemon says WAIT and `patient`. The answer's words
 * each end in a NUL, and an empty one ends them. Returns whether there is an answer; else errno is
 * set.
 */
static bool ask(const struct question *question, char answer[ANSWER_MAX + 2], unsigned int ms,
		bool patient)
{
	struct sockaddr_un server;
	unsigned int seconds;
	ssize_t len = -1;
	int fd = agent_socket(&server) ? socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0) : -1;

	if (fd < 0)
		return false;
	wait_at_most(fd, ms);
	if (!TEMP_FAILURE_RETRY(connect(fd, (struct sockaddr *)&server, sizeof(server))) &&
	    TEMP_FAILURE_RETRY(send(fd, question->text, question->len, MSG_NOSIGNAL)) >= 0)
		do {
			memset(answer, 0, ANSWER_MAX + 2);
			len = TEMP_FAILURE_RETRY(recv(fd, answer, ANSWER_MAX, 0));
			if (len > 0 && !strcmp(answer, "WAIT") && patient &&
			    sscanf(answer + sizeof("WAIT"), "seconds=%5u", &seconds) == 1)
				wait_at_most(fd, ms + seconds * 1000);
		} while (len > 0 && !strcmp(answer, "WAIT"));
	if (len >= 0)
		errno = len ? 0 : ECONNRESET;
	seconds = errno;
	close(fd);
	errno = seconds;
	return len > 0;
}

#endif
