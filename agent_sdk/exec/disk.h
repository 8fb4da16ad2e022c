// SPDX-License-Identifier: Apache-2.0
/* Whether a file system is full, which no limit of a call tells. */
#ifndef AGENTCG_DISK_H
#define AGENTCG_DISK_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/statvfs.h>

enum { DISK_LEAST = 1 << 20 }; /* with less than that free in bytes, writing has begun to fail */

/* Says in `words` that the file system of a directory is full; false: it is not. */
static bool is_full(const char *directory, char *words, size_t size)
{
	struct statvfs fs;

	if (!directory || !*directory || statvfs(directory, &fs) || !fs.f_blocks)
		return false;
	if (fs.f_bavail * fs.f_frsize < DISK_LEAST)
		snprintf(
			words, size,
			"The file system of %s is full (%llu KiB free): write elsewhere, or remove "
			"what this task has made and needs no more.",
			directory, (unsigned long long)(fs.f_bavail * fs.f_frsize >> 10));
	else if (fs.f_files && !fs.f_favail)
		snprintf(words, size,
			 "The file system of %s can hold no more files (inodes): write elsewhere, "
			 "or "
			 "remove what this task has made and needs no more.",
			 directory);
	else
		return false;
	return true;
}

/* The same for where a command writes: its working directory, and where temporary files go. */
static bool is_disk_full(const char *working_directory, char *words, size_t size)
{
	const char *temporary = getenv("TMPDIR");
	char *path = realpath(working_directory ?: ".", NULL);
	bool full = is_full(path, words, size);

	free(path);
	return full || is_full(temporary && *temporary ? temporary : "/tmp", words, size);
}

#endif
