// SPDX-License-Identifier: Apache-2.0
// clang-format Language: Cpp
/* The launcher's options, what is said of them, and what may have been meant by others. */
#ifndef AGENTCG_OPTIONS_H
#define AGENTCG_OPTIONS_H

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "say.h"

#include "intent_fields.h" /* INTENT_FIELDS and INTENT_HELP, made from the message Intent */

#define FRONT "agentcg exec"

/* Options before KEYS are keys of the request; those from NAME on are for `begin` alone. */
#define FIELD(field, option) FIELD_##field,
enum { CALL, SESSION, NAME, INTENT_FIELDS(FIELD) KEYS };
enum { SOCKET = KEYS, AWAY, ERROR_FD, CALL_FD, USER, HELP, VERSION, OWN_GROUP, QUIET, OPTIONS };
/*
 * These are for the SDK: it gets errno from ERROR_FD when the tool cannot be executed, and writes
 * the id of the call to CALL_FD, a word that a newline ends, where it has none yet when it starts
 * this.
 */
static const char *const verbs[] = { [CALL] = "attach", [SESSION] = "enter", [NAME] = "begin" };
#define OPTION(field, option) [FIELD_##field] = option,
static const char *const names[OPTIONS] = { [CALL] = "call",	       [SESSION] = "session",
					    [NAME] = "name",	       [SOCKET] = "socket",
					    [HELP] = "help",	       [VERSION] = "version",
					    [AWAY] = "on-unavailable", [ERROR_FD] = "error-fd",
					    [CALL_FD] = "call-fd",     [OWN_GROUP] = "own-group",
					    [USER] = "user",	       [QUIET] = "quiet",
					    INTENT_FIELDS(OPTION) };
static char *values[OPTIONS];
static const char version[] = "agentcg-exec " AGENTCG_VERSION "\n"; /* from pyproject.toml */
static const char *hint_source = "--hint";
static const char help[] =
	"usage: %s [options] [--] command [argument]...\n"
	"Runs a command as a new call, or with --call ID in an open one, or as root with --session "
	"ID\n"
	"as the agent of a session. Options of a new call:\n"
	"  --name NAME  what it is called (default: the command's file name)\n" INTENT_HELP
	"  ($AGENT_RESOURCE_HINT is --hint where that is not given)\n"
	"Sizes: 512M, 1.5G, 2GiB (powers of 1,024), or bytes. Times: 90 (seconds), 1.5s, 250ms, "
	"10m.\n"
	"Other options:\n"
	"  --socket PATH  the daemon's (default: below $AGENTCG_RUN_DIR or /run/agentcgroup)\n"
	"  --on-unavailable run|refuse  what to do where the daemon is away\n"
	"      (default: $AGENTCG_ON_UNAVAILABLE, or run for a new call)\n"
	"  --own-group  the command gets a process group of its own, unless there is a terminal\n"
	"  --user UID:GID:GID,...  with --session: the user and all groups of the command\n"
	"  --quiet  no word about what the call got or how it ended; `agentcg exec` then becomes "
	"the\n"
	"      command itself instead of waiting for it\n"
	"Exit status: of the command; 125 refused or bad usage, 126 it cannot run, 127 not found\n";

/* How many characters of one word come in the other, in their order. */
static size_t in_common(const char *a, const char *b)
{
	size_t row[64] = {}, n = strlen(b);

	for (; *a && n < 63; a++)
		for (size_t i = 0, before = 0, old; i < n; i++, before = old) {
			old = row[i + 1];
			row[i + 1] = *a == b[i] ? before + 1 : row[i] > old ? row[i] : old;
		}
	return n < 63 ? row[n] : 0;
}

/* Returns the option that is nearest to a word, or NULL where none is near. */
static const char *nearest(const char *word)
{
	const char *best = NULL;
	double share = 0.6;

	for (int o = 0; o < OPTIONS; o++) {
		double found = 2.0 * in_common(word, names[o]) / (strlen(word) + strlen(names[o]));

		if (found > share) {
			share = found;
			best = names[o];
		}
	}
	return best;
}

__attribute__((noreturn)) static void bad_option(char *word)
{
	const char *meant = NULL;

	word[strcspn(word, "=")] = 0;
	if (!strncmp(word, "--", 2) && strlen(word) < 64)
		meant = nearest(word + 2);
	die(REFUSED, "there is no option '%s'%s%s%s (see %s --help)", word,
	    meant ? "; did you mean '--" : "", meant ?: "", meant ? "'?" : "", program);
}

/* Ends the program after it has printed, with 1 where that could not be written. */
__attribute__((noreturn)) static void end_printed(int result)
{
	if (result < 0 || fflush(stdout))
		die(1, "the output cannot be written: %s", strerror(errno));
	exit(0);
}

/* Returns the index of the command. */
static int parse_options(int argc, char **argv)
{
	struct option options[OPTIONS + 1] = {};
	int o;

	if (argc > 0 && !strcmp(argv[0], FRONT))
		program = FRONT;
	for (o = 0; o < OPTIONS; o++)
		options[o] = (struct option){ names[o], o < HELP, NULL, o };
	opterr = 0;
	while ((o = getopt_long(argc, argv, "+:", options, NULL)) >= 0) {
		if (o == ':')
			die(REFUSED, "option '%s' needs a value (see %s --help)", argv[optind - 1],
			    program);
		if (o == '?')
			bad_option(argv[optind - 1]);
		if (o == HELP)
			end_printed(printf(help, program));
		if (o == VERSION)
			end_printed(fputs(version, stdout));
		values[o] = optarg ?: "";
	}
	return optind;
}

/* Whether to speak of what the call got and how it ended: `agentcg-exec` is for programs, which ask
 * for that themselves.
 */
static bool speaks(void)
{
	return !values[QUIET] && !strcmp(program, FRONT);
}

/* Says a sentence of the daemon's; a field that it begins with is named as it was given here. */
static void say_in_options(const char *what, const char *sentence)
{
	size_t len = strcspn(sentence, ":");
	char name[64];

	for (int o = 0; o < KEYS && len < sizeof(name); o++) {
		snprintf(name, sizeof(name), "%s", names[o]);
		for (char *c = name; *c; c++)
			*c = *c == '-' ? '_' : *c;
		if (strlen(name) != len || strncmp(name, sentence, len))
			continue;
		if (o == FIELD_hint)
			say("%s: %s%s%s", program, what, hint_source, sentence + len);
		else
			say("%s: %s--%s%s", program, what, names[o], sentence + len);
		return;
	}
	say("%s: %s%s", program, what, sentence);
}

#endif
