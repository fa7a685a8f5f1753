/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The contract between the hooks and userspace; ipsecgate/core/tables/layout.py mirrors
 * it, and a test compares the two through the compiler's own view.
 *
 * Addresses are 16 bytes in wire order, IPv4 as ::ffff:a.b.c.d, whatever the
 * socket's family: one code path, and no hole for a v4-mapped destination.
 * Ports are in network order. 0 is "not chosen yet" in a flow; a mask of 0 is
 * "any" in a selector.
 */
#ifndef IPSECGATE_GATE_H
#define IPSECGATE_GATE_H

#define GATE_LAYOUT 3   /* raise it with every change of this file */

/* The two tables a flow is looked up in, first match in tuple order. */
#define GATE_POLICY 0   /* must this flow be protected? the operator's policies */
#define GATE_SPD 1      /* is it protected now? the kernel's SPD joined with its SAD */
#define GATE_TABLES 2

/* A table is published by switching its epoch; the masks and entries of epoch e
 * live in space table * GATE_BUFFERS + e % GATE_BUFFERS. Epoch 0: never published. */
#define GATE_BUFFERS 4
#define GATE_TUPLES 32  /* distinct (mask, order) pairs of one table */
#define GATE_ENTRIES 65536
#define GATE_SOURCES 16384
#define GATE_RECENT 16384
#define GATE_RING_PAGES 64

/* A flow, a mask or a table's key. In a mask `tuple` is 1 for one in use: the
 * first 0 ends the list, which spares the verifier a second loop bound. */
struct gate_key {
	__u32 saddr[4];
	__u32 daddr[4];
	__u16 sport;
	__u16 dport;
	__u8 proto;
	__u8 family;    /* 4 or 6: what the wire will see */
	__u8 space;
	__u8 tuple;
	__u32 mark;     /* SO_MARK, host order */
};

struct gate_masks {
	struct gate_key mask[GATE_TUPLES];
};

/* What a table says of the flows that match an entry. */
#define GATE_PROTECT 1  /* GATE_POLICY: only under an SA */
#define GATE_BYPASS 2   /* GATE_POLICY: as it is */
#define GATE_DISCARD 3  /* GATE_POLICY: never */
#define GATE_LIVE 4     /* GATE_SPD: a live SA protects it */
#define GATE_DEAD 5     /* GATE_SPD: this SPD entry wins, and nothing protects it */

struct gate_entry {
	__u32 state;
	__u32 error;    /* errno of a refusal, 0 = EPERM */
	__u32 id;       /* GATE_POLICY: the policy's place in the configuration */
	__u32 unused;
	__u64 deadline; /* GATE_LIVE: CLOCK_BOOTTIME ns when the SA ends by itself, 0 = never */
};

/* Which source address the kernel would choose for an unbound socket. */
struct gate_route {
	__u32 prefixlen;        /* 0..128 */
	__u32 daddr[4];
};

struct gate_source {
	__u32 saddr[4];         /* all zero: no route */
};

/* One word of settings each, so that every change is one atomic write. */
#define GATE_EPOCH 0            /* + table */
#define GATE_AUDIT 2            /* 1: count and report, refuse nothing */
#define GATE_DENY 3             /* 1: flows that no policy names are refused */
#define GATE_IKE 4              /* thread group of the IKE daemon, 0 = none */
#define GATE_ERROR 5            /* errno for flows of no policy, 0 = EPERM */
#define GATE_VERSION 6          /* GATE_LAYOUT of whoever made the maps */
#define GATE_GENERATION 7       /* raised after every change of a table or a source */
#define GATE_NETNS 8            /* cookie of the network namespace whose SPD this is */
#define GATE_TUN 9              /* interface behind which the IKE daemon does ESP, 0 = none */
#define GATE_IKE_CGROUP 10      /* the IKE daemon's cgroup: its pid, or GATE_TUN, may be another's.
				 * 0: the pid counts in any cgroup, GATE_TUN in no namespace */
#define GATE_SETTINGS 11

/* What a socket remembers, and in which generation that was true. */
#define GATE_COVERED 1  /* UDP: an SA protects this flow */
#define GATE_CLEAR 2    /* packets of this flow may leave as they are */
#define GATE_DAEMON 3   /* the IKE daemon's own; generation is its thread group */

struct gate_association {
	__u64 generation;
	__u64 deadline; /* as in the entry that covered it */
	struct gate_key flow;
	__u32 kind;
};

/* Why a flow was let go or refused, or a packet blocked: counters and events speak of it. */
#define GATE_ALLOW_DEFAULT 0
#define GATE_ALLOW_BYPASS 1
#define GATE_ALLOW_COVERED 2
#define GATE_ALLOW_ASSOCIATED 3 /* covered when it was asked last, and nothing changed since */
#define GATE_ALLOW_EXEMPT 4     /* loopback, own addresses, DHCP, the IKE daemon */
#define GATE_REFUSE_UNCOVERED 5
#define GATE_REFUSE_DISCARD 6
#define GATE_REFUSE_DEFAULT 7
#define GATE_REFUSE_NO_SOURCE 8 /* unbound, and no route is known */
#define GATE_REFUSE_NOT_READY 9 /* no policies published yet */
#define GATE_REFUSE_NETNS 10    /* from another network namespace: its SPD is not known */
#define GATE_BLOCK_CLEAR 11     /* it must be protected, and was about to leave in clear */
#define GATE_BLOCK_DISCARD 12
#define GATE_BLOCK_DEFAULT 13   /* no policy names it, and no hook was asked about it */
#define GATE_BLOCK_NOT_READY 14
#define GATE_BLOCK_UNREADABLE 15 /* a later fragment, a source route, too many headers */
#define GATE_AUDITED 16         /* refusals that audit mode let go, besides their reason */
#define GATE_AUDITED_PACKETS 17 /* the same of blocked packets */
#define GATE_EVENTS_LOST 18     /* ring full; the next refusal of the flow tells again */
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
	__u32 pid;      /* thread group; 0: a packet, which nobody need be sending */
	__u32 hook;
	char comm[16];
};

/* One event per flow in this time, however often it is refused. */
#define GATE_EVENT_INTERVAL_NS 100000000ULL

#endif
