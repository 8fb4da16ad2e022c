// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg-hook: what an agent runs after each tool. It reads what the agent says of the tool, asks
 * the daemon what became of the tool's call, and tells the model where there is something to tell.
 * Whatever goes wrong, it is silent and ends with 0: the agent and its tool never feel it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ask.h"
#include "disk.h"
#include "json.h"
#include "say.h"

enum { INPUT_MAX = 8 << 20, COMMAND_MAX = 8192, LOG_MAX = 256 << 10, ALL_S = 5, ANSWER_MS = 4000 };

/*
 * The events after a tool, in the dialects of the agents; or those at which the model can be told
 * of all tools since the last one, because what is said after a tool never reaches it.
 */
static const struct {
	const char *agent, *events[3];
	bool of_all;
} dialects[] = {
	{ "claude", { "PostToolUse", "PostToolUseFailure" }, false },
	{ "codex", { "PostToolUse" }, false },
	{ "gemini", { "AfterTool" }, false },
	{ "openhands", { "Stop", "UserPromptSubmit" }, true },
};

enum { DIALECTS = sizeof(dialects) / sizeof(*dialects) };

__attribute__((noreturn)) static void give_up(int number)
{
	(void)number;
	_exit(0);
}

/* Appends a line to $AGENTCG_HOOK_LOG or ~/.local/state/agentcgroup/hook.log. */
__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
	const char *given = getenv("AGENTCG_HOOK_LOG"), *home = getenv("HOME");
	char path[PATH_MAX], line[512], *c;
	time_t now = time(NULL);
	struct stat stat;
	va_list args;
	int fd, len;

	if (given && *given)
		snprintf(path, sizeof(path), "%s", given);
	else if (!home || *home != '/' ||
		 snprintf(path, sizeof(path), "%s/.local/state/agentcgroup/hook.log", home) >=
			 (int)sizeof(path))
		return;
	for (c = strchr(path + 1, '/'); c && !(given && *given); c = strchr(c + 1, '/')) {
		*c = 0;
		mkdir(path, 0700);
		*c = '/';
	}
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
	if (fd < 0)
		return;
	len = strftime(line, sizeof(line), "%Y-%m-%dT%H:%M:%SZ ", gmtime(&now));
	va_start(args, format);
	vsnprintf(line + len, sizeof(line) - len - 1, format, args);
	va_end(args);
	make_printable((unsigned char *)line);
	if (!fstat(fd, &stat) && S_ISREG(stat.st_mode)) {
		if (stat.st_size > LOG_MAX && ftruncate(fd, 0))
			len = 0;
		dprintf(fd, "%s\n", line);
	}
	close(fd);
}

/* Reads all of standard input. Returns NULL where it is too much, or none. */
static char *read_input(void)
{
	char *text = malloc(INPUT_MAX + 1), rest[4096];
	size_t len = 0;
	ssize_t got;

	while (text && len < INPUT_MAX && (got = read(0, text + len, INPUT_MAX - len)) != 0)
		if (got > 0)
			len += got;
		else if (errno != EINTR)
			break;
	if (!text || !len)
		return NULL;
	if (len == INPUT_MAX) {
		/* The agent may wait until all is read. */
		while (read(0, rest, sizeof(rest)) > 0)
			;
		note("input of more than %d bytes", INPUT_MAX);
		return NULL;
	}
	text[len] = 0;
	return text;
}

static bool is_of(int dialect, const char *event)
{
	for (int i = 0; event && dialects[dialect].events[i]; i++)
		if (!strcmp(event, dialects[dialect].events[i]))
			return true;
	return false;
}

/* The command that a tool was given, to be freed; NULL: it was given none. */
static char *command_of(const char *input)
{
	char *command = json_find_text(input, "command");

	return command ?: json_find_text(input, "cmd");
}

/* Writes what there is to tell, in the one form that all three agents read. */
static void tell(const char *event, const char *text)
{
	fputs("{\"hookSpecificOutput\":{\"hookEventName\":", stdout);
	json_print(stdout, event);
	fputs(",\"additionalContext\":", stdout);
	json_print(stdout, text);
	puts("}}");
}

