/* SPDX-License-Identifier: GPL-2.0 */
/* The scheduler's locks, and what is written to without one. */
#ifndef AGENTCG_SCHED_GUARDS_H
#define AGENTCG_SCHED_GUARDS_H

/* On a cache line of its own. */
#define __line __attribute__((aligned(64)))

/* A value in memory that others write to. */
#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))

/* An atomic addition of nothing: what stands before it is seen by others before what comes after.
 */
#define full_barrier(word) __sync_fetch_and_add(word, 0)

enum guards {
	GUARDS = 1024, /* each for several groups of siblings; a power of two */
	GUARDS_ALL = GUARDS + 4,
	/* In place of a group, for what is no order of siblings. */
	GUARD_PAUSE = 1 << 20,
	GUARD_BOOST,
	GUARD_SLOTS,
	GUARD_SETS,
};

/* The number of the lock of a group, or of one of those above. */
static inline __attribute__((always_inline)) unsigned int guard_number(unsigned int of)
{
	return of < GUARD_PAUSE ? of % GUARDS : GUARDS + of - GUARD_PAUSE;
}

#define guard_of(of) guard_at(guard_number(of))

#endif
