/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The contract between the hooks and userspace. ipsecgate/core/tables mirrors it
 * (layout.py, packed.py); tests compare every constant, and the structures as the compiler lays
 * them out.
 *
 * Addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d whatever the socket's
 * family: that makes one code path, and a v4-mapped destination is not an exception to it.
 * Ports are in network order. In a flow, 0 means "not chosen yet"; a mask of 0 matches any.
 */
#ifndef IPSECGATE_GATE_H
#define IPSECGATE_GATE_H

#define GATE_LAYOUT 7   /* raise it when a structure, a map's size or a number here changes */

/* The two tables in which a flow is looked up. */
#define GATE_POLICY 0   /* must this flow be protected? the operator's policies */
#define GATE_SPD 1      /* is it protected now? the kernel's SPD joined with its SAD */
#define GATE_TABLES 2

#define GATE_MASKS 4096         /* distinct masks of one table, numbered from 0 */
#define GATE_ENTRIES 4194304    /* of both tables together, at most */
#define GATE_ROUTES 131072
#define GATE_TUNNELS 4096
#define GATE_OTHERS 1024
#define GATE_RECENT 16384
#define GATE_RING_PAGES 64

/* Two tables of slots find what a search needs. Both are open-addressed: a hash says, by its highest
 * bits, at which slot to begin, and the first slot that is 0 ends the search.
 *
 * The index says which masks of a table can have entries for a flow. Its hash is of a prefix of the
 * destination, of whole bytes (a level: 0 to 16 of the 16 bytes); a mask belongs to the longest level
 * that it contains. A slot is a mask's number (the low bits) and a bit for each of its entries there,
 * by the hash of the entry's key, so that most masks without an entry for the flow are ruled out at
 * once. Between two fillings, bits are only ever set.
 *
 * The places say where an entry is. The hash is of the entry's key. A slot is 1 + the entry's number
 * (the low bits) and other bits of the hash; GATE_GONE is an entry that was deleted.
 *
 * Both are in one map, the index first. There are two such maps, one to use and one to fill. The
 * setting GATE_SLOTS says which is in use (from bit 16 on), and how many bits of a hash say where to
 * begin: bits 0 to 7 for the index, 8 to 15 for the places. They are as small as their content allows,
 * so that they stay in the caches. */
#define GATE_LINE 16            /* slots of a cache line */
#define GATE_MASK_BITS 12       /* of a slot of the index: the number of a mask */
#define GATE_MARK_BITS 20       /* of a slot of the index: of which an entry has one */
#define GATE_PLACE_BITS 23      /* of a slot of the places: 1 + the number of an entry */
#define GATE_PROBES 32          /* slots from where an entry's hash points to its own, at most */
#define GATE_GONE 0xffffffff
#define GATE_LEVELS_V4 32       /* in GATE_LEVELS: where the bits for IPv4 begin */

struct gate_line {
	__u32 slot[GATE_LINE];
};

/* A flow, a mask or an entry's key: six words of 64 bits. Only the keys of entries have `table`
 * and `mask_number`, the number of the entry's mask in that table; elsewhere both are 0. */
struct gate_key {
	__u32 saddr[4];
	__u32 daddr[4];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 family;    /* 4 or 6: what the wire will see */
	__u16 if_id;    /* network order; of an XFRM interface in the flow's way, 0: none */
	__u32 mark;     /* SO_MARK, network order; 0 from another network namespace, which it never
			 * leaves */
	__u16 mask_number; /* network order */
	__u8 table;
	__u8 unused;
} __attribute__((aligned(8)));
#define GATE_KEY_WORDS 6

/* A mask of a table. It changes only when no entry that is in force has its number. */
struct gate_mask {
	__u64 word[GATE_KEY_WORDS];
	__u64 last_word; /* of a key that has `table` and this mask's `mask_number` alone */
};

