/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the scheduler's order needs of the machine that it is compiled for: here a BPF program. The
 * tests compile the same order as an ordinary program (tests/native/machine.h, by SCHED_MACHINE_H).
 */
#ifndef AGENTCG_SCHED_MACHINE_H
#define AGENTCG_SCHED_MACHINE_H

#include "compat.h"

#include "sched_guards.h"

/*
 * can_loop in the condition of a loop lets the verifier accept it: the kernel ends the loop if it
 * does not end by itself (the instruction may_goto, Linux 6.9). It is written as bytes because some
 * compilers that are supported are older than the instruction.
 */
#define can_loop                                                                         \
	({                                                                               \
		__label__ l_break, l_continue;                                           \
		bool going = true;                                                       \
		asm volatile goto("1:.byte 0xe5;.byte 0;"                                \
				  ".long ((%l[l_break] - 1b - 8) / 8) & 0xffff;.short 0" \
				  :                                                      \
				  :                                                      \
				  :                                                      \
				  : l_break);                                            \
		goto l_continue;                                                         \
	l_break:                                                                         \
		going = false;                                                           \
	l_continue:                                                                      \
		going;                                                                   \
	})

/*
 * A value AND a mask, in assembly: the compiler would drop an AND that it finds superfluous, but
 * the verifier needs it as proof that an index is in range.
 */
#define MASKED(value, mask)                                          \
	({                                                           \
		u64 masked = (value);                                \
		asm volatile("%0 &= %1" : "+r"(masked) : "i"(mask)); \
		masked;                                              \
	})

/* A lock, on a cache line of its own. */
struct guard {
	struct bpf_spin_lock lock;
	u32 reserved[15];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, GUARDS_ALL);
	__type(key, u32);
	__type(value, struct guard);
} guards SEC(".maps");

/* A lock; never NULL, which only the verifier does not know. */
static __always_inline struct guard *guard_at(u32 number)
{
	return bpf_map_lookup_elem(&guards, &number);
}

static __always_inline u32 this_cpu(void)
{
	return bpf_get_smp_processor_id();
}

#endif
