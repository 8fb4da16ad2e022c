// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg: the command. `agentcg exec` is run before every tool call and `agentcg hook` after it,
 * and starting Python for them would cost many times what the call itself does; everything else
 * goes to the Python command.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	char path[PATH_MAX + sizeof("agentcg-exec")];
	ssize_t len = readlink("/proc/self/exe", path, PATH_MAX);
	const char *name = "agentcg-cli";

	if (argc > 1 && !strcmp(argv[1], "exec")) {
		name = "agentcg-exec";
		argv++;
	} else if (argc > 1 && !strcmp(argv[1], "hook")) {
		name = "agentcg-hook";
		argv++;
	}
	argv[0] = strcmp(name, "agentcg-exec") ? (char *)name : "agentcg exec";
	while (len > 0 && path[len - 1] != '/')
		len--;
	if (len > 0) {
		strcpy(path + len, name);
		execv(path, argv);
	}
	/* Not installed side by side, or /proc is not mounted. */
	if (len <= 0 || errno == ENOENT)
		execvp(name, argv);
	fprintf(stderr, "agentcg: %s: %s\n", name, strerror(errno));
	return errno == ENOENT ? 127 : 126;
}
