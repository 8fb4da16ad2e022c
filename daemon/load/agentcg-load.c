// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg-load: replays a recorded schedule with real memory and real CPU time.
 *
 * A step is complete when its memory has been reached, its CPU time has been consumed and its
 * duration has passed. Being frozen or throttled therefore makes it late; nothing is skipped.
 * Between steps it may tell others how far it is, and wait for them: two processes that are to hold
 * memory at the same moment then do so however fast either is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define NSEC_PER_SEC	1000000000LL
#define NSEC_PER_MSEC	1000000LL
#define NSEC_PER_USEC	1000LL
#define CHUNK_BYTES	(1LL << 20)
#define BURST_MIN_BYTES (256LL << 10)
#define PAGE_BYTES	4096
#define SLICE_NSEC	(5 * NSEC_PER_MSEC)
#define SPIN_ROUNDS	4096 /* between two looks at the clock: some 10 us, 100 us emulated */
#define MEMORY_MAX	(1LL << 46)
#define DURATION_MAX_MS 86400000
#define THREADS_MAX	64
#define STACK_BYTES	(64 << 10)
#define AWAIT_NSEC	(2 * NSEC_PER_MSEC)

enum { FAILED = 1, BAD_INPUT = 2, CANNOT_GROW = 3 };

struct step {
	const char *tell;  /* a file to make; nothing else is done in this step */
	const char *await; /* a file to wait for; the same */
	long long duration_ns;
	long long memory_bytes;
	long long cpu_ns; /* per thread */
	int threads;
};

static struct step *steps;
static size_t n_steps;

/* Memory is mapped chunk by chunk; the last chunk may be filled in part. */
static char **chunks;
static long long held_bytes;
static long long page_rate = -1; /* bytes per second; 0: no limit; -1: spread over the step */
static bool fill_whole_page = true;
static uint64_t template[PAGE_BYTES / sizeof(uint64_t)];
static uint64_t serial;

/* Chunk latencies: 16 buckets to each power of two of ns, so values are kept to within 6 %. */
#define BUCKETS_LOG2 4
static struct {
	uint64_t bucket[64 << BUCKETS_LOG2];
	uint64_t n;
	long long max_ns;
	long long chunk_ns; /* of the chunk being filled */
} latency;
static FILE *latency_file;
static int progress_fd = -1;

static struct worker {
	pthread_t thread;
	sem_t go;
} workers[THREADS_MAX];
static sem_t worker_done;
static const struct step *current;
static long long step_began_ns;

__attribute__((format(printf, 2, 3), noreturn)) static void die(int status, const char *format, ...)
{
	va_list args;

	fputs("agentcg-load: ", stderr);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(status);
}

static long long now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * NSEC_PER_SEC + now.tv_nsec;
}

static void sleep_until(long long at_ns)
{
	struct timespec at = { at_ns / NSEC_PER_SEC, at_ns % NSEC_PER_SEC };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
		;
}

static uint64_t xorshift(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	return x ^ x << 17;
}

/* ---- the schedule ---- */

static double number(char **at, const char *what, double max, size_t line)
{
	char *word = strsep(at, " \t"), *end;
	double value;

	while (word && !*word)
		word = strsep(at, " \t");
	if (!word)
		die(BAD_INPUT, "line %zu: %s is missing", line, what);
	errno = 0;
	value = strtod(word, &end);
	if (*end || end == word || !isfinite(value) || value < 0 || value > max)
		die(BAD_INPUT, "line %zu: %s '%.40s' is not a number from 0 to %.0f", line, what,
		    word, max);
	return value;
}

/* The rest of a line that begins with `word`, which is a path; NULL if it does not. */
static const char *path_after(const char *word, char *at, size_t line)
{
	size_t len = strlen(word);
	char *path;

	if (strncmp(at, word, len) || (at[len] && !strchr(" \t", at[len])))
		return NULL;
	at += len + strspn(at + len, " \t");
	if (!*at)
		die(BAD_INPUT, "line %zu: %s needs the path of a file", line, word);
	path = strdup(at);
	if (!path)
		die(FAILED, "no memory for a path");
	return path;
}

