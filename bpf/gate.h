/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The contract between the hooks and userspace. ipsecgate/core/tables/layout.py mirrors
 * it; tests compare every constant, and the structures as the compiler lays them out.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d whatever the socket's
 * family: that makes one code path, and a v4-mapped destination is not an exception to it.
 * Ports are in network order. In a flow, 0 means "not chosen yet"; a mask of 0 matches any.
 */
#ifndef IPSECGATE_GATE_H
#define IPSECGATE_GATE_H

#define GATE_LAYOUT 4   /* raise it when a structure, a map's size or a number here changes */

/* The two tables in which a flow is looked up. */
#define GATE_POLICY 0   /* must this flow be protected? the operator's policies */
#define GATE_SPD 1      /* is it protected now? the kernel's SPD joined with its SAD */
#define GATE_TABLES 2

#define GATE_PART 128           /* masks that are searched in one go */
#define GATE_PARTS 32
#define GATE_MASKS 4096         /* distinct masks of one table: all parts */
#define GATE_ENTRIES 1048576    /* of both tables together */
#define GATE_SOURCES 131072
#define GATE_RECENT 16384
#define GATE_RING_PAGES 64

/* A Bloom filter with one hash, in words of 64 bits. A mask whose bit is not set has no entry for
 * this flow, so the hash lookup is spared. There are two filters. The setting GATE_FILTER says which
 * is in use (bit 0) and how many low bits of a hash it ignores (from bit 1 on): the fewer entries,
 * the more, because a small filter stays in the caches. */
#define GATE_FILTER_BITS 24
#define GATE_FILTER_WORDS (1 << (GATE_FILTER_BITS - 6))

/* A flow, a mask or an entry's key: six words of 64 bits. Only the keys of entries have `table`
 * and `mask_number`, the number of the entry's mask in that table; elsewhere both are 0. */
struct gate_key {
	__u32 saddr[4];
	__u32 daddr[4];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 family;    /* 4 or 6: what the wire will see */
	__u16 unused;
	__u32 mark;     /* SO_MARK, network order */
	__u16 mask_number; /* network order */
	__u8 table;
	__u8 unused2;
} __attribute__((aligned(8)));
#define GATE_KEY_WORDS 6

/* A table's masks, those with the best (lowest) ranks first, so that the search can stop early.
 * There are two lists for each table; the setting GATE_LIST says which is in use. */
struct gate_mask {
	__u64 word[GATE_KEY_WORDS];
	__u64 last_word; /* of a key that has `table` and this mask's `mask_number` alone */
	__u64 best;     /* no entry of this mask has a lower rank; GATE_NO_RANK ends the list */
};
#define GATE_NO_RANK (~0ULL)

struct gate_masks {
	struct gate_mask mask[GATE_PART];
};

/* The state of a table's entry, for the flows that match it. */
#define GATE_PROTECT 1  /* GATE_POLICY: must be protected */
#define GATE_BYPASS 2   /* GATE_POLICY: may leave unprotected */
#define GATE_DISCARD 3  /* GATE_POLICY: refused */
#define GATE_LIVE 4     /* GATE_SPD: a live SA protects it */
#define GATE_DEAD 5     /* GATE_SPD: the winning kernel policy has no live SA */

/* The entry with the lowest rank wins among all that match. */
struct gate_answer {
	__u64 rank;
	__u64 deadline; /* GATE_LIVE: CLOCK_BOOTTIME ns when the SA ends by itself, 0 = never */
	__u32 state;    /* 0: no entry */
	__u32 error;    /* errno of a refusal, 0 = EPERM */
	__u32 id;       /* GATE_POLICY: the policy's index among those in force */
	__u32 check;    /* of the answer, of its entry's key and of `since`: the kernel may give an
			 * entry's memory to another key while a hook reads it */
};

/* What an entry says from generation `since` on, and what it said before. A change of many
 * entries is written with the next generation, and is in force at once when that one begins:
 * no flow is judged by half of it. */
struct gate_entry {
	__u64 since;
	struct gate_answer now;
	struct gate_answer before;
};

/* The source address that the kernel would choose for an unbound socket. */
struct gate_route {
	__u32 prefixlen;        /* 0..128 */
	__u32 daddr[4];
};

struct gate_source {
	__u32 saddr[4];         /* all zero: no route */
};