/* The state of a table's entry, for the flows that match it. */
#define GATE_PROTECT 1  /* GATE_POLICY: must be protected */
#define GATE_BYPASS 2   /* GATE_POLICY: may leave unprotected */
#define GATE_DISCARD 3  /* GATE_POLICY: refused */
#define GATE_LIVE 4     /* GATE_SPD: a live SA protects it */
#define GATE_DEAD 5     /* GATE_SPD: the winning kernel policy has no live SA */
#define GATE_PASS 6     /* GATE_SPD: the winning kernel policy asks for no SA */
#define GATE_DERIVED 7  /* GATE_POLICY: must be protected, unless GATE_SPD says GATE_PASS */

/* The entry with the lowest rank wins among all that match. */
struct gate_answer {
	__u64 rank;
	__u64 deadline; /* GATE_LIVE: CLOCK_BOOTTIME ns when the SA ends by itself, 0 = never */
	__u32 state;    /* 0: no entry */
	__u32 error;    /* errno of a refusal, 0 = EPERM */
	__u32 id;       /* GATE_POLICY: the policy's index among those in force; GATE_SPD: of a live
			 * entry, for userspace: which SA */
	__u32 check;    /* of the answer, of its entry's key and of `since`: another entry may be
			 * written here while a hook reads this one */
};

/* What an entry says from generation `since` on, and what it said before. A change of many
 * entries is written with the next generation, and is in force at once when that one begins:
 * no flow is judged by half of it. An entry never changes: another one takes its place. */
struct gate_entry {
	struct gate_key key;
	__u64 hash;     /* of the key */
	__u64 since;
	struct gate_answer now;
	struct gate_answer before;
};

/* Where a flow begins, and its destination. Routing depends on all of these. */
struct gate_route {
	__u32 prefixlen;        /* GATE_ORIGIN_BITS + 0..128 */
	__u32 netns[2];         /* cookie of the network namespace, 0: the gate's own */
	__u32 device;           /* that the socket is bound to */
	__u32 mark;             /* the bits of SO_MARK that routing rules ask for; network order */
	__u32 daddr[4];
};
#define GATE_ORIGIN_BITS 128

/* Where routing leads. The kernel looks up the SPD once for a flow as it begins. Behind a tunnel
 * device, or once the host has translated the source address, it looks it up again. */
struct gate_path {
	__u32 saddr[4];         /* source address of an unbound socket; all zero: no route */
	__u32 translated[4];    /* source address of the second lookup, if GATE_TRANSLATED */
	__u32 mark;             /* mark of the second lookup, if GATE_MARKED; network order */
	__u16 if_id;            /* interface id of the second lookup; network order */
	__u8 flags;
	__u8 reason;            /* not 0: the flow is refused, for this reason */
};
#define GATE_TUNNELED 1         /* an XFRM or VTI interface looks it up again */
#define GATE_MARKED 2           /* ... with the interface's mark */
#define GATE_TRANSLATED 4       /* the host translates the source address, and looks it up again */

/* One word of settings each, so that every change is one atomic write. */
#define GATE_PUBLISHED 0        /* + table: 1: the table is published */
#define GATE_AUDIT 2            /* 1: count and report, refuse nothing */
#define GATE_DENY 3             /* 1: flows that no policy names are refused */
#define GATE_IKE 4              /* thread group of the IKE daemon, 0 = none */
#define GATE_ERROR 5            /* errno for flows that no policy names, 0 = EPERM */
#define GATE_VERSION 6          /* GATE_LAYOUT of the program that created the maps. The one word
				 * that no layout ever moves: any version must be able to read it */
#define GATE_GENERATION 7       /* incremented with every change of a table or a source */
#define GATE_NETNS 8            /* cookie of the network namespace whose SPD this is */
#define GATE_PATHS 9            /* 1: bound sockets need a path, too; 2: and routing may depend on
				 * their address, so only with the address of their path */
#define GATE_IKE_CGROUP 10      /* the IKE daemon's cgroup; guards against a reused pid or index.
				 * 0: the pid counts in any cgroup, `tunnels` in no namespace */
#define GATE_SLOTS 11
#define GATE_LEVELS 12          /* + table: a bit for each level that has masks, from bit 0 on for
				 * IPv6 and from GATE_LEVELS_V4 on for IPv4 */
