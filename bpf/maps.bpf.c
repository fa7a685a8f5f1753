/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the other files share: the maps, looking up a flow, reporting a refusal, and what a
 * socket remembers. The files are compiled as one, in the order maps, search, decision, gate, packet,
 * backstop.
 */
#include "gate.h"

#define __always_inline inline __attribute__((always_inline))

#define EPERM 1
#define MAX_ERRNO 4095 /* linux/err.h */
#define IPV4 4 /* in gate_key.family: the IP version, not AF_INET */
#define IPV6 6
#define TCP 6
#define UDP 17
#define ATTEMPTS 4 /* decisions about one call or packet while generations change, then refuse */
#define PART 16 /* steps of a search in one go: slots and levels */
/* In all; a search that takes more is given up, and the flow refused. With four attempts of three
 * searches each, Linux 7.3 ("liveness analysis", 10,000 calls) accepts no more than 800. */
#define PARTS 256
#define LOOPBACK 1 /* interface index in every network namespace */

/* A flow that was let go, as this processor remembers it. */
struct decision {
	struct gate_key flow;
	__u64 generation;
	__u64 deadline;
	__u32 reason;
	__u32 check;    /* of all of these: a hook stays on its processor, but another task's hook may
			 * preempt it while it writes them */
};
#define DECISIONS 4096

/* Some bits of the hash of each decision's flow and generation: this much stays in the fastest cache,
 * so that a flow that is not remembered costs little. */
struct tags {
	__u32 tag[GATE_LINE];
};

/* What was told last about a flow. */
struct topic {
	__u64 ns;
	__u64 untold;   /* refusals since */
};

BPF_ARRAY(settings, __u64, GATE_SETTINGS);
BPF_ARRAY(masks, struct gate_mask, GATE_TABLES * GATE_MASKS);
/* Userspace replaces the maps in these two by larger ones when it needs them. */
BPF_F_TABLE("array", int, struct gate_entry, some_entries, 1024, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
BPF_F_TABLE("array", int, struct gate_line, some_lines, 512, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
BPF_ARRAY_OF_MAPS(entries, "some_entries", 1);
BPF_ARRAY_OF_MAPS(slots, "some_lines", 2);
BPF_LPM_TRIE(paths, struct gate_route, struct gate_path, GATE_ROUTES);
BPF_HASH(tunnels, __u32, __u8, GATE_TUNNELS);
/* Cookies of network namespaces whose flows are left to another instance: its hooks are attached
 * wherever ours are. */
BPF_HASH(others, __u64, __u8, GATE_OTHERS);
BPF_TABLE("lru_hash", struct gate_key, struct topic, recent, GATE_RECENT);
BPF_PERCPU_ARRAY(counters, __u64, GATE_COUNTERS);
BPF_RINGBUF_OUTPUT(events, GATE_RING_PAGES);
BPF_PERCPU_ARRAY(decisions, struct decision, DECISIONS);
BPF_PERCPU_ARRAY(tags, struct tags, DECISIONS / GATE_LINE);
BPF_SK_STORAGE(sockets, struct gate_association);

/* These look like calls of helpers with made-up numbers (-D, from edges/bpf/compiler.py). The linker
 * there makes them calls of the functions below, which the verifier checks once each, however often
 * they are called. */
struct search;
static int (*call_search_part)(struct search *) = (void *)GATE_SEARCH_PART;
static int (*call_search)(struct search *) = (void *)GATE_SEARCH;
static int (*call_search_policy)(struct search *) = (void *)GATE_SEARCH_POLICY;

static __always_inline __u64 setting(int which)
{
	__u64 *word = settings.lookup(&which);

	return word ? *word : 0;
}

/* Read a setting after `before` was read, on any processor: the index depends on `before` (a
 * generation or a deadline, whose highest bit is always 0), and dependent loads are not reordered.
 * Otherwise a socket could remember an old table's answer under the new generation. */
static __always_inline __u64 setting_after(__u64 before, int which)
{
	return setting(which + (int)(before >> 63));
}

/* Return 0, in a way that depends on a value that was read: for `setting_after`. */
static __always_inline __u64 having_read(__u64 value)
{
	asm volatile("%0 &= 0" : "+r"(value));
	return value;
}

/* Is one deadline later than another? 0 is never. */
static __always_inline int outlives(__u64 one, __u64 other)
{
	return other && (!one || one > other);
}

static __always_inline void count(int reason)
{
	__u64 *counter = counters.lookup(&reason);

	if (counter)
		*counter += 1;
}

#define barrier() asm volatile("" ::: "memory")

static __always_inline int same(const __u32 *a, const __u32 *b)
{
	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

/* Where a flow begins, apart from its mark: the network namespace, 0 for the gate's own, and the
 * device that its socket is bound to. */
struct origin {
	__u64 netns;
	__u32 device;
};

/* Report a refusal, with the calling process. A packet has none: its sender may be gone. */
static __always_inline void tell(struct gate_key *flow, const struct origin *origin,
				 __u32 reason, __u32 policy, __u32 hook, __u64 cgroup)
{
	struct topic now = {.ns = bpf_ktime_get_ns()};
	struct gate_event *event;
	__u16 sport = flow->sport;
	struct topic *last;

	/* The topic: a flow without its source port, because each attempt of a client has a new one;
	 * for each reason another. */
	flow->sport = 0;
	flow->mask_number = reason;
	last = recent.lookup(flow);
	if (last && now.ns - last->ns < GATE_EVENT_INTERVAL_NS) {
		__sync_fetch_and_add(&last->untold, 1);
		return;
	}
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count(GATE_EVENTS_LOST);
		return;
	}
	event->ns = now.ns;
	event->cgroup = cgroup;
	event->netns = origin->netns;
	event->device = origin->device;
	event->untold = last ? last->untold : 0;
	event->flow = *flow;
	event->flow.sport = sport;
	event->flow.mask_number = 0;
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
	recent.update(flow, &now);
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
