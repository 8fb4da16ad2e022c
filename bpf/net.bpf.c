// SPDX-License-Identifier: GPL-2.0
/*
 * What the sockets of sessions and calls receive and send. Attached to the pool, and to the cgroups
 * of adopted sessions, beside any program that others have there; lets every packet through, but
 * for those that a call sends faster than it may.
 *
 * A packet belongs to the cgroup in which its socket was made. It is counted for that cgroup and
 * for those above it that the daemon has given an entry: a call inside another one is a part of
 * that, as with all that the kernel counts.
 */
#include "compat.h"

#include "maps.h"

char LICENSE[] SEC("license") = "GPL";

/*
 * Levels of the tree that are looked at, from below the root: the way to the pool, which may be
 * inside a pod's cgroup, the session, its call, and calls inside that.
 */
#define LEVELS 20

ID_MAP(traffic, struct net_traffic);
struct net_control control = {};

/*
 * What may be sent at once. TCP tries again by its own timer after half a second where it has
 * nothing on its way that could be acknowledged (net/ipv4/tcp_output.c: RESOURCE_PROBE_INTERVAL),
 * so with less than that much the rate would not be reached.
 */
#define BURST_NS    600000000ULL
#define BURST_BYTES (256 << 10) /* at the lowest rates, four of the largest packets */
#define NS_PER_S    1000000000ULL

/* What a program for packets that are sent returns (include/linux/bpf-cgroup.h). */
enum { PASS = 1, DROP_AND_SLOW = 2, PASS_AND_SLOW = 3 };

/* Returns the entry of the cgroup of a packet's socket at a level below the root, NULL: none. */
static __always_inline struct net_traffic *entry_at(struct __sk_buff *skb, int level, bool *is_last)
{
	u64 id = bpf_skb_ancestor_cgroup_id(skb, level);

	*is_last = !id;
	return id ? bpf_map_lookup_elem(&traffic, &id) : NULL;
}

static __always_inline u64 cost_ns(const struct net_traffic *entry, u32 len)
{
	return len * NS_PER_S / entry->send_bytes_per_s;
}

/**
 * pace - pay for a packet of what a cgroup may send
 * @entry: the cgroup's, with a rate
 * @len: bytes of the packet
 *
 * A clock that goes on with each packet by the time that it takes at the rate, and never falls
 * behind real time, is ahead of that by what was sent too early.
 */
static __always_inline int pace(struct net_traffic *entry, u32 len)
{
	u64 now = bpf_ktime_get_ns(), rate = entry->send_bytes_per_s, paid = entry->paid_until_ns;
	u64 burst = BURST_BYTES * NS_PER_S / rate;

	if (burst < BURST_NS)
		burst = BURST_NS;
	/* Where two CPUs do this at once, only one of them sets the clock. */
	if (paid < now)
		__sync_val_compare_and_swap(&entry->paid_until_ns, paid, now);
	paid = __sync_fetch_and_add(&entry->paid_until_ns, cost_ns(entry, len));
	if (paid <= now + burst)
		return paid <= now + burst / 2 ? PASS : PASS_AND_SLOW;
	__sync_fetch_and_add(&entry->paid_until_ns, -cost_ns(entry, len));
	__sync_fetch_and_add(&entry->refused_packets, 1);
	return DROP_AND_SLOW;
}

/* Takes a packet that was refused back from the entries above the one that refused it. */
static __always_inline void take_back(struct __sk_buff *skb, int refused_at)
{
	struct net_traffic *entry;
	bool is_last;

	for (int level = control.first_level, i = 0; i < LEVELS && level < refused_at;
	     i++, level++) {
		entry = entry_at(skb, level, &is_last);
		if (!entry)
			continue;
		__sync_fetch_and_add(&entry->send_bytes, -(u64)skb->len);
		__sync_fetch_and_add(&entry->send_packets, -1);
		if (entry->send_bytes_per_s)
			__sync_fetch_and_add(&entry->paid_until_ns, -cost_ns(entry, skb->len));
	}
}

/* Runs for each packet that a socket below the pool gets. Lets it through. */
SEC("cgroup_skb/ingress")
int on_receive(struct __sk_buff *skb)
{
	struct net_traffic *entry;
	bool is_last;

	for (int level = control.first_level, i = 0; i < LEVELS; i++, level++) {
		entry = entry_at(skb, level, &is_last);
		if (is_last)
			break;
		if (!entry)
			continue;
		__sync_fetch_and_add(&entry->receive_bytes, skb->len);
		__sync_fetch_and_add(&entry->receive_packets, 1);
	}
	return PASS;
}

/* Runs for each packet that a socket below the pool sends. */
SEC("cgroup_skb/egress")
int on_send(struct __sk_buff *skb)
{
	struct net_traffic *entry;
	int result = PASS;
	bool is_last;

	for (int level = control.first_level, i = 0; i < LEVELS; i++, level++) {
		entry = entry_at(skb, level, &is_last);
		if (is_last)
			break;
		if (!entry)
			continue;
		if (entry->send_bytes_per_s) {
			int paced = pace(entry, skb->len);

			if (paced == DROP_AND_SLOW) {
				take_back(skb, level);
				return DROP_AND_SLOW;
			}
			if (paced == PASS_AND_SLOW)
				result = PASS_AND_SLOW;
		}
		__sync_fetch_and_add(&entry->send_bytes, skb->len);
		__sync_fetch_and_add(&entry->send_packets, 1);
	}
	return result;
}
