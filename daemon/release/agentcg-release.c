// SPDX-License-Identifier: Apache-2.0
/*
 * agentcg-release: let go of what a daemon that is gone had held back.
 *
 * systemd runs it after every end of the daemon (ExecStopPost=), also when the daemon was killed,
 * cannot start again, or has been started too often. It thaws calls and agents that are frozen,
 * and sets memory.high and cpu.weight as they had been granted. It needs neither Python nor the
 * configuration: the daemon leaves the place of its pool in its run directory, and what was
 * granted stands in the records on the cgroups (daemon/agentcgroupd/state/). Those are trusted.*
 * attributes, which no agent can write, so only cgroups that the daemon made are touched, and
 * cgroups that agents made are not even entered.
 *
 * While a daemon runs on the pool nothing is done. Running it twice does no harm.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define XATTR	      "trusted.agentcgroup"
#define ADOPTED_XATTR "trusted.agentcgroup.adopted."
#define CALL_PREFIX   "call-"
#define AGENT_LEAF    "agent"
#define RUN_DIR	      "/run/agentcgroup"
#define POOL_FILE     "private/pool"
#define PINS	      "/sys/fs/bpf/agentcgroup"

/* The kernel keeps no attribute longer than this (XATTR_SIZE_MAX). */
#define RECORD_BYTES 65536
/* Calls inside calls are looked for this deep. */
#define DEPTH_MAX 16
/* All of it takes at most this long; one session, at first, at most SESSION_MS. */
#define TOTAL_MS   8000
#define SESSION_MS 500
/* A daemon that was killed may take a moment to be gone. */
#define LOCK_TRIES    20
#define LOCK_PAUSE_MS 100

static struct {
	unsigned thawed, lifted, failed;
	int last_error;
	bool late;
} done;

static int64_t deadline_ms;

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static bool is_late(void)
{
	return now_ms() > deadline_ms;
}

/* --- records ------------------------------------------------------------------------------- */

/* Each of these takes the rest of a record that ends with NUL, and returns what is behind the
 * thing it skips, or NULL where the record is broken. None of them recurses. */

static const char *skip_blanks(const char *at)
{
	return at + strspn(at, " \t\r\n");
}

static const char *skip_string(const char *at)
{
	for (at++; *at != '"'; at++) {
		if (*at == '\\')
			at++;
		if (!*at)
			return NULL;
	}
	return at + 1;
}

static const char *skip_value(const char *at)
{
	unsigned depth = 0;

	do {
		at = skip_blanks(at);
		if (!*at)
			return NULL;
		if (*at == '"') {
			at = skip_string(at);
			if (!at)
				return NULL;
		} else if (*at == '{' || *at == '[') {
			depth++;
			at++;
		} else if (*at == '}' || *at == ']') {
			if (!depth--)
				return NULL;
			at++;
		} else if (*at == ',' || *at == ':') {
			if (!depth)
				return NULL;
			at++;
		} else {
			at += strcspn(at, " \t\r\n,:\"{}[]");
		}
	} while (depth);
	return at;
}

/* The value of a member of the object that begins at `at`; NULL if it has none of that name. */
static const char *member(const char *at, const char *name)
{
	size_t length = strlen(name);

	if (!at || *(at = skip_blanks(at)) != '{')
		return NULL;
	at = skip_blanks(at + 1);
	while (*at == '"') {
		const char *key = at + 1, *end = skip_string(at);

		if (!end)
			return NULL;
		at = skip_blanks(end);
		if (*at != ':')
			return NULL;
		at = skip_blanks(at + 1);
		if ((size_t)(end - 1 - key) == length && !memcmp(key, name, length))
			return at;
		at = skip_value(at);
		if (!at || *(at = skip_blanks(at)) != ',')
			return NULL;
		at = skip_blanks(at + 1);
	}
	return NULL;
}

static bool is_kind(const char *record, const char *kind)
{
	const char *value = member(record, "kind");
	size_t length = strlen(kind);

	return value && *value == '"' && !strncmp(value + 1, kind, length) &&
	       value[length + 1] == '"';
}

