// SPDX-License-Identifier: GPL-2.0
/*
 * The scheduler's order on simulated CPUs and tasks: reads a scenario from standard input, and
 * writes what each cgroup got. One command a line, times in us:
 *
 *     cgroup PARENT WEIGHT              the next number, from 1 on; 0 is the root
 *     task CGROUP CPUS FROM TO RUN SLEEP
 *                                       may run on CPUS, as hexadecimal words with commas, lowest
 *                                       first; is there from FROM to TO; sleeps for SLEEP whenever
 *                                       it has run for RUN (0: never)
 *     away CPU                          serves no task of this scheduler's
 *     run CPUS SLICE FROM TO            simulates until TO; counts from FROM on
 *
 * Output: `used CGROUP NS` for each cgroup with tasks, and `cost DISPATCHES STEPS MOST LOCKS NS`:
 * of the dispatches, with the turns of loops, lock takes and time of all of them, and the most
 * turns of one.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "driver.h"

#define TASKS_MAX 65536
#define NEVER	  UINT64_MAX
#define TICK_NS	  4000000

static struct task tasks[TASKS_MAX];
static u32 task_count, cgroup_count = 1, slots[SLOTS];
static u64 used[SLOTS];
static struct {
	struct task *task;
	u64 since, until;
	bool away;
} cpus[ABI_SCHED_CPUS];
static u32 cpu_count;
static u64 dispatches, steps_most, steps_all, locks_all, time_all;

static u64 clock_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

/* Tell of a task that has something to run, and let an idle CPU have it. */
static void wake(struct task *task, u64 now)
{
	int idle = -1;

	for (u32 cpu = 0; cpu < cpu_count && idle < 0; cpu++)
		if (!cpus[cpu].task && !cpus[cpu].away && cpus[cpu].until > now &&
		    may_run(task, cpu))
			idle = cpu;
	task->waits = true;
	driver_enqueue(task, now, true);
	if (idle >= 0 && cpus[idle].until > now)
		cpus[idle].until = now;
}

/* Have a CPU choose, with the task that ran there if that can go on. */
static void dispatch(u32 cpu, struct task *prev, u64 now, u64 slice)
{
	u64 steps = loop_steps, locks = locks_taken, began = clock_ns();
	struct task *next = driver_dispatch(cpu, prev, now);

	time_all += clock_ns() - began;
	dispatches++;
	steps = loop_steps - steps;
	steps_all += steps;
	locks_all += locks_taken - locks;
	if (steps > steps_most)
		steps_most = steps;
	cpus[cpu].task = next;
	cpus[cpu].since = now;
	cpus[cpu].until = NEVER;
	if (!next)
		return;
	next->waits = false;
	cpus[cpu].until = now + slice;
	if (next->run && next->left < slice)
		cpus[cpu].until = now + next->left;
	if (cpus[cpu].until > next->to)
		cpus[cpu].until = next->to > now ? next->to : now + 1;
}

/* A CPU's task has come to the end of its time: it pays, and sleeps, ends or goes on. */
static void end_turn(u32 cpu, u64 now, u64 slice, u64 from)
{
	struct task *task = cpus[cpu].task;
	u64 ran = now - cpus[cpu].since;

	cpus[cpu].task = NULL;
	if (task) {
		driver_charge(cpu, task, ran, now);
		if (now > from)
			used[task->cgroup] += ran;
		if (task->run) {
			task->left -= ran < task->left ? ran : task->left;
			if (!task->left) {
				task->left = task->run;
				task->wakes = now + task->sleep;
			}
		}
		if (now >= task->to)
			task->wakes = NEVER;
		if (task->wakes > now) {
			driver_stop(cpu, task, now);
			task = NULL;
		}
	}
	dispatch(cpu, task, now, slice);
}

static void simulate(u64 slice, u64 from, u64 to)
{
	u64 now = 0, tick = START;

	/* CPUs do not switch all at the same time. */
	for (u32 cpu = 0; cpu < cpu_count; cpu++)
		cpus[cpu].until = cpus[cpu].away ? NEVER : START + slice * cpu / cpu_count;
	while (now < to) {
		u64 next = NEVER;
		u32 who = 0;
		struct task *waker = NULL;

		for (u32 cpu = 0; cpu < cpu_count; cpu++)
			if (cpus[cpu].until < next)
				next = cpus[who = cpu].until;
		for (u32 i = 0; i < task_count; i++)
			if (tasks[i].wakes <= next && !tasks[i].awake)
				next = (waker = &tasks[i])->wakes;
		if (next == NEVER)
			break;
		now = next > now ? next : now;
		for (; tick < now; tick += TICK_NS)
			driver_tick();
		if (waker) {
			waker->awake = true;
			wake(waker, now);
			continue;
		}
		cpus[who].until = NEVER;
		struct task *task = cpus[who].task;
		end_turn(who, now, slice, from);
		if (task && task->wakes > now)
			task->awake = false;
	}
}

/* Read a task's CPUs. */
static void set_cpus(struct task *task, char *text)
{
	for (u32 i = 0; text && i < CPU_WORDS; i++) {
		task->cpus.words[i] = strtoull(text, &text, 16);
		task->count += __builtin_popcountll(task->cpus.words[i]);
		text = *text == ',' ? text + 1 : NULL;
	}
}

int main(void)
{
	unsigned long long a, b, c, d, e, f;
	char mask[256];
	char line[256];

	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "cgroup %llu %llu", &a, &b) == 2) {
			if (cgroup_count == 1)
				driver_begin();
			slots[cgroup_count++] = driver_cgroup(slots[a], b);
		} else if (sscanf(line, "task %llu %255s %llu %llu %llu %llu", &a, mask, &c, &d, &e,
				  &f) == 6) {
			struct task *task = &tasks[task_count++];

			task->cgroup = a;
			task->slot = slots[a];
			set_cpus(task, mask);
			task->wakes = START + c * 1000;
			task->to = START + d * 1000;
			task->run = task->left = e * 1000;
			task->sleep = f * 1000;
		} else if (sscanf(line, "away %llu", &a) == 1) {
			cpus[a].away = true;
		} else if (sscanf(line, "run %llu %llu %llu %llu", &a, &b, &c, &d) == 4) {
			cpu_count = a;
			driver_start(a, b * 1000);
			simulate(b * 1000, START + c * 1000, START + d * 1000);
		} else {
			fprintf(stderr, "not understood: %s", line);
			return 2;
		}
	}
	for (u32 i = 0; i < cgroup_count; i++)
		printf("used %u %llu\n", i, (unsigned long long)used[i]);
	printf("cost %llu %llu %llu %llu %llu\n", (unsigned long long)dispatches,
	       (unsigned long long)steps_all, (unsigned long long)steps_most,
	       (unsigned long long)locks_all, (unsigned long long)time_all);
	return 0;
}
