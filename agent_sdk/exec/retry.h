// SPDX-License-Identifier: Apache-2.0
/* TEMP_FAILURE_RETRY, which glibc has and musl has not: a call again and again while a signal comes
 * between. */
#ifndef AGENTCG_RETRY_H
#define AGENTCG_RETRY_H

#include <errno.h>
#include <unistd.h>

#ifndef TEMP_FAILURE_RETRY
#define TEMP_FAILURE_RETRY(call)                      \
	__extension__({                               \
		long got_;                            \
                                                      \
		do                                    \
			got_ = (call);                \
		while (got_ == -1 && errno == EINTR); \
		got_;                                 \
	})
#endif

#endif