#define GATE_MARKS 14           /* the bits of marks that routing rules ask for */
#define GATE_IKE_PORTS 15       /* UDP ports of the IKE daemon: bits 0 to 15 and 16 to 31, 0 = none */
#define GATE_SETTINGS 16

/* What a socket remembers, and the generation in which it was true. GATE_DAEMON has a process id in
 * its place, so it must be compared with GATE_IKE. The backstop compares it with the generation only
 * after that failed: then the daemon is gone, and at worst the socket remembers nothing. */
#define GATE_COVERED 1  /* UDP: an SA protects this flow */
#define GATE_CLEAR 2    /* packets of this flow may leave unprotected */
#define GATE_DAEMON 3   /* the IKE daemon's own socket; `generation` is its thread group */
#define GATE_OTHER 4    /* of a namespace that another instance judges; `generation` is unused */

struct gate_memory {
	__u64 generation;
	__u64 deadline; /* of the entry that covered the flow */
	__u64 netns;    /* cookie of another network namespace than the gate's, which is the socket's */
	__u32 kind;
	__u32 replaced; /* GATE_COVERED: how many other flows it was before, in this generation */
};

struct gate_association {
	struct gate_key flow;
	struct gate_memory memory;
};
#define GATE_REPLACED 4

/* Why a flow was allowed or refused, or a packet blocked: for counters and events. The hooks depend
 * on the order: a reason below GATE_ALLOW_EXEMPT may be remembered, and all from
 * GATE_REFUSE_UNCOVERED on refuse. */
#define GATE_ALLOW_DEFAULT 0
#define GATE_ALLOW_BYPASS 1
#define GATE_ALLOW_COVERED 2
#define GATE_ALLOW_PASSED 3     /* GATE_DERIVED, and GATE_SPD says GATE_PASS */
#define GATE_ALLOW_ASSOCIATED 4 /* covered at its last call, and nothing has changed since */
#define GATE_ALLOW_EXEMPT 5     /* loopback, own addresses, DHCP, the IKE daemon */
#define GATE_ALLOW_OTHER 6      /* from a namespace that another instance judges */
#define GATE_REFUSE_UNCOVERED 7
#define GATE_REFUSE_DISCARD 8
#define GATE_REFUSE_DEFAULT 9
#define GATE_REFUSE_NO_SOURCE 10 /* its source address, or its way, is unknown */
#define GATE_REFUSE_NOT_READY 11 /* no policies published yet */
#define GATE_REFUSE_NETNS 12    /* from another network namespace, whose routing is unknown */
#define GATE_REFUSE_OUTSIDE 13  /* its packets leave around the gate's SPD */
#define GATE_BLOCK_CLEAR 14     /* must be protected, and would have left in clear */
#define GATE_BLOCK_DISCARD 15
#define GATE_BLOCK_DEFAULT 16   /* no policy names it, and no hook checked it */
#define GATE_BLOCK_NOT_READY 17
#define GATE_BLOCK_UNREADABLE 18 /* a later fragment, a source route, too many headers */
#define GATE_AUDITED 19         /* refusals that audit mode allowed; also counted by reason */
#define GATE_AUDITED_PACKETS 20 /* blocked packets that audit mode allowed, likewise */
#define GATE_EVENTS_LOST 21     /* the ring was full; the flow's next refusal is reported again */
#define GATE_COUNTERS 22

#define GATE_CONNECT4 0
#define GATE_CONNECT6 1
#define GATE_SENDMSG4 2
#define GATE_SENDMSG6 3
#define GATE_EGRESS 4

struct gate_event {
	__u64 ns;       /* CLOCK_MONOTONIC */
	__u64 cgroup;
	__u64 netns;    /* cookie, 0: the gate's own, or unknown */
	struct gate_key flow;
	__u32 reason;
	__u32 policy;
	__u32 pid;      /* thread group; 0: a packet, whose sender is unknown */
	__u32 hook;
	__u32 device;   /* that the socket is bound to */
	__u32 untold;   /* refusals of the same flow since the last event about it */
	char comm[16];
};

/* At most one event per flow in this time, however often it is refused; the others are counted. */
#define GATE_EVENT_INTERVAL_NS 100000000ULL

#endif
