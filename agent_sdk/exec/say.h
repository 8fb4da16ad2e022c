// SPDX-License-Identifier: Apache-2.0
/* What the launcher says on stderr, and its exit statuses. */
#ifndef AGENTCG_SAY_H
#define AGENTCG_SAY_H

#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { REFUSED = 125, CANNOT_EXEC = 126, NOT_FOUND = 127 }; /* as env(1) has them */

static const char *program = "agentcg-exec"; /* what it is called by who started it */

/*
 * Replaces what a terminal takes for commands (C0 and C1 controls) or turns text around with, or
 * does not show: U+061C, U+200B to 200F, 2028 to 202E, 2060 to 206F, FEFF.
 */
static void make_printable(unsigned char *c)
{
	for (; *c; c++) {
		bool two =
			(*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0) || (*c == 0xd8 && c[1] == 0x9c);
		bool three = (*c == 0xe2 && c[1] == 0x80 && c[2] >= 0x8b && c[2] <= 0x8f) ||
			     (*c == 0xe2 && c[1] == 0x80 && c[2] >= 0xa8 && c[2] <= 0xae) ||
			     (*c == 0xe2 && c[1] == 0x81 && c[2] >= 0xa0 && c[2] <= 0xaf) ||
			     (*c == 0xef && c[1] == 0xbb && c[2] == 0xbf);

		if (two || three || *c < ' ' || *c == 0x7f)
			memset(c, '?', three ? 3 : two ? 2 : 1);
	}
}

/* One line on stderr. A stderr that nobody reads must not kill what is to become the tool. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	sighandler_t before = signal(SIGPIPE, SIG_IGN);
	char *line = NULL;
	va_list args;

	va_start(args, format);
	if (vasprintf(&line, format, args) >= 0) {
		make_printable((unsigned char *)line);
		dprintf(STDERR_FILENO, "%s\n", line);
		free(line);
	}
	va_end(args);
	signal(SIGPIPE, before);
}

#define die(status, format, ...) exit((say("%s: " format, program, ##__VA_ARGS__), status))

#endif
