// SPDX-License-Identifier: Apache-2.0
/*
 * A process that waits for the command in place of who started it, passes signals on to it, ends as
 * it does, and says why where the call did not end by itself. The command is its child, and dies
 * with it.
 */
#ifndef AGENTCG_WAIT_H
#define AGENTCG_WAIT_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "disk.h"
#include "retry.h"
#include "say.h"

enum { ENDING_S = 5, ID_MAX = 128, WORDS_MAX = 16384 };

static const int passed_on[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2 };
static volatile pid_t command;
static int to_waiter = -1; /* in the command's process: where it writes the call's id */

/* What a terminal sends reaches the command by itself, which is in the same process group. */
static void pass_on(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (info->si_code != SI_KERNEL && command > 0)
		kill(command, number);
}

/* Tells the waiter which call this process is in; nothing where there is no waiter. */
static void tell_waiter(const char *id)
{
	if (to_waiter >= 0 && write(to_waiter, id, strnlen(id, ID_MAX - 1)) < 0)
		say("%s: warning: how the call ends will not be said: %s", program,
		    strerror(errno));
}

/* The same one by one: a sandbox may refuse the call that closes all of a range. */
static void close_each(int kept)
{
	DIR *open_files = opendir("/proc/self/fd");
	struct dirent *entry;

	while (open_files && (entry = readdir(open_files))) {
		int fd = atoi(entry->d_name);

		if (fd > STDERR_FILENO && fd != kept && fd != dirfd(open_files))
			close(fd);
	}
	if (open_files)
		closedir(open_files);
}

/* Closes what only the command needs: a pipe has to end with the command. stderr stays. */
static void close_others(int kept)
{
	unsigned int least = STDERR_FILENO + 1, after = kept + 1;
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	bool refused;

	if (null >= 0) {
		dup2(null, STDIN_FILENO);
		dup2(null, STDOUT_FILENO);
	}
	refused = (unsigned int)kept > least && syscall(SYS_close_range, least, kept - 1, 0);
	if (refused || syscall(SYS_close_range, after > least ? after : least, ~0U, 0))
		close_each(kept);
}

/*
 * Asks the daemon once how a call ended. Returns the length of the answer; 0: it hung up, because
 * it is being started anew or because its session asks too much at a time; -1: errno says why not.
 */
static ssize_t ask_how_it_ended(const struct sockaddr_un *daemon, const char *question, size_t len,
				char *answer)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	struct timeval timeout = { .tv_sec = ENDING_S };
	const struct sockaddr *to = (const struct sockaddr *)daemon;
	ssize_t got;
	int error;

	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
	got = TEMP_FAILURE_RETRY(connect(fd, to, sizeof(*daemon)));
	if (!got)
		got = TEMP_FAILURE_RETRY(send(fd, question, len, MSG_NOSIGNAL));
	/* It may refuse and hang up before it reads the question: what it says still counts. */
	while (got > 0 || (got < 0 && (errno == EPIPE || errno == ECONNRESET))) {
		memset(answer, 0, WORDS_MAX + 2);
		got = TEMP_FAILURE_RETRY(recv(fd, answer, WORDS_MAX, 0));
		if (got <= 0 || strcmp(answer, "WAIT"))
			break;
	}
	error = errno;
	close(fd);
	errno = error;
	return got < 0 && (errno == EPIPE || errno == ECONNRESET) ? 0 : got;
}

/* Asks the daemon how a call ended, and says what it answers, or that it does not. */
static void say_how_it_ended(const struct sockaddr_un *daemon, const char *id)
{
	char question[ID_MAX + 32], *answer = calloc(1, WORDS_MAX + 2);
	int len = snprintf(question, sizeof(question), "ACG1%creport%ccall=%s", 0, 0, id) + 1;
	ssize_t got;

	if (!answer)
		return;
	got = ask_how_it_ended(daemon, question, len, answer);
	for (unsigned int wait_ms = 25; !got && wait_ms < 2000; wait_ms *= 2) {
		usleep(wait_ms * 1000);
		got = ask_how_it_ended(daemon, question, len, answer);
	}
	if (got > 0 && !strcmp(answer, "OK")) {
		for (char *word = answer + 3; *word; word += strlen(word) + 1)
			if (!strncmp(word, "say=", 4) && word[4])
				say("%s: call %s: %s", program, id, word + 4);
	} else if (got <= 0) {
		say("%s: call %s: how it ended is not known, because the daemon %s", program, id,
		    !got	    ? "hangs up" :
		    errno == EAGAIN ? "does not answer" :
				      "is away");
	}
	free(answer);
}

/* Ends this process as the command has ended. */
__attribute__((noreturn)) static void end_as(int status)
{
	const struct rlimit no_core = {};
	sigset_t number;

	if (WIFEXITED(status))
		exit(WEXITSTATUS(status));
	setrlimit(RLIMIT_CORE, &no_core); /* the command has left its own */
	signal(WTERMSIG(status), SIG_DFL);
	sigemptyset(&number);
	sigaddset(&number, WTERMSIG(status));
	sigprocmask(SIG_UNBLOCK, &number, NULL);
	raise(WTERMSIG(status));
	exit(128 + WTERMSIG(status));
}

__attribute__((noreturn)) static void wait_for_command(const struct sockaddr_un *daemon, int id_fd)
{
	char id[ID_MAX] = {}, disk[512];
	int status;

	close_others(id_fd);
	while (waitpid(command, &status, 0) < 0)
		if (errno != EINTR)
			die(REFUSED, "waiting for the command: %s", strerror(errno));
	command = 0;
	if (status && read(id_fd, id, sizeof(id) - 1) > 0)
		say_how_it_ended(daemon, id);
	if (status && is_disk_full(".", disk, sizeof(disk)))
		say("%s: %s", program, disk);
	end_as(status);
}

/*
 * Leaves this process to wait, and goes on in a child, which is to become the command. Where there
 * is no process to be had, or nobody to be told anything, it stays one process.
 */
static void start_waiter(const struct sockaddr_un *daemon)
{
	struct sigaction action = { .sa_sigaction = pass_on, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigaction before;
	sigset_t blocked, mask;
	pid_t parent = getpid();
	int ends[2];

	if (fcntl(STDERR_FILENO, F_GETFD) < 0 || pipe2(ends, O_CLOEXEC))
		return;
	sigemptyset(&blocked);
	for (size_t i = 0; i < sizeof(passed_on) / sizeof(*passed_on); i++)
		sigaddset(&blocked, passed_on[i]);
	sigprocmask(SIG_BLOCK, &blocked, &mask);
	command = fork();
	if (command > 0) {
		for (size_t i = 0; i < sizeof(passed_on) / sizeof(*passed_on); i++)
			if (!sigaction(passed_on[i], NULL, &before) && before.sa_handler != SIG_IGN)
				sigaction(passed_on[i], &action, NULL);
		sigprocmask(SIG_SETMASK, &mask, NULL);
		close(ends[1]);
		wait_for_command(daemon, ends[0]);
	}
	sigprocmask(SIG_SETMASK, &mask, NULL);
	close(ends[0]);
	if (command < 0) {
		close(ends[1]);
		return;
	}
	to_waiter = ends[1];
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != parent)
		exit(REFUSED);
}

#endif
