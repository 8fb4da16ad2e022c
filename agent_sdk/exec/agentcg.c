// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg: the command. `agentcg exec` is run before every tool call and `agentcg hook` after it,
 * and starting Python for them would cost many times what the call itself does; everything else
 * goes to the Python command. `agentcg exec` is the launcher itself, because to execute one more
 * program would be a quarter of what a call costs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "beside.h"
#include "launch.h"

int main(int argc, char **argv)
{
	const char *name = "agentcg-cli";

	if (argc > 1 && !strcmp(argv[1], "exec")) {
		argv[1] = (char *)FRONT;
		launch(argc - 1, argv + 1);
	}
	if (argc > 1 && !strcmp(argv[1], "hook")) {
		name = "agentcg-hook";
		argv++;
	}
	argv[0] = (char *)name;
	execute_beside(name, argv);
	/* Not installed side by side, or /proc is not mounted. */
	if (errno == ENOENT)
		execvp(name, argv);
	fprintf(stderr, "agentcg: %s: %s\n", name, strerror(errno));
	return errno == ENOENT ? 127 : 126;
}
