// SPDX-License-Identifier: Apache-2.0
/*
 * The launcher: asks the daemon to put this process into a cgroup, then becomes the tool. It stays
 * one process with one pid, so that stdio, signals and exit status need no forwarding. As `agentcg
 * exec` it leaves a process in its place that waits for the tool, and says how the call ended.
 */
#ifndef AGENTCG_LAUNCH_H
#define AGENTCG_LAUNCH_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "enter.h"
#include "options.h"
#include "say.h"
#include "sealed.h"
#include "user.h"
#include "wait.h"

/* Executes the tool as Python's subprocess does: no file is handed to a shell. Returns errno. */
static int execute(char **argv)
{
	const char *path = strchr(argv[0], '/') ? "" : getenv("PATH"), *end;
	int found = 0;
	char *file;

	for (path = path ?: "/bin:/usr/bin";; path = end + 1) {
		end = strchrnul(path, ':');
		if (asprintf(&file, "%.*s%s%s", (int)(end - path), path, end > path ? "/" : "",
			     argv[0]) < 0)
			return ENOMEM;
		execv(file, argv);
		if (errno != ENOENT && errno != ENOTDIR && !found)
			found = errno;
		if (!*end)
			return found ?: errno;
	}
}

/*
 * A tool that signals its process group must not take along who started it. In a terminal it stays:
 * ^C is sent to the group there, and only the foreground group may read.
 */
static void leave_group(void)
{
	int tty = open("/dev/tty", O_RDONLY | O_NOCTTY | O_CLOEXEC);

	if (tty >= 0)
		close(tty);
	else if (errno == ENXIO && getpgrp() == getpgid(getppid()))
		setpgid(0, 0);
}

/* Becomes the tool of the command line, or ends this process. */
__attribute__((noreturn)) static void launch(int argc, char **argv)
{
	const char *declared = argc > 1 ? argv[1] : NULL;
	bool was_declared = is_declared(&argc, &argv), is_in;
	int i = parse_options(argc, argv);
	struct stat file_stat;
	int what = values[CALL] || values[CALL_FD] ? CALL : values[SESSION] ? SESSION : NAME;
	const char *policy = values[AWAY], *run = getenv("AGENTCG_RUN_DIR"), *away, *is;
	const char *policy_source = "--on-unavailable";
	const char *file = what == SESSION ? "admin/attach.sock" : "agent/attach.sock";

	if (i >= argc || !*argv[i])
		die(REFUSED, "no command given (see %s --help)", program);
	for (int o = SESSION; o < KEYS && what != NAME; o++)
		if (values[o] && o != what)
			die(REFUSED, "option '--%s' cannot go with '--%s'", names[o], names[what]);
	if (values[USER] && what != SESSION)
		die(REFUSED, "option '--user' goes with '--session' only");
	if (!policy && what == NAME) {
		policy = getenv("AGENTCG_ON_UNAVAILABLE");
		policy_source = "$AGENTCG_ON_UNAVAILABLE";
	}
	if (!policy || !*policy)
		policy = what == NAME ? "run" : "refuse";
	if (strcmp(policy, "run") && strcmp(policy, "refuse"))
		die(REFUSED, "%s '%s' is neither 'run' nor 'refuse'", policy_source, policy);
	if (!run || !*run)
		run = "/run/agentcgroup";
	if (!values[SOCKET] && asprintf(&values[SOCKET], "%s/%s", run, file) < 0)
		die(REFUSED, "out of memory");
	if (strlen(values[SOCKET]) >= sizeof(server.sun_path))
		die(REFUSED, "socket path too long: '%s'", values[SOCKET]);
	strcpy(server.sun_path, values[SOCKET]);

	is_in = values[CALL_FD] && values[TICKET] && enter_by_ticket();
	if (values[CALL_FD] && !is_in)
		wait_for_call(atoi(values[CALL_FD]));
	make_request(what, argc - i, argv + i);
	if (what == NAME && speaks() && !was_declared)
		start_waiter(&server);
	away = is_in	    ? NULL :
	       was_declared ? wait_to_be_moved(declared, !strcmp(policy, "run")) :
			      enter_cgroup(what);
	if (away == sealed)
		declare(request + strlen("ACG1") + 1, request_len - strlen("ACG1") - 1, argc, argv);
	/* The daemon is being started anew, or turns away those who ask too much at a time. */
	for (unsigned int wait_ms = 25; away == hung_up && wait_ms < 3000; wait_ms *= 2) {
		usleep(wait_ms * 1000);
		away = enter_cgroup(what);
	}
	if (away == hung_up)
		die(REFUSED, "daemon at '%s' hangs up; command not run", server.sun_path);
	is = was_declared || away == sealed ? "cannot be asked" : "is away";
	if (away && !strcmp(policy, "refuse"))
		die(REFUSED, "daemon at '%s' %s: %s; command not run", server.sun_path, is, away);
	if (away)
		say("%s: warning: daemon at '%s' %s: %s; running without limits", program,
		    server.sun_path, is, away);
	if (values[USER])
		become_user(values[USER]);
	if (values[OWN_GROUP])
		leave_group();
	if (values[ERROR_FD] && !fcntl(atoi(values[ERROR_FD]), F_SETFD, FD_CLOEXEC)) {
		errno = execute(argv + i);
		dprintf(atoi(values[ERROR_FD]), "%d", errno);
		exit(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC);
	}
	execvp(argv[i], argv + i);
	if (errno == EACCES && !stat(argv[i], &file_stat) && S_ISDIR(file_stat.st_mode))
		errno = EISDIR;
	die(errno == ENOENT ? NOT_FOUND : CANNOT_EXEC, "%s: %s", argv[i], strerror(errno));
}

#endif
