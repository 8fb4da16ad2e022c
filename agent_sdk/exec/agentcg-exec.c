// SPDX-License-Identifier: Apache-2.0
/* agentcg-exec: the launcher as a program of its own, for the SDK and for scripts. */
#define _GNU_SOURCE
#include "launch.h"

int main(int argc, char **argv)
{
	launch(argc, argv);
}
