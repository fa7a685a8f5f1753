/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the other files share: the maps, looking up a flow, reporting a refusal, and what a
 * socket remembers. The files are compiled as one, in the order maps, gate, packet, backstop.
 */
#include "gate.h"

#define __always_inline inline __attribute__((always_inline))

#define EPERM 1
#define MAX_ERRNO 4095 /* linux/err.h */
#define AF_INET 4
#define AF_INET6 6
#define TCP 6
#define UDP 17
#define LOOPBACK 1 /* interface index in every network namespace */

BPF_ARRAY(settings, __u64, GATE_SETTINGS);
BPF_ARRAY(masks, struct gate_masks, GATE_TABLES * GATE_BUFFERS);
BPF_HASH(entries, struct gate_key, struct gate_entry, GATE_ENTRIES);
BPF_LPM_TRIE(sources, struct gate_route, struct gate_source, GATE_SOURCES);
BPF_TABLE("lru_hash", struct gate_key, __u64, recent, GATE_RECENT);
BPF_PERCPU_ARRAY(counters, __u64, GATE_COUNTERS);
BPF_RINGBUF_OUTPUT(events, GATE_RING_PAGES);
BPF_SK_STORAGE(sockets, struct gate_association);

static __always_inline __u64 setting(int which)
{
	__u64 *word = settings.lookup(&which);

	return word ? *word : 0;
}

/* Read a setting after the generation, on any processor: the index depends on the generation
 * (whose highest bit is always 0), and dependent loads are not reordered. Otherwise a socket
 * could remember an old table's answer under the new generation. */
static __always_inline __u64 setting_after(__u64 generation, int which)
{
	return setting(which + (int)(generation >> 63));
}

static __always_inline void count(int reason)
{
	__u64 *counter = counters.lookup(&reason);

	if (counter)
		*counter += 1;
}

/* Return the first match in tuple order, 0 if no entry matches. */
static __always_inline struct gate_entry *classify(__u32 table, __u64 epoch,
						   const struct gate_key *flow)
{
	int space = table * GATE_BUFFERS + (epoch % GATE_BUFFERS);
	struct gate_masks *list = masks.lookup(&space);
	struct gate_entry *entry;
	struct gate_key key;

	if (!list)
		return 0;
	for (int i = 0; i < GATE_TUPLES; i++) {
		const struct gate_key *mask = &list->mask[i];

		if (!mask->tuple)
			break;
		for (int word = 0; word < 4; word++) {
			key.saddr[word] = flow->saddr[word] & mask->saddr[word];
			key.daddr[word] = flow->daddr[word] & mask->daddr[word];
		}
		key.sport = flow->sport & mask->sport;
		key.dport = flow->dport & mask->dport;
		key.proto = flow->proto & mask->proto;
		key.family = flow->family;
		key.space = space;
		key.tuple = i;
		key.mark = flow->mark & mask->mark;
		entry = entries.lookup(&key);
		if (entry)
			return entry;
	}
	return 0;
}

static __always_inline int same(const __u32 *a, const __u32 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

/* Report a refusal, with the calling process. A packet has none: its sender may be gone. */
static __always_inline void tell(const struct gate_key *flow, __u32 reason, __u32 policy,
				 __u32 hook, __u64 cgroup)
{
	struct gate_key topic = *flow;
	__u64 now = bpf_ktime_get_ns();
	__u64 *last;
	struct gate_event *event;

	topic.sport = 0; /* each attempt of a client has a new one */
	topic.tuple = reason;
	last = recent.lookup(&topic);
	if (last && now - *last < GATE_EVENT_INTERVAL_NS)
		return;
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count(GATE_EVENTS_LOST);
		return;
	}
	event->ns = now;
	event->cgroup = cgroup;
	event->flow = *flow;
	event->reason = reason;
	event->policy = policy;
	event->hook = hook;
	if (hook == GATE_EGRESS) {
		event->pid = 0;
		__builtin_memset(event->comm, 0, sizeof(event->comm));
	} else {
		event->pid = bpf_get_current_pid_tgid() >> 32;
		bpf_get_current_comm(event->comm, sizeof(event->comm));
	}
	events.ringbuf_submit(event, 0);
	recent.update(&topic, &now);
}

static __always_inline int same_flow(const struct gate_key *a, const struct gate_key *b)
{
	return same(a->saddr, b->saddr) && same(a->daddr, b->daddr) && a->sport == b->sport &&
	       a->dport == b->dport && a->proto == b->proto && a->mark == b->mark;
}

static __always_inline int is_over(__u64 deadline)
{
	return deadline && bpf_ktime_get_boot_ns() >= deadline;
}

/* Replace it as a whole: a concurrent call on this socket must not see half of it. */
static __always_inline void associate(struct bpf_sock *sk, struct gate_association *now)
{
	sockets.sk_storage_delete(sk);
	sockets.sk_storage_get(sk, now, BPF_SK_STORAGE_GET_F_CREATE);
}
