// SPDX-License-Identifier: Apache-2.0
/* Another user, that a command is to run as. */
#ifndef AGENTCG_USER_H
#define AGENTCG_USER_H

#include <errno.h>
#include <grp.h>
#include <sys/types.h>

#include "say.h"

/* Becomes the user of UID:GID:GID,..., where the last are all groups it is to be in. */
static void become_user(const char *ids)
{
	gid_t groups[256];
	unsigned int uid, gid;
	size_t count = 0;
	int end = 0;

	if (sscanf(ids, "%u:%u%n", &uid, &gid, &end) != 2)
		die(REFUSED, "--user '%s' is not UID:GID:GID,... in numbers", ids);
	for (ids += end; (*ids == ':' || *ids == ',') && count < 256; ids += end)
		if (sscanf(ids + 1, "%u%n", &groups[count++], &end) != 1)
			die(REFUSED, "--user: '%s' is no list of groups", ids);
		else
			end++;
	if (*ids)
		die(REFUSED, "--user: '%s' is too much", ids);
	if (setgroups(count, groups) || setgid(gid) || setuid(uid))
		die(REFUSED, "cannot become user %u with group %u: %s", uid, gid, strerror(errno));
}

#endif