static void read_schedule(FILE *file)
{
	size_t size = 0, room = 0;
	char *text = NULL;
	ssize_t len;

	for (size_t line = 1; (len = getline(&text, &size, file)) >= 0; line++) {
		double duration_ms, percent;
		struct step *step;
		char *at = text;

		if (strlen(text) != (size_t)len)
			die(BAD_INPUT, "line %zu: holds a NUL byte", line);
		text[strcspn(text, "\r\n")] = 0;
		at += strspn(at, " \t");
		if (!*at || *at == '#')
			continue;
		if (n_steps == room) {
			room = room ? 2 * room : 256;
			steps = reallocarray(steps, room, sizeof(*steps));
			if (!steps)
				die(FAILED, "no memory for a schedule of %zu steps", room);
		}
		step = &steps[n_steps++];
		*step = (struct step){ .tell = path_after("tell", at, line),
				       .await = path_after("await", at, line),
				       .threads = 1 };
		if (step->tell || step->await) {
			if (n_steps > 1)
				step->memory_bytes = steps[n_steps - 2].memory_bytes;
			continue;
		}
		duration_ms = number(&at, "duration_ms", DURATION_MAX_MS, line);
		step->memory_bytes = number(&at, "memory_bytes", MEMORY_MAX, line);
		percent = number(&at, "cpu_percent", THREADS_MAX * 100, line);
		if (at && at[strspn(at, " \t")])
			die(BAD_INPUT, "line %zu: '%.40s' after the third number", line, at);
		step->duration_ns = duration_ms * NSEC_PER_MSEC;
		step->threads = percent / 100;
		step->threads += step->threads * 100 < percent || !step->threads;
		step->cpu_ns = step->duration_ns * (percent / 100) / step->threads;
	}
	if (ferror(file))
		die(BAD_INPUT, "cannot read the schedule: %s", strerror(errno));
	if (!n_steps)
		die(BAD_INPUT, "the schedule has no steps");
	free(text);
}

/* ---- allocation latency ---- */

static void count_chunk(long long ns)
{
	int log2 = 63 - __builtin_clzll(ns | 1);
	size_t at = log2 < BUCKETS_LOG2 ?
			    (size_t)ns :
			    (size_t)(log2 - BUCKETS_LOG2 + 1) << BUCKETS_LOG2 |
				    ((ns >> (log2 - BUCKETS_LOG2)) & ((1 << BUCKETS_LOG2) - 1));

	latency.bucket[at]++;
	latency.n++;
	if (ns > latency.max_ns)
		latency.max_ns = ns;
}

/* The upper end of the bucket that holds the quantile. */
static long long quantile_ns(double q)
{
	uint64_t rank = ceil(q * latency.n), seen = 0;
	size_t at = 0;
	int shift;
	long long end;

	while ((seen += latency.bucket[at]) < rank)
		at++;
	if (at < 1 << BUCKETS_LOG2)
		return at;
	shift = (at >> BUCKETS_LOG2) - 1;
	end = (((at & ((1 << BUCKETS_LOG2) - 1)) + (1 << BUCKETS_LOG2) + 1) << shift) - 1;
	return end < latency.max_ns ? end : latency.max_ns;
}

static void write_latency(void)
{
	static const struct {
		const char *name;
		double q;
	} columns[] = { { "p50", 0.5 }, { "p95", 0.95 }, { "p99", 0.99 }, { "max", 1 } };

	fprintf(latency_file, "{\"n\": %llu", (unsigned long long)latency.n);
	for (size_t i = 0; i < sizeof(columns) / sizeof(*columns); i++)
		if (latency.n)
			fprintf(latency_file, ", \"%s_usec\": %.3f", columns[i].name,
				quantile_ns(columns[i].q) / (double)NSEC_PER_USEC);
		else
			fprintf(latency_file, ", \"%s_usec\": null", columns[i].name);
	fputs("}\n", latency_file);
	if (fclose(latency_file))
		die(FAILED, "cannot write the latency file: %s", strerror(errno));
}