/* One word of settings each, so that every change is one atomic write. */
#define GATE_LIST 0             /* + table: counts the lists of masks published, 0: none yet. Odd or
				 * even says which of the two is in use */
#define GATE_AUDIT 2            /* 1: count and report, refuse nothing */
#define GATE_DENY 3             /* 1: flows that no policy names are refused */
#define GATE_IKE 4              /* thread group of the IKE daemon, 0 = none */
#define GATE_ERROR 5            /* errno for flows that no policy names, 0 = EPERM */
#define GATE_VERSION 6          /* GATE_LAYOUT of the program that created the maps. The one word
				 * that no layout ever moves: any version must be able to read it */
#define GATE_GENERATION 7       /* incremented with every change of a table or a source */
#define GATE_NETNS 8            /* cookie of the network namespace whose SPD this is */
#define GATE_TUN 9              /* interface behind which the IKE daemon does ESP, 0 = none */
#define GATE_IKE_CGROUP 10      /* the IKE daemon's cgroup; guards against a reused pid or index.
				 * 0: the pid counts in any cgroup, GATE_TUN in no namespace */
#define GATE_FILTER 11
#define GATE_SETTINGS 12

/* What a socket remembers, and the generation in which it was true. GATE_DAEMON has a process id in
 * its place, so it must be compared with GATE_IKE. The backstop compares it with the generation only
 * after that failed: then the daemon is gone, and at worst the socket remembers nothing. */
#define GATE_COVERED 1  /* UDP: an SA protects this flow */
#define GATE_CLEAR 2    /* packets of this flow may leave unprotected */
#define GATE_DAEMON 3   /* the IKE daemon's own socket; `generation` is its thread group */

struct gate_association {
	__u64 generation;
	__u64 deadline; /* GATE_COVERED: of the entry that covered the flow */
	struct gate_key flow;
	__u32 kind;
	__u32 replaced; /* GATE_COVERED: how many other flows it was before, in this generation */
};
#define GATE_REPLACED 4

/* Why a flow was allowed or refused, or a packet blocked: for counters and events. The hooks depend
 * on the order: a reason below GATE_ALLOW_EXEMPT may be remembered, and all from
 * GATE_REFUSE_UNCOVERED on refuse. */
#define GATE_ALLOW_DEFAULT 0
#define GATE_ALLOW_BYPASS 1
#define GATE_ALLOW_COVERED 2
#define GATE_ALLOW_ASSOCIATED 3 /* covered at its last call, and nothing has changed since */
#define GATE_ALLOW_EXEMPT 4     /* loopback, own addresses, DHCP, the IKE daemon */
#define GATE_REFUSE_UNCOVERED 5
#define GATE_REFUSE_DISCARD 6
#define GATE_REFUSE_DEFAULT 7
#define GATE_REFUSE_NO_SOURCE 8 /* unbound, and its source address is unknown */
#define GATE_REFUSE_NOT_READY 9 /* no policies published yet */
#define GATE_REFUSE_NETNS 10    /* from another network namespace, whose SPD is unknown */
#define GATE_BLOCK_CLEAR 11     /* must be protected, and would have left in clear */
#define GATE_BLOCK_DISCARD 12
#define GATE_BLOCK_DEFAULT 13   /* no policy names it, and no hook checked it */
#define GATE_BLOCK_NOT_READY 14
#define GATE_BLOCK_UNREADABLE 15 /* a later fragment, a source route, too many headers */
#define GATE_AUDITED 16         /* refusals that audit mode allowed; also counted by reason */
#define GATE_AUDITED_PACKETS 17 /* blocked packets that audit mode allowed, likewise */
#define GATE_EVENTS_LOST 18     /* the ring was full; the flow's next refusal is reported again */
#define GATE_COUNTERS 19

#define GATE_CONNECT4 0
#define GATE_CONNECT6 1
#define GATE_SENDMSG4 2
#define GATE_SENDMSG6 3
#define GATE_EGRESS 4

struct gate_event {
	__u64 ns;       /* CLOCK_MONOTONIC */
	__u64 cgroup;
	struct gate_key flow;
	__u32 reason;
	__u32 policy;
	__u32 pid;      /* thread group; 0: a packet, whose sender is unknown */
	__u32 hook;
	char comm[16];
};

/* At most one event per flow in this time, however often it is refused. */
#define GATE_EVENT_INTERVAL_NS 100000000ULL

#endif
