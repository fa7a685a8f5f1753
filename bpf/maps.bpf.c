/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the other files share: the maps, looking up a flow, reporting a refusal, and what a
 * socket remembers. The files are compiled as one, in the order maps, gate, packet, backstop.
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

BPF_ARRAY(settings, __u64, GATE_SETTINGS);
BPF_ARRAY(masks, struct gate_masks, GATE_TABLES * 2 * GATE_PARTS);
BPF_F_TABLE("hash", struct gate_key, struct gate_entry, entries, GATE_ENTRIES, BPF_F_NO_PREALLOC);
BPF_F_TABLE("array", int, __u64, filter, 2 * GATE_FILTER_WORDS, BPF_F_MMAPABLE);
BPF_LPM_TRIE(sources, struct gate_route, struct gate_source, GATE_SOURCES);
BPF_TABLE("lru_hash", struct gate_key, __u64, recent, GATE_RECENT);
BPF_PERCPU_ARRAY(counters, __u64, GATE_COUNTERS);
BPF_RINGBUF_OUTPUT(events, GATE_RING_PAGES);
BPF_PERCPU_ARRAY(decisions, struct decision, DECISIONS);
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

/* A hash of a key, for the filter and for the decisions; layout.py (key_hash) has the same. It
 * hashes even and odd words apart, because a processor can multiply for both at once. */
static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 hash_of(const __u64 *word)
{
	return mix(mix(mix(mix(0, word[0]), word[2]), word[4]),
		   mix(mix(mix(0, word[1]), word[3]), word[5]));
}

/* What an answer's `check` must be; layout.py (pack_entry) has the same. */
static __always_inline __u32 check_of(__u64 hash, __u64 since, const struct gate_answer *answer)
{
	__u64 what = (__u64)answer->error << 32 | answer->state;

	return mix(mix(mix(hash, since), answer->rank),
		   mix(mix(answer->deadline, what), answer->id));
}

/* A search of one table. */
struct search {
	union {
		struct gate_key flow;
		__u64 word[GATE_KEY_WORDS];
	};
	__u64 generation;
	struct gate_answer found;
	int part;       /* of the list of masks */
	int filter;     /* index of the first word of the filter in use */
	int shift;      /* how many bits of a hash the filter ignores */
	int torn;       /* an entry was replaced while it was read */
};

/* Try one mask; 1 ends the search, as no later mask has an answer of a lower rank. */
static __always_inline int try_mask(struct search *search, const struct gate_mask *mask)
{
	struct gate_answer answer;
	struct gate_entry *entry;
	__u64 key[GATE_KEY_WORDS];
	__u64 hash, bit, since;
	__u64 *bits;
	int at;

	if (mask->best > search->found.rank)
		return 1;
	for (int word = 0; word < GATE_KEY_WORDS; word++)
		key[word] = search->word[word] & mask->word[word];
	key[GATE_KEY_WORDS - 1] |= mask->last_word;
	hash = hash_of(key);
	bit = hash >> search->shift;
	at = search->filter + (bit >> 6);
	bits = filter.lookup(&at);
	if (!bits || !(*bits >> (bit & 63) & 1))
		return 0;
	entry = entries.lookup((struct gate_key *)key);
	/* Look twice: the kernel replaces an element by a new one at the head of its list, and a
	 * reader that was past the head when the old one goes finds neither. */
	if (!entry)
		entry = entries.lookup((struct gate_key *)key);
	if (!entry)
		return 0;
	since = *(volatile __u64 *)&entry->since;
	answer = since <= search->generation ? entry->now : entry->before;
	barrier(); /* judge the copy, not what the entry says by now */
	if (answer.check != check_of(hash, since, &answer)) {
		search->torn = 1;
		return 0;
	}
	/* Of two answers of one rank, take the longer-lived. */
	if (answer.state && (answer.rank < search->found.rank ||
			     (answer.rank == search->found.rank &&
			      outlives(answer.deadline, search->found.deadline))))
		search->found = answer;
	return 0;
}

/* Try one part of a table's masks; 1 ends the search. A function of its own, because a loop over
 * all masks is more than the verifier follows. */
int search_part(struct search *search)
{
	struct gate_masks *part;
	int number;

	if (!search)
		return 1;
	number = search->part++;
	part = masks.lookup(&number);
	if (!part)
		return 1;
	for (int i = 0; i < GATE_PART; i++)
		if (try_mask(search, &part->mask[i]))
			return 1;
	return 0;
}

int search(struct search *search)
{
	if (!search)
		return 0;
	/* Unrolled, because Linux 6.1 refuses a jump back to an instruction behind a call. */
#pragma unroll
	for (int part = 0; part < GATE_PARTS; part++)
		if (call_search_part(search))
			return 0;
	return 0;
}

/* Look search->flow up in a table: find the answer of the lowest rank (tuple-space search), and
 * return its state; 0: no entry matches, and `found` is not set. */
static __always_inline int classify(__u32 table, __u64 generation, struct search *search)
{
	__u64 list = setting_after(generation, GATE_LIST + table);
	__u64 used = setting_after(generation, GATE_FILTER);

	search->generation = generation;
	search->filter = (used & 1) * GATE_FILTER_WORDS;
	search->shift = (used >> 1) & 63;
	search->found.rank = GATE_NO_RANK - 1;
	search->found.deadline = 0;
	search->found.state = 0;
	search->part = (table * 2 + (list & 1)) * GATE_PARTS;
	if (list)
		call_search(search);
	return search->found.state;
}

/* Find the policy that names search->flow, as of one generation. Return 0 if another generation
 * began during each attempt. */
int search_policy(struct search *search)
{
	if (!search)
		return 0;
#pragma unroll
	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		__u64 generation = setting(GATE_GENERATION);

		search->torn = 0;
		classify(GATE_POLICY, generation, search);
		/* The deadline only orders this load after the lookup; its highest bit is 0. */
		if (!search->torn &&
		    setting_after(search->found.deadline, GATE_GENERATION) == generation)
			return 1;
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
	topic.mask_number = reason; /* unused in a flow: one topic for each reason */
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