static void finish(int status)
{
	if (latency_file)
		write_latency();
	exit(status);
}

/* ---- memory ---- */

static void make_template(void)
{
	uint64_t x = now_ns(CLOCK_REALTIME) ^ (uint64_t)getpid() << 40;

	for (size_t i = 0; i < sizeof(template) / sizeof(*template); i++)
		template[i] = x = xorshift(x);
	serial = x;
}

/*
 * Every page is the same random page but for one word: a compressor that looks at one page at a
 * time gains nothing, nor does one that merges equal pages, and a copy is cheap even when emulated.
 */
static void touch(char *from, char *to)
{
	for (; from < to; from += PAGE_BYTES) {
		if (fill_whole_page)
			memcpy(from, template, PAGE_BYTES);
		*(volatile uint64_t *)from = serial += 2;
	}
}

/* Touches up to `bytes` more, at most to the end of the chunk. */
static void grow(long long bytes)
{
	long long began_ns = now_ns(CLOCK_MONOTONIC), i = held_bytes / CHUNK_BYTES;
	long long offset = held_bytes % CHUNK_BYTES;
	long long end = offset + bytes < CHUNK_BYTES ? offset + bytes : CHUNK_BYTES;
	long long first = (offset + PAGE_BYTES - 1) & -PAGE_BYTES;

	if (!chunks[i]) {
		chunks[i] = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (chunks[i] == MAP_FAILED) {
			fprintf(stderr, "agentcg-load: cannot grow to %lld bytes\n",
				current->memory_bytes);
			finish(CANNOT_GROW);
		}
		/* With huge pages one touch would bring 2 MiB. Fails only where there are none. */
		madvise(chunks[i], CHUNK_BYTES, MADV_NOHUGEPAGE);
		latency.chunk_ns = 0;
	}
	touch(chunks[i] + first, chunks[i] + end);
	held_bytes += end - offset;
	latency.chunk_ns += now_ns(CLOCK_MONOTONIC) - began_ns;
	if (end == CHUNK_BYTES && latency.chunk_ns >= 0)
		count_chunk(latency.chunk_ns);
}