/* The whole number at `value`. `null` is said by false with *none set. */
static bool number(const char *value, uint64_t *result, bool *none)
{
	char *end;

	*none = value && !strncmp(value, "null", 4);
	if (!value || *value < '0' || *value > '9')
		return false;
	errno = 0;
	*result = strtoull(value, &end, 10);
	return !errno && strchr(",} \t\r\n", *end);
}

/* --- cgroups ------------------------------------------------------------------------------- */

static void failed(void)
{
	/* ENOENT and ENODEV: the cgroup has gone meanwhile. */
	if (errno == ENOENT || errno == ENODEV)
		return;
	done.failed++;
	done.last_error = errno;
}

static int open_dir(int parent, const char *name)
{
	return openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Read the record on a directory; false where there is none. */
static bool read_record(int dir, char record[RECORD_BYTES + 1])
{
	ssize_t length = fgetxattr(dir, XATTR, record, RECORD_BYTES);

	if (length <= 0)
		return false;
	record[length] = 0;
	return true;
}

static bool read_file(int dir, const char *file, char text[64])
{
	int fd = openat(dir, file, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	ssize_t length;

	if (fd < 0)
		return false;
	length = read(fd, text, 63);
	close(fd);
	if (length <= 0)
		return false;
	text[length] = 0;
	text[strcspn(text, "\n")] = 0;
	return true;
}

/* Set an interface file, unless it says so already; true if it was written. O_NONBLOCK: a limit
 * of memory is set without reclaiming first. */
static bool set_file(int dir, const char *file, const char *wanted)
{
	char text[64];
	int fd;
	bool ok;

	if (!read_file(dir, file, text) || !strcmp(text, wanted))
		return false;
	fd = openat(dir, file, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	ok = fd >= 0 && write(fd, wanted, strlen(wanted)) >= 0;
	if (!ok)
		failed();
	if (fd >= 0)
		close(fd);
	return ok;
}

static void thaw(int dir)
{
	done.thawed += set_file(dir, "cgroup.freeze", "0");
}

/* memory.high as it was granted: `value` is a number or null; without any it is left alone. */
static void lift_memory(int dir, const char *value)
{
	char wanted[24] = "max";
	uint64_t bytes;
	bool none;

	if (number(value, &bytes, &none))
		snprintf(wanted, sizeof(wanted), "%" PRIu64, bytes);
	else if (!none)
		return;
	done.lifted += set_file(dir, "memory.high", wanted);
}

static void lift_cpu(int dir, const char *value)
{
	char wanted[24];
	uint64_t weight;
	bool none;

	if (!number(value, &weight, &none))
		return;
	snprintf(wanted, sizeof(wanted), "%" PRIu64, weight);
	done.lifted += set_file(dir, "cpu.weight", wanted);
}

/* Call `each` with every cgroup directly in a directory whose name begins with `prefix`. Takes
 * over the descriptor. Returns false if time ran out. */
static bool for_each(int dir, const char *prefix, int64_t until_ms, unsigned depth,
		     bool (*each)(int dir, int64_t until_ms, unsigned depth))
{
	DIR *list = fdopendir(dir);
	struct dirent *entry;
	bool all = true;

	if (!list) {
		failed();
		close(dir);
		return true;
	}
	while (all && (entry = readdir(list))) {
		int child;

		if (entry->d_name[0] == '.' || entry->d_type != DT_DIR ||
		    strncmp(entry->d_name, prefix, strlen(prefix)))
			continue;
		if (now_ms() > until_ms || is_late()) {
			all = false;
			break;
		}
		child = open_dir(dirfd(list), entry->d_name);
		if (child < 0) {
			failed();
			continue;
		}
		all = each(child, until_ms, depth);
	}
	closedir(list);
	return all;
}

/* Release a call and those inside it. Takes over the descriptor. */
static bool release_call(int dir, int64_t until_ms, unsigned depth)
{
	static char record[RECORD_BYTES + 1];

	if (!read_record(dir, record) || !is_kind(record, "call") || depth > DEPTH_MAX) {
		close(dir);
		return true;
	}
	thaw(dir);
	lift_memory(dir, member(member(record, "grant"), "memory_high_bytes"));
	return for_each(dir, CALL_PREFIX, until_ms, depth + 1, release_call);
}

/* Release a session and its calls. Takes over the descriptor. */
static bool release_session_until(int dir, int64_t until_ms)
{
	static char record[RECORD_BYTES + 1];
	int agent;

	if (!read_record(dir, record) || !is_kind(record, "session")) {
		close(dir);
		return true;
	}
	lift_cpu(dir, member(member(record, "limits"), "cpu_weight"));
	agent = open_dir(dir, AGENT_LEAF);
	if (agent >= 0) {
		thaw(agent);
		close(agent);
	}
	return for_each(dir, CALL_PREFIX, until_ms, 0, release_call);
}

/* At first each session gets a little time, so that none can use up what others need; sessions
 * that need more are gone through again with all that is left. */
static bool first_turn(int dir, int64_t until_ms, unsigned depth)
{
	(void)depth;
	(void)until_ms;
	if (!release_session_until(dir, now_ms() + SESSION_MS))
		done.late = true;
	return !is_late();
}

static bool second_turn(int dir, int64_t until_ms, unsigned depth)
{
	(void)depth;
	return release_session_until(dir, until_ms);
}

static bool adopted(int pool, int mount, bool (*each)(int, int64_t, unsigned))
{
	static char names[RECORD_BYTES + 1];
	char path[PATH_MAX];
	ssize_t length = flistxattr(pool, names, RECORD_BYTES);

	if (length < 0)
		failed();
	for (ssize_t at = 0; at < length; at += (ssize_t)strlen(names + at) + 1) {
		const char *name = names + at;
		struct stat found;
		ssize_t size;
		int dir;

		if (strncmp(name, ADOPTED_XATTR, strlen(ADOPTED_XATTR)))
			continue;
		size = fgetxattr(pool, name, path, sizeof(path) - 1);
		if (size <= 0)
			continue;
		path[size] = 0;
		dir = open_dir(mount, path + strspn(path, "/"));
		if (dir < 0) {
			failed();
			continue;
		}
		/* Another cgroup may have been made under the path since. */
		if (fstat(dir, &found) ||
		    found.st_ino != strtoull(name + strlen(ADOPTED_XATTR), NULL, 10)) {
			close(dir);
			continue;
		}
		if (!each(dir, deadline_ms, 0))
			return false;
	}
	return true;
}

static bool all_sessions(int pool, int mount, bool (*each)(int, int64_t, unsigned))
{
	/* Opened anew: a directory is read from where the last reader of the descriptor was. */
	int again = open_dir(pool, ".");

	if (again < 0) {
		failed();
		return true;
	}
	return for_each(again, "", deadline_ms, 0, each) && adopted(pool, mount, each);
}

/* --- the pool ------------------------------------------------------------------------------ */

/* Lock the pool as a daemon does, on a file that root alone can open. Returns the descriptor, or
 * -1: EWOULDBLOCK if a daemon runs. */
static int lock_pool(int pool)
{
	struct timespec pause = { .tv_nsec = LOCK_PAUSE_MS * 1000000L };
	int fd = openat(pool, "cgroup.kill", O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return -1;
	for (int tries = 1; flock(fd, LOCK_EX | LOCK_NB); tries++) {
		if (errno != EWOULDBLOCK || tries == LOCK_TRIES) {
			close(fd);
			return -1;
		}
		nanosleep(&pause, NULL);
	}
	return fd;
}

static int cannot(const char *what, const char *path)
{
	fprintf(stderr, "agentcg-release: %s %s: %s\n", what, path, strerror(errno));
	return 1;
}

static int open_cgroup(const char *path)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct statfs fs;

	if (fd >= 0 && (fstatfs(fd, &fs) || fs.f_type != CGROUP2_SUPER_MAGIC)) {
		close(fd);
		errno = EMEDIUMTYPE;
		return -1;
	}
	return fd;
}

/* Remove the pins of a pool's programs (daemon/agentcgroupd/bpf/pins.py), so that nothing is denied
 * any more. Where systemd is about to start the daemon again, they are left to it. */
static void unpin(int pool)
{
	const char *result = getenv("SERVICE_RESULT");
	char path[64];
	struct dirent *entry;
	struct stat found;
	DIR *pins;

	if ((result && strcmp(result, "success")) || fstat(pool, &found))
		return;
	snprintf(path, sizeof(path), PINS "/%llu", (unsigned long long)found.st_ino);
	pins = opendir(path);
	if (!pins)
		return;
	while ((entry = readdir(pins)))
		if (entry->d_name[0] != '.' && unlinkat(dirfd(pins), entry->d_name, 0))
			done.failed++, done.last_error = errno;
	closedir(pins);
	if (rmdir(path))
		done.failed++, done.last_error = errno;
}

static int release(const char *mount_path, const char *pool_path)
{
	static char record[RECORD_BYTES + 1];
	int mount = open_cgroup(mount_path), pool, lock;

	if (mount < 0)
		return cannot("the cgroup2 mount", mount_path);
	pool = open_dir(mount, pool_path + strspn(pool_path, "/"));
	if (pool < 0 && errno == ENOENT) {
		fprintf(stderr, "agentcg-release: the pool is gone: nothing is held back\n");
		return 0;
	}
	if (pool < 0)
		return cannot("the pool", pool_path);
	if (!read_record(pool, record) || !is_kind(record, "pool")) {
		fprintf(stderr, "agentcg-release: %s is no pool of agentcgroup\n", pool_path);
		return 1;
	}
	lock = lock_pool(pool);
	if (lock < 0 && errno == EWOULDBLOCK) {
		fprintf(stderr, "agentcg-release: a daemon is running: nothing is released\n");
		return 0;
	}
	if (lock < 0)
		return cannot("locking", pool_path);
	deadline_ms = now_ms() + TOTAL_MS;
	unpin(pool);
	lift_memory(pool, member(record, "memory_high_bytes"));
	if (all_sessions(pool, mount, first_turn) && done.late)
		done.late = !all_sessions(pool, mount, second_turn);
	fprintf(stderr, "agentcg-release: thawed %u cgroups, lifted %u brakes\n", done.thawed,
		done.lifted);
	if (done.failed)
		fprintf(stderr, "agentcg-release: %u could not be released: %s\n", done.failed,
			strerror(done.last_error));
	if (is_late() || done.late)
		fprintf(stderr, "agentcg-release: time ran out after %d s\n", TOTAL_MS / 1000);
	return done.failed || done.late || is_late();
}

/* The daemon leaves two lines: the cgroup2 mount, and the path of the pool below it. */
static int release_of(const char *run_dir)
{
	static char lines[2][PATH_MAX + 2];
	char path[PATH_MAX];
	struct stat found;
	FILE *file;

	if (snprintf(path, sizeof(path), "%s/%s", run_dir, POOL_FILE) >= (int)sizeof(path)) {
		errno = ENAMETOOLONG;
		return cannot("the run directory", run_dir);
	}
	file = fopen(path, "re");
	if (!file && errno == ENOENT) {
		fprintf(stderr, "agentcg-release: no daemon has run in %s\n", run_dir);
		return 0;
	}
	if (!file)
		return cannot("reading", path);
	if (fstat(fileno(file), &found) || found.st_uid != geteuid()) {
		fprintf(stderr, "agentcg-release: %s is somebody else's\n", path);
		return 1;
	}
	for (int i = 0; i < 2; i++) {
		if (!fgets(lines[i], sizeof(lines[i]), file) || lines[i][0] != '/') {
			fprintf(stderr, "agentcg-release: %s is damaged\n", path);
			return 1;
		}
		lines[i][strcspn(lines[i], "\n")] = 0;
	}
	return release(lines[0], lines[1]);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "--version")) {
		puts("agentcg-release " AGENTCG_VERSION);
		return 0;
	}
	if (argc == 1)
		return release_of(RUN_DIR);
	if (argc == 3 && !strcmp(argv[1], "--run-dir"))
		return release_of(argv[2]);
	fprintf(stderr,
		"usage: agentcg-release [--run-dir DIR]\n"
		"Lets go of what a daemon that is gone had held back (default: " RUN_DIR ").\n");
	return 2;
}
