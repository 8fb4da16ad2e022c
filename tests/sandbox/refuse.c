// SPDX-License-Identifier: Apache-2.0
/* refuse socket|connect COMMAND...: runs a command for which one way to a Unix socket ends in
 * EPERM. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(member) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, member))
/* Skips to the end unless what was loaded is this. */
#define ONLY(value, left) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, left)
#define REFUSE		  BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM)
#define ALLOW		  BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

int main(int argc, char **argv)
{
	struct sock_filter sockets[] = { LOAD(nr),	ONLY(SYS_socket, 3),
					 LOAD(args[0]), ONLY(AF_UNIX, 1),
					 REFUSE,	ALLOW };
	struct sock_filter connects[] = { LOAD(nr), ONLY(SYS_connect, 1), REFUSE, ALLOW };
	struct sock_fprog of_sockets = { sizeof(sockets) / sizeof(*sockets), sockets };
	struct sock_fprog of_connects = { sizeof(connects) / sizeof(*connects), connects };
	int is_connect;

	if (argc < 3)
		return 2;
	is_connect = !strcmp(argv[1], "connect");
	if (strcmp(argv[1], "nothing") &&
	    (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	     prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, is_connect ? &of_connects : &of_sockets))) {
		perror("refuse");
		return 2;
	}
	execvp(argv[2], argv + 2);
	perror(argv[2]);
	return 2;
}
