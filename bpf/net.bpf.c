// SPDX-License-Identifier: GPL-2.0
/*
 * What the sockets of sessions and calls receive and send. Attached to the pool, beside any program
 * that others have there; lets every packet through.
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

/**
 * count - add a packet to every entry on its way down
 * @skb: the packet
 * @is_sent: whether it leaves
 */
static __always_inline void count(struct __sk_buff *skb, bool is_sent)
{
	struct net_traffic *entry;
	u64 id;
	int i;

	for (i = 1; i <= LEVELS; i++) {
		id = bpf_skb_ancestor_cgroup_id(skb, i);
		if (!id)
			return;
		entry = bpf_map_lookup_elem(&traffic, &id);
		if (!entry)
			continue;
		if (is_sent) {
			__sync_fetch_and_add(&entry->send_bytes, skb->len);
			__sync_fetch_and_add(&entry->send_packets, 1);
		} else {
			__sync_fetch_and_add(&entry->receive_bytes, skb->len);
			__sync_fetch_and_add(&entry->receive_packets, 1);
		}
	}
}

/* Runs for each packet that a socket below the pool gets. Returns 1: let through. */
SEC("cgroup_skb/ingress")
int on_receive(struct __sk_buff *skb)
{
	count(skb, false);
	return 1;
}

/* Runs for each packet that a socket below the pool sends. Returns 1: let through. */
SEC("cgroup_skb/egress")
int on_send(struct __sk_buff *skb)
{
	count(skb, true);
	return 1;
}
