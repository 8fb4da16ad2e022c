/* SPDX-License-Identifier: GPL-2.0 */
/* What the order needs of the machine, as an ordinary program: see bpf/sched_machine.h. */
#ifndef AGENTCG_NATIVE_MACHINE_H
#define AGENTCG_NATIVE_MACHINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;

#define __noinline __attribute__((noinline))
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define __hidden
#define SEC(name)

#include "../../bpf/abi.h"

/* Counts of the thread: turns of loops, and times that a lock was taken. */
extern _Thread_local u64 loop_steps, locks_taken;

#define can_loop (++loop_steps, true)

#define MASKED(value, mask) ((u64)(value) & (mask))

struct bpf_spin_lock {
	u32 held;
};

static inline void bpf_spin_lock(struct bpf_spin_lock *lock)
{
	while (__atomic_exchange_n(&lock->held, 1, __ATOMIC_ACQUIRE))
		while (__atomic_load_n(&lock->held, __ATOMIC_RELAXED))
			continue;
	locks_taken++;
}

static inline void bpf_spin_unlock(struct bpf_spin_lock *lock)
{
	__atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

#include "../../bpf/sched_guards.h"

struct guard {
	struct bpf_spin_lock lock __line;
};

static struct guard guards[GUARDS_ALL];
extern _Thread_local u32 this_thread;

static inline struct guard *guard_at(u32 number)
{
	return &guards[number];
}

static inline u32 this_cpu(void)
{
	return this_thread;
}

#endif
