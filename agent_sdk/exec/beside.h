// SPDX-License-Identifier: Apache-2.0
/* Programs that are installed in the same directory as this one. */
#ifndef AGENTCG_BESIDE_H
#define AGENTCG_BESIDE_H

#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

/* Puts a program's name in place of the last part of a path of PATH_MAX bytes, and executes it. */
static void execute_in_place_of(char *path, const char *name, char **argv)
{
	size_t len = strlen(path);

	while (len && path[len - 1] != '/')
		len--;
	errno = ENOENT;
	if (len && len + strlen(name) < PATH_MAX) {
		strcpy(path + len, name);
		execv(path, argv);
	}
}

/* Executes a program that lies beside this one. Returns where it cannot, with errno set. */
static void execute_beside(const char *name, char **argv)
{
	char path[PATH_MAX] = {};

	if (readlink("/proc/self/exe", path, sizeof(path) - 1) > 0)
		execute_in_place_of(path, name, argv);
	else
		errno = ENOENT;
	if (errno != ENOENT)
		return;
	/* /proc may not be mounted here, or the file lie outside of what is seen. */
	strncpy(path, (const char *)getauxval(AT_EXECFN) ?: "", sizeof(path) - 1);
	execute_in_place_of(path, name, argv);
}

#endif
