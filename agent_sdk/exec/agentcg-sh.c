// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg-sh: a shell, or any command, in a call of its own, for agents that let their shell be
 * chosen. It asks the daemon for a call and becomes the shell: nothing of arguments, streams,
 * terminal, signals and exit status passes through it. Where it gets no call, the shell runs all
 * the same, unless $AGENTCG_ON_UNAVAILABLE is `refuse`.
 *
 *   agentcg-sh -c COMMAND ...      as the shell would be started
 *   agentcg-sh 'SCRIPT'            a shell with -c SCRIPT ($CLAUDE_CODE_SHELL_PREFIX)
 *   agentcg-sh PROGRAM ARGUMENT... the program itself (a server of MCP)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ask.h"
#include "say.h"

enum { ARGS_MAX = 4096, ASK_MS = 10000, ATTEMPTS = 6 };

/* Set for what runs in a call of this program, so that the same program inside begins no other. */
static const char inside[] = "AGENTCG_SH";

/* Whether this process is in the call that $AGENTCG_SH names: the variable alone is inherited by
 * what has left the call as well.
 */
static bool is_inside(void)
{
	const char *call = getenv(inside);
	char text[8192];
	ssize_t len;
	int fd;

	if (!call || !*call)
		return false;
	fd = open("/proc/self/cgroup", O_RDONLY | O_CLOEXEC);
	len = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	if (len < 0)
		return false;
	text[len] = 0;
	return strstr(text, call);
}

/* The shell that is started: $AGENTCG_SHELL, or bash, which agents write their commands for. */
static char *shell_path;

static void choose_shell(void)
{
	shell_path = getenv("AGENTCG_SHELL");
	if (!shell_path || !*shell_path)
		shell_path = access("/bin/bash", X_OK) ? "/bin/sh" : "/bin/bash";
}

/* Makes the command line to be executed. Returns NULL where there is no memory. */
static char **command_line(int argc, char **argv)
{
	char **command = calloc(argc + 3, sizeof(*command)), **to = command;
	bool is_shell = argc == 1 || argv[1][0] == '-' || argv[1][0] == '+';

	if (!command)
		return NULL;
	choose_shell();
	if (is_shell || argc == 2)
		*to++ = shell_path;
	if (!is_shell && argc == 2)
		*to++ = "-c";
	for (int i = 1; i < argc; i++)
		*to++ = argv[i];
	return command;
}

/* Whether it is for what begins no call: our own hooks and commands, or what is in one already. */
static bool needs_no_call(char **command)
{
	const char *script = command[1] && !strcmp(command[1], "-c") ? command[2] : NULL;
	const char *program = script ?: command[0], *end;

	if (is_inside())
		return true;
	end = program + strcspn(program, " \t");
	while (end > program && memchr(program, '/', end - program))
		program = (const char *)memchr(program, '/', end - program) + 1;
	return !strncmp(program, "agentcg", 7) &&
	       (program[7] == ' ' || program[7] == '-' || !program[7]);
}

static void make_question(struct question *question, char **command)
{
	const char *hint = getenv("AGENT_RESOURCE_HINT");
	ssize_t left = ARGS_MAX, len;
	char count[16];
	int argc = 0;

	while (command[argc])
		argc++;
	begin_question(question, "begin");
	if (hint && *hint)
		add_word(question, "hint", hint, 256);
	add_word(question, "by_script", "yes", 3);
	snprintf(count, sizeof(count), "%d", argc);
	add_word(question, "argc", count, sizeof(count));
	for (; *command && left > 0; command++) {
		len = add_word(question, "arg", *command, left);
		if (len < 0 || (*command)[len])
			break;
		left -= len;
	}
}

/* Takes over what the daemon wants to be set for the tool. putenv() points into the answer. */
static void set_environment(char *answer)
{
	char call[128];

	for (char *word = answer + strlen(answer) + 1; *word; word += strlen(word) + 1) {
		char *name = word + 4, *value = strchr(name, '=');

		if (!strncmp(word, "env=", 4))
			putenv(name);
		if (strncmp(word, "cap=", 4) || !value)
			continue;
		*value = 0;
		setenv(name, value + 1, 0);
		*value = '=';
	}
	if (!strncmp(answer + sizeof("OK"), "call=", 5) &&
	    snprintf(call, sizeof(call), "/call-%s", answer + sizeof("OK") + 5) < (int)sizeof(call))
		setenv(inside, call, 1);
}

/* Enters a call. Returns NULL, or why there is none. */
static const char *enter_call(char **command)
{
	static char answer[ANSWER_MAX + 2];
	static struct question question;
	const char *why;

	make_question(&question, command);
	for (int attempt = 0; !ask(&question, answer, ASK_MS, true); attempt++) {
		if (errno != ECONNRESET || attempt == ATTEMPTS)
			return strerror(errno);
		usleep(25000 << attempt); /* the daemon is being started anew */
	}
	if (!strcmp(answer, "OK")) {
		set_environment(answer);
		return NULL;
	}
	why = answer + sizeof("ERR");
	why += strlen(why) + 1;
	return *why ? why : "refused without a reason";
}

/* What follows the last slash of a path. */
static const char *file_of(const char *path)
{
	const char *slash = strrchr(path, '/');

	return slash ? slash + 1 : path;
}

int main(int argc, char **argv)
{
	const char *policy = getenv("AGENTCG_ON_UNAVAILABLE"), *why = NULL, *path;
	char **command = command_line(argc, argv), *name;

	program = "agentcg-sh";
	if (!command)
		die(REFUSED, "out of memory");
	path = command[0];
	if (!needs_no_call(command))
		why = enter_call(command);
	if (why && policy && !strcmp(policy, "refuse"))
		die(REFUSED, "no call: %s; command not run", why);
	if (path == shell_path && argv[0][0] == '-' && asprintf(&name, "-%s", file_of(path)) > 0)
		command[0] = name;
	execvp(path, command);
	die(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC, "%s: %s", path, strerror(errno));
}