static void shrink(long long bytes)
{
	long long keep = (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
	long long last = (held_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
	long long tail = (bytes % CHUNK_BYTES + PAGE_BYTES - 1) & -PAGE_BYTES;

	for (long long i = keep; i < last; i++) {
		munmap(chunks[i], CHUNK_BYTES);
		chunks[i] = NULL;
	}
	if (tail && tail < CHUNK_BYTES) {
		madvise(chunks[keep - 1] + tail, CHUNK_BYTES - tail, MADV_DONTNEED);
		/* Filled again it would be a chunk allocated in part: not one for the statistics.
		 */
		latency.chunk_ns = LLONG_MIN / 2;
	}
	held_bytes = bytes;
}

/* How much to touch at once, so that slow growth is not made of bursts, nor fast growth of wakes.
 */
static long long burst_bytes(long long growth)
{
	double rate = page_rate < 0 ? growth / (current->duration_ns / 1e9) : page_rate;
	double burst = rate / 100;

	if (page_rate == 0 || !(burst < CHUNK_BYTES))
		return CHUNK_BYTES;
	return burst < BURST_MIN_BYTES ? BURST_MIN_BYTES : (long long)burst & -PAGE_BYTES;
}

/* When, after the step began, the byte after `grown` is due. */
static long long growth_due_ns(long long grown, long long growth)
{
	if (page_rate < 0)
		return (double)grown / growth * current->duration_ns;
	return page_rate ? (double)grown / page_rate * 1e9 : 0;
}

/* ---- CPU ---- */

static void burn(long long until_thread_ns)
{
	static _Thread_local volatile uint64_t sink = 1;

	while (now_ns(CLOCK_THREAD_CPUTIME_ID) < until_thread_ns) {
		uint64_t x = sink;

		for (int i = 0; i < SPIN_ROUNDS; i++)
			x = xorshift(x);
		sink = x;
	}
}

/* When, after the step began, a thread that has used this much CPU may use more. */
static long long cpu_due_ns(long long used_ns)
{
	return (double)used_ns / current->cpu_ns * current->duration_ns;
}

static long long min(long long a, long long b)
{
	return a < b ? a : b;
}

static void *work(void *arg)
{
	struct worker *self = arg;

	for (;;) {
		long long began_ns, used_ns;

		while (sem_wait(&self->go))
			;
		began_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
		while ((used_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - began_ns) < current->cpu_ns) {
			sleep_until(step_began_ns + cpu_due_ns(used_ns));
			burn(began_ns + min(used_ns + SLICE_NSEC, current->cpu_ns));
		}
		sem_post(&worker_done);
	}
	return NULL;
}

static void start_workers(void)
{
	pthread_attr_t attr;
	int threads = 1, error;

	for (size_t i = 0; i < n_steps; i++)
		if (steps[i].threads > threads)
			threads = steps[i].threads;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	sem_init(&worker_done, 0, 0);
	for (int i = 0; i < threads - 1; i++) {
		sem_init(&workers[i].go, 0, 0);
		error = pthread_create(&workers[i].thread, &attr, work, &workers[i]);
		if (error)
			die(FAILED, "cannot start %d threads: %s", threads, strerror(error));
	}
}

/* ---- the run ---- */

/* Memory and the first thread's CPU time, each at its own even pace; filling counts as CPU time. */
static void run_step(void)
{
	long long cpu_began_ns = now_ns(CLOCK_THREAD_CPUTIME_ID), burst, from;
	long long growth = current->memory_bytes - held_bytes, cpu_due = 0;

	for (int i = 0; i < current->threads - 1; i++)
		sem_post(&workers[i].go);
	if (growth < 0)
		shrink(current->memory_bytes);
	from = held_bytes;
	burst = growth > 0 ? burst_bytes(growth) : 0;
	for (;;) {
		long long used_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) - cpu_began_ns;
		long long since_ns = now_ns(CLOCK_MONOTONIC) - step_began_ns;
		long long left = current->memory_bytes - held_bytes;
		long long memory_due = left ? growth_due_ns(held_bytes - from, growth) : LLONG_MAX;

		if (used_ns >= current->cpu_ns)
			cpu_due = LLONG_MAX;
		if (memory_due <= since_ns) {
			grow(min(burst, left));
		} else if (cpu_due <= since_ns) {
			used_ns += min(SLICE_NSEC, memory_due - since_ns);
			burn(cpu_began_ns + min(used_ns, current->cpu_ns));
			/* Not at each turn: what waking up costs would then put it off for ever. */
			cpu_due = cpu_due_ns(used_ns);
		} else if (min(memory_due, cpu_due) == LLONG_MAX) {
			break;
		} else {
			sleep_until(step_began_ns + min(memory_due, cpu_due));
		}
	}
	for (int i = 0; i < current->threads - 1; i++)
		while (sem_wait(&worker_done))
			;
	sleep_until(step_began_ns + current->duration_ns);
}

static void tell(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);

	if (fd < 0)
		die(FAILED, "cannot make %s: %s", path, strerror(errno));
	close(fd);
}

static void await_file(const char *path)
{
	while (access(path, F_OK)) {
		if (errno != ENOENT)
			die(FAILED, "cannot wait for %s: %s", path, strerror(errno));
		sleep_until(now_ns(CLOCK_MONOTONIC) + AWAIT_NSEC);
	}
}

static void run_schedule(void)
{
	long long began_ns = now_ns(CLOCK_MONOTONIC), planned_ns = 0;

	for (size_t i = 0; i < n_steps; i++) {
		long long elapsed_ns;

		current = &steps[i];
		step_began_ns = now_ns(CLOCK_MONOTONIC);
		if (current->tell)
			tell(current->tell);
		else if (current->await)
			await_file(current->await);
		else
			run_step();
		planned_ns += current->duration_ns;
		elapsed_ns = now_ns(CLOCK_MONOTONIC) - began_ns;
		if (progress_fd >= 0 &&
		    dprintf(progress_fd, "%zu %.3f %.3f\n", i + 1,
			    elapsed_ns / (double)NSEC_PER_MSEC,
			    (elapsed_ns - planned_ns) / (double)NSEC_PER_MSEC) < 0)
			die(FAILED, "cannot write progress: %s", strerror(errno));
	}
}