/* Puts together what the daemon says; returns whether the tool failed, as far as it knows. */
static bool gather(const char *answer, char *text, size_t size)
{
	bool failed = false;
	size_t len = 0;

	for (const char *word = answer + strlen(answer) + 1; *word; word += strlen(word) + 1) {
		if (!strncmp(word, "verdict=", 8) && strcmp(word, "verdict=ok"))
			failed = true;
		if (strncmp(word, "say=", 4) || !word[4] || len >= size)
			continue;
		len += snprintf(text + len, size - len, "%s%s",
				len ? " " : "agentcgroup: ", word + 4);
	}
	return failed;
}

static void after_tool(const char *document, const char *event)
{
	static char answer[ANSWER_MAX + 2], text[ANSWER_MAX + 1024];
	static struct question question;
	char *id = json_find_text(document, "tool_use_id"), disk[PATH_MAX + 256];
	char *command = command_of(json_find(document, "tool_input"));
	char *directory = json_find_text(document, "cwd");
	bool failed = !strcmp(event, "PostToolUseFailure");

	/* A tool that runs no command has no call; one in the background has not ended. */
	if (!command || json_find(json_find(document, "tool_response"), "backgroundTaskId"))
		return;
	begin_question(&question, "told");
	if (id && *id)
		add_word(&question, "tool_use_id", id, 128);
	add_word(&question, "command", command, COMMAND_MAX);
	if (!ask(&question, answer, ANSWER_MS, false)) {
		if (errno != ENOENT && errno != ECONNREFUSED)
			note("the daemon did not answer: %s", strerror(errno));
	} else if (!strcmp(answer, "OK")) {
		failed = gather(answer, text, sizeof(text)) || failed;
	} else if (strcmp(answer + sizeof("ERR"), "PERMISSION_DENIED")) {
		note("the daemon refused: %s", answer + sizeof("ERR"));
	}
	if (failed && is_disk_full(directory, disk, sizeof(disk)))
		snprintf(text + strlen(text), sizeof(text) - strlen(text), "%s%s",
			 *text ? " " : "agentcgroup: ", disk);
	make_printable((unsigned char *)text);
	if (*text)
		tell(event, text);
}

/*
 * Tells of all calls that the model has not been told of. An agent that is about to stop goes on,
 * or it would hear nothing before its next message from the user; the daemon has nothing to say
 * where that has been so a few times in a row.
 */
static void of_all(const char *event)
{
	static char answer[ANSWER_MAX + 2], text[ANSWER_MAX + 1024];
	static struct question question;

	begin_question(&question, "told");
	add_word(&question, "all", "1", 1);
	if (!strcmp(event, "Stop"))
		add_word(&question, "stops", "1", 1);
	if (!ask(&question, answer, ANSWER_MS, false)) {
		if (errno != ENOENT && errno != ECONNREFUSED)
			note("the daemon did not answer: %s", strerror(errno));
		return;
	}
	if (!strcmp(answer, "OK"))
		gather(answer, text, sizeof(text));
	else if (strcmp(answer + sizeof("ERR"), "PERMISSION_DENIED"))
		note("the daemon refused: %s", answer + sizeof("ERR"));
	if (!*text)
		return;
	make_printable((unsigned char *)text);
	fputs("{\"additionalContext\":", stdout);
	json_print(stdout, text);
	puts(strcmp(event, "Stop") ? "}" : ",\"decision\":\"deny\"}");
}

int main(int argc, char **argv)
{
	int dialect = 0;
	char *document, *event;
	const char *end;

	while (argc == 2 && dialect < DIALECTS && strcmp(argv[1], dialects[dialect].agent))
		dialect++;
	if (argc != 2 || dialect == DIALECTS) {
		program = "agentcg hook";
		say("%s: usage: %s claude|codex|gemini|openhands, as `agentcg setup` has agents "
		    "run it",
		    program, program);
		return 1; /* not 2, by which a hook stops an agent */
	}
	signal(SIGALRM, give_up);
	signal(SIGPIPE, SIG_IGN);
	alarm(ALL_S);
	document = read_input();
	if (!document)
		return 0;
	end = json_skip(document, 0);
	if (!end || *json_space(end) || *json_space(document) != '{') {
		note("input that is no JSON object, of %zu bytes", strlen(document));
		return 0;
	}
	event = json_find_text(document, "hook_event_name");
	if (!event) /* OpenHands */
		event = json_find_text(document, "event_type");
	if (!is_of(dialect, event))
		return 0;
	if (dialects[dialect].of_all)
		of_all(event);
	else
		after_tool(document, event);
	return 0;
}
