/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Reading an outgoing packet: its flow, and which of its properties can be trusted. The sender
 * may have written every byte, so only what the kernel alone can do counts as proof.
 */

#define ICMP 1
#define IGMP 2
#define HOPOPTS 0
#define ROUTING 43
#define FRAGMENT 44
#define ESP 50
#define AH 51
#define ICMPV6 58
#define DSTOPTS 60
#define SCTP 132
#define DCCP 33
#define UDPLITE 136

#define EXTENSIONS 6 /* IPv6 extension headers that are skipped at most */
#define DISCOVERY 96 /* the longest neighbour discovery packet of the kernel, with its IPv6 header */

struct ipv4 {
	__u8 version_ihl;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment; /* 3 bits of flags, 13 of offset */
	__u8 ttl;
	__u8 proto;
	__u16 checksum;
	__u32 saddr;
	__u32 daddr;
};

struct ipv6 {
	__u32 version_class_label; /* 4, 8 and 20 bits */
	__u16 length;
	__u8 next;
	__u8 hops;
	__u32 saddr[4];
	__u32 daddr[4];
};

/* UDP's header and the next 4 bytes: the SPI of ESP in UDP, or 0 for IKE (RFC 3948). */
struct udp_head {
	__u16 sport;
	__u16 dport;
	__u16 length;
	__u16 checksum;
	__u32 spi;
};

/* A packet's properties besides its flow. */
struct packet {
	int at;       /* offset of the transport header; 0: the packet cannot be read */
	int proto_at; /* offset of the transport protocol's number */
	int hops;     /* IPv6's hop limit */
	int routed;   /* it has a routing header */
};

/* Did XFRM produce the packet? Its bytes prove nothing, because a process can write all of
 * them. But there is no link header yet, and XFRM sets the socket buffer's MAC header offset
 * to where it wrote the protocol's number (xfrm4_transport_output() and its siblings), which
 * no process can do. If anything else has set it, such as a device that the packet passed
 * through, it points elsewhere and this returns 0. */
static __always_inline int is_of_xfrm(struct __sk_buff *skb, const struct packet *packet)
{
	__u64 there = 0;
	__u64 here = 0;

	return !bpf_skb_load_bytes_relative(skb, 0, &there, sizeof(there), BPF_HDR_START_MAC) &&
	       !bpf_skb_load_bytes(skb, packet->proto_at, &here, sizeof(here)) && here == there;
}

/* Is it ESP in UDP? XFRM must have produced it, and the source port must not be the socket's:
 * a datagram that IPComp left uncompressed (RFC 3173) has been through XFRM, too. */
static __always_inline int is_encapsulated(struct __sk_buff *skb, struct bpf_sock *sk,
					   const struct gate_key *flow,
					   const struct packet *packet)
{
	struct udp_head head = {};

	if (flow->proto != UDP || !is_of_xfrm(skb, packet))
		return 0;
	if (sk && sk->protocol == UDP && bpf_htons(sk->src_port) == flow->sport)
		return 0;
	return !bpf_skb_load_bytes(skb, packet->at, &head, sizeof(head)) && head.spi;
}

/* Neighbour discovery: RFC 4861 section 6.1, RFC 4890 section 4.4.1. A raw socket can send it,
 * too, so the kernel's messages must be short, and a router's must stay on the link. */
static __always_inline int is_neighbour_discovery(struct __sk_buff *skb,
						  const struct gate_key *flow, int hops)
{
	__u8 type = bpf_ntohs(flow->dport) >> 8;
	__u32 to = bpf_ntohl(flow->daddr[0]);

	if (flow->family != IPV6 || flow->proto != ICMPV6 || hops != 255)
		return 0;
	if (type == 133 || type == 135 || type == 136)
		return skb->len <= DISCOVERY;
	return (type == 134 || type == 137) && (to >> 22 == 0xfe80 >> 6 || to >> 16 == 0xff02);
}

/* IPv4 options may name another destination (a source route), so a packet with options cannot
 * be read. The exception is IGMP's router alert, RFC 2113. */
static __always_inline int is_alert(struct __sk_buff *skb, const struct ipv4 *ip)
{
	__u32 option = 0;

	return (ip->version_ihl & 15) == 6 && ip->proto == IGMP &&
	       !bpf_skb_load_bytes(skb, sizeof(*ip), &option, sizeof(option)) &&
	       option == bpf_htonl(0x94040000);
}

/* Return the offset of the transport header, 0 if the packet cannot be read. */
static __always_inline int read_v4(struct __sk_buff *skb, struct gate_key *flow,
				   struct packet *packet)
{
	struct ipv4 ip = {};

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return 0;
	flow->family = IPV4;
	flow->proto = ip.proto;
	packet->proto_at = __builtin_offsetof(struct ipv4, proto);
	map_v4(flow->saddr, ip.saddr);
	map_v4(flow->daddr, ip.daddr);
	if (ip.version_ihl >> 4 != 4 || (ip.version_ihl & 15) < 5)
		return 0;
	if (ip.fragment & bpf_htons(0x1fff))
		return 0;
	/* Options do not matter once XFRM has processed the packet. */
	if ((ip.version_ihl & 15) > 5 && !is_alert(skb, &ip) && !is_of_xfrm(skb, packet))
		return 0;
	return (ip.version_ihl & 15) * 4;
}

static __always_inline int read_v6(struct __sk_buff *skb, struct gate_key *flow,
				   struct packet *packet)
{
	int at = sizeof(struct ipv6);
	struct ipv6 ip = {};

	packet->proto_at = __builtin_offsetof(struct ipv6, next);
	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return 0;
	flow->family = IPV6;
	flow->proto = ip.next;
	__builtin_memcpy(flow->saddr, ip.saddr, sizeof(ip.saddr));
	__builtin_memcpy(flow->daddr, ip.daddr, sizeof(ip.daddr));
	packet->hops = ip.hops;
	if (*(__u8 *)&ip.version_class_label >> 4 != 6)
		return 0;
	for (int i = 0; i < EXTENSIONS; i++) {
		__u8 head[4] = {}; /* next header, length in 8-octet units minus 1; a fragment's offset */

		if (flow->proto != HOPOPTS && flow->proto != ROUTING && flow->proto != DSTOPTS &&
		    flow->proto != FRAGMENT)
			return at;
		if (bpf_skb_load_bytes(skb, at, head, sizeof(head)))
			return 0;
		if (flow->proto == ROUTING && head[3])
			return 0; /* segments left: it is forwarded to another destination */
		packet->routed |= flow->proto == ROUTING;
		packet->proto_at = at;
		if (flow->proto == FRAGMENT) {
			if (head[2] | (head[3] & 0xf8))
				return 0;
			at += 8;
		} else {
			at += (head[1] + 1) * 8;
		}
		flow->proto = head[0];
	}
	return 0;
}

static __always_inline int read_ports(struct __sk_buff *skb, struct gate_key *flow, int at)
{
	__u16 words[2] = {};

	switch (flow->proto) {
	case TCP: case UDP: case UDPLITE: case SCTP: case DCCP:
		if (bpf_skb_load_bytes(skb, at, words, sizeof(words)))
			return 0;
		flow->sport = words[0];
		flow->dport = words[1];
		return 1;
	case ICMP: case ICMPV6: /* type and code in place of a port, RFC 7296 section 3.13.1 */
		if (bpf_skb_load_bytes(skb, at, words, sizeof(words[0])))
			return 0;
		flow->dport = words[0];
		return 1;
	}
	return 1;
}