static const char help[] =
	"usage: agentcg-load [OPTION...] [SCHEDULE]\n"
	"Replays a schedule (a file, else stdin) with real memory and CPU time. A line is one "
	"step:\n"
	"  DURATION_MS MEMORY_BYTES CPU_PERCENT   (held at its end; of one core, up to 6400)\n"
	"  tell FILE | await FILE                 (make a file; wait until it is there)\n"
	"--page-rate BYTES_PER_S   how fast to grow; 0: at once (default: evenly over each step)\n"
	"--fill full|page          random pages, or one word a page (default: full)\n"
	"--progress FILE|FD        a line per finished step: number, elapsed ms, ms behind "
	"schedule\n"
	"--alloc-latency FILE      at exit, as JSON: time to map and touch a chunk of 1 MiB\n"
	"Exit status: 0 done, 1 failed, 2 bad usage or input, 3 memory refused\n";

static void open_progress(const char *arg)
{
	char *end;
	long fd = strtol(arg, &end, 10);

	if (*arg && !*end && fd >= 0 && fd <= INT_MAX) {
		progress_fd = fd;
		if (fcntl(progress_fd, F_GETFD) < 0)
			die(BAD_INPUT, "--progress %s: %s", arg, strerror(errno));
		return;
	}
	progress_fd = open(arg, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (progress_fd < 0)
		die(BAD_INPUT, "--progress %s: %s", arg, strerror(errno));
}

static void parse_options(int argc, char **argv)
{
	enum { PAGE_RATE = 1, FILL, PROGRESS, ALLOC_LATENCY, HELP };
	static const struct option options[] = {
		{ "page-rate", required_argument, NULL, PAGE_RATE },
		{ "fill", required_argument, NULL, FILL },
		{ "progress", required_argument, NULL, PROGRESS },
		{ "alloc-latency", required_argument, NULL, ALLOC_LATENCY },
		{ "help", no_argument, NULL, HELP },
		{},
	};
	char *end;
	int o;

	while ((o = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (o) {
		case PAGE_RATE:
			page_rate = strtoll(optarg, &end, 10);
			if (*end || end == optarg || page_rate < 0)
				die(BAD_INPUT, "--page-rate '%s' is not a number of bytes", optarg);
			break;
		case FILL:
			fill_whole_page = !strcmp(optarg, "full");
			if (!fill_whole_page && strcmp(optarg, "page"))
				die(BAD_INPUT, "--fill '%s' is neither full nor page", optarg);
			break;
		case PROGRESS:
			open_progress(optarg);
			break;
		case ALLOC_LATENCY:
			latency_file = fopen(optarg, "we");
			if (!latency_file)
				die(BAD_INPUT, "--alloc-latency %s: %s", optarg, strerror(errno));
			break;
		case HELP:
			fputs(help, stdout);
			exit(0);
		default:
			exit(BAD_INPUT);
		}
	}
	if (argc - optind > 1)
		die(BAD_INPUT, "one schedule at a time, not also '%s'", argv[optind + 1]);
}

int main(int argc, char **argv)
{
	long long most_bytes = 0;
	FILE *file = stdin;

	parse_options(argc, argv);
	if (optind < argc)
		file = fopen(argv[optind], "re");
	if (!file)
		die(BAD_INPUT, "%s: %s", argv[optind], strerror(errno));
	read_schedule(file);
	for (size_t i = 0; i < n_steps; i++)
		if (steps[i].memory_bytes > most_bytes)
			most_bytes = steps[i].memory_bytes;
	chunks = calloc(most_bytes / CHUNK_BYTES + 1, sizeof(*chunks));
	if (!chunks)
		die(CANNOT_GROW, "cannot grow to %lld bytes", most_bytes);

	prctl(PR_SET_TIMERSLACK, 1UL); /* the default of 50 us would add up over the steps */
	make_template();
	start_workers();
	run_schedule();
	finish(0);
}
