// SPDX-License-Identifier: GPL-2.0
/*
 * Switches a second of the order, on real CPUs: switches SESSIONS CALLS THREADS ROUNDS. Each call
 * has one task that always has something to run, 32 simulated CPUs a thread take turns at it. A
 * switch is what the scheduler does for one: the task that ran pays and waits again, and another
 * is chosen. Writes switches a second, of all threads together, and loops and locks a switch.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "driver.h"

#define CPUS 32 /* of a thread */

static u32 running[8 * CPUS], rounds;
static struct {
	u32 waits; /* the call's task, as its queue has it */
	u32 reserved[15];
} queued[SLOTS];
static pthread_barrier_t ready;

static u64 seconds_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Choose a cgroup with a waiting task, and take that. */
static u32 take_one(u32 cpu, u64 now)
{
	for (;;) {
		u64 turn = choose(0, now);

		if (turn >> 32 != TURN_NONE &&
		    __sync_lock_test_and_set(&queued[within(turn)].waits, 0)) {
			end_waiting(turn);
			settle_up(turn, false);
			lend(cpu, turn);
			return turn;
		}
	}
}

static void *work(void *number)
{
	u64 now = START, began, thread = (u64)number, *cost = malloc(3 * sizeof(*cost));
	cpu_set_t mask;

	this_thread = thread;
	CPU_ZERO(&mask);
	CPU_SET(thread, &mask);
	sched_setaffinity(0, sizeof(mask), &mask);
	pthread_barrier_wait(&ready);
	began = seconds_ns(CLOCK_THREAD_CPUTIME_ID);
	for (u32 i = 0; i < rounds; i++) {
		u32 cpu = thread * CPUS + i % CPUS, *mine = &running[cpu];

		now += 1000; /* as long as a switch takes, about */
		pay_up(*mine, control.slice_ns, now, false, cpu);
		begin_waiting(*mine, now);
		settle_up(*mine, true);
		__sync_lock_test_and_set(&queued[*mine].waits, 1);
		resume_due(now);
		*mine = take_one(cpu, now);
	}
	cost[0] = seconds_ns(CLOCK_THREAD_CPUTIME_ID) - began;
	cost[1] = loop_steps;
	cost[2] = locks_taken;
	return cost;
}

int main(int count, char **words)
{
	u32 sessions, calls, threads, above;
	pthread_t ids[8];
	u64 steps = 0, locks = 0;
	double rate = 0;

	if (count != 5)
		return 2;
	sessions = atoi(words[1]);
	calls = atoi(words[2]);
	threads = atoi(words[3]);
	rounds = atoi(words[4]);
	driver_begin();
	driver_start(threads * CPUS, 4000000);
	own_groups = threads < STRIPES ? threads : STRIPES;
	/* As on a host: the slice, the service, the pool. */
	above = driver_cgroup(driver_cgroup(driver_cgroup(0, 100), 100), 100);
	for (u32 i = 0; i < sessions; i++) {
		u32 session = driver_cgroup(above, 100);

		for (u32 k = 0; k < calls; k++) {
			u32 call = driver_cgroup(session, 100);

			node_of(call)->runnable = 1;
			activate_up(call);
			queued[call].waits = 1;
			begin_waiting(call, START);
			settle_up(call, false);
		}
	}
	for (u32 i = 0; i < threads * CPUS; i++)
		running[i] = take_one(i, START);
	loop_steps = locks_taken = 0;
	pthread_barrier_init(&ready, NULL, threads);
	for (u64 i = 0; i < threads; i++)
		pthread_create(&ids[i], NULL, work, (void *)i);
	for (u32 i = 0; i < threads; i++) {
		u64 *cost;

		pthread_join(ids[i], (void **)&cost);
		rate += rounds * 1e9 / cost[0];
		steps += cost[1];
		locks += cost[2];
	}
	printf("%.0f %.1f %.1f\n", rate, (double)steps / rounds / threads,
	       (double)locks / rounds / threads);
	return 0;
}
