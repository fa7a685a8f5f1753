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

#define GATE_LAYOUT 3   /* increment it when a map or a constant changes */

/* The two tables in which a flow is looked up; the first match in tuple order wins. */
#define GATE_POLICY 0   /* must this flow be protected? the operator's policies */
#define GATE_SPD 1      /* is it protected now? the kernel's SPD joined with its SAD */
#define GATE_TABLES 2

/* A table is published by switching its epoch. The masks and entries of epoch e are in
 * space table * GATE_BUFFERS + e % GATE_BUFFERS. Epoch 0: never published. */
#define GATE_BUFFERS 4
#define GATE_TUPLES 32  /* distinct (mask, order) pairs of one table */
#define GATE_ENTRIES 65536
#define GATE_SOURCES 16384
#define GATE_RECENT 16384
#define GATE_RING_PAGES 64

/* A flow, a mask, or the key of a table's entry. In a mask, `tuple` is 1 if it is in use: the
 * first 0 ends the list, so the loop needs no second bound for the verifier. */
struct gate_key {
	__u32 saddr[4];
	__u32 daddr[4];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 family;    /* 4 or 6, of the packets that leave */
	__u8 space;
	__u8 tuple;
	__u32 mark;     /* SO_MARK, host order */
};

struct gate_masks {
	struct gate_key mask[GATE_TUPLES];
};

/* The state of a table's entry, for the flows that match it. */
#define GATE_PROTECT 1  /* GATE_POLICY: must be protected */
#define GATE_BYPASS 2   /* GATE_POLICY: may leave unprotected */
#define GATE_DISCARD 3  /* GATE_POLICY: refused */
#define GATE_LIVE 4     /* GATE_SPD: a live SA protects it */
#define GATE_DEAD 5     /* GATE_SPD: the winning kernel policy has no live SA */

struct gate_entry {
	__u32 state;
	__u32 error;    /* errno of a refusal, 0 = EPERM */
	__u32 id;       /* GATE_POLICY: the policy's place in the configuration */
	__u32 unused;
	__u64 deadline; /* GATE_LIVE: when the SA expires, CLOCK_BOOTTIME ns; 0 = never */
};

/* The source address that the kernel would choose for an unbound socket. */
struct gate_route {
	__u32 prefixlen;        /* 0..128 */
	__u32 daddr[4];
};

struct gate_source {
	__u32 saddr[4];         /* all zero: no route */
};

/* The words of the settings map: one each, so every change is one atomic write. */
#define GATE_EPOCH 0            /* + table */
#define GATE_AUDIT 2            /* 1: count and report, refuse nothing */
#define GATE_DENY 3             /* 1: flows that no policy names are refused */
#define GATE_IKE 4              /* thread group of the IKE daemon, 0 = none */
#define GATE_ERROR 5            /* errno for flows that no policy names, 0 = EPERM */
#define GATE_VERSION 6          /* GATE_LAYOUT of the program that created the maps */
#define GATE_GENERATION 7       /* incremented after every change of a table or a source */
#define GATE_NETNS 8            /* cookie of the network namespace whose SPD this is */
#define GATE_TUN 9              /* interface behind which the IKE daemon does ESP, 0 = none */
#define GATE_IKE_CGROUP 10      /* the IKE daemon's cgroup; guards against a reused pid or index.
				 * 0: the pid counts in any cgroup, GATE_TUN in no namespace */
#define GATE_SETTINGS 11

/* What a socket remembers, and the generation in which it was true. */
#define GATE_COVERED 1  /* UDP: an SA protects this flow */
#define GATE_CLEAR 2    /* packets of this flow may leave unprotected */
#define GATE_DAEMON 3   /* the IKE daemon's own socket; generation is its thread group */

struct gate_association {
	__u64 generation;
	__u64 deadline; /* of the entry that covered the flow */
	struct gate_key flow;
	__u32 kind;
};

/* Why a flow was allowed or refused, or a packet blocked: for counters and events. */
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
