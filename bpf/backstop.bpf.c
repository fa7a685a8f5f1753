/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The backstop: packets of a gated cgroup, on their way out and after XFRM. Towards a
 * flow that must be protected they are ESP or AH by now, or they do not leave: what
 * never asked (raw, ping, SCTP), what asked long ago (established, connected), what was
 * let go the moment before its SA was taken away.
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
#define SOCK_RAW 3

#define EXTENSIONS 6 /* IPv6 headers that are looked behind */
#define NAT_T 4500   /* RFC 3948: ESP in UDP */

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
	__u32 flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	__u32 saddr[4];
	__u32 daddr[4];
};

/* What is behind the ports of UDP: ESP in UDP begins with its SPI, IKE with a zero. */
struct udp_head {
	__u16 sport;
	__u16 dport;
	__u16 length;
	__u16 checksum;
	__u32 spi;
};

/* Is it ESP in UDP? XFRM wrote the header then: the socket, if it is one of UDP, has
 * another port of its own. */
static __always_inline int is_encapsulated(struct __sk_buff *skb, struct bpf_sock *sk,
					   const struct gate_key *flow, int at)
{
	struct udp_head head = {};

	if (flow->proto != UDP || flow->sport != bpf_htons(NAT_T))
		return 0;
	if (sk && sk->protocol == UDP && sk->type != SOCK_RAW && sk->src_port == NAT_T)
		return 0;
	return !bpf_skb_load_bytes(skb, at, &head, sizeof(head)) && head.spi;
}

/* The kernel's own neighbour discovery: RFC 4861 section 6.1, RFC 4890 section 4.4.1. */
static __always_inline int is_neighbour_discovery(const struct gate_key *flow, int hops)
{
	__u8 type = bpf_ntohs(flow->dport) >> 8;

	return flow->family == AF_INET6 && flow->proto == ICMPV6 && hops == 255 && type >= 133 &&
	       type <= 137;
}

/* Return where the transport's header begins, 0: this packet can't be read. */
static __always_inline int read_v4(struct __sk_buff *skb, struct gate_key *flow)
{
	struct ipv4 ip = {};

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return 0;
	flow->family = AF_INET;
	flow->proto = ip.proto;
	map_v4(flow->saddr, ip.saddr);
	map_v4(flow->daddr, ip.daddr);
	if (ip.fragment & bpf_htons(0x1fff))
		return 0;
	/* Options may name another destination (a source route), and nothing else needs them
	 * but a router's alert, of IGMP. What XFRM made of the packet does not mind. */
	if ((ip.version_ihl & 15) > 5 && ip.proto != ESP && ip.proto != AH && ip.proto != IGMP)
		return 0;
	return (ip.version_ihl & 15) * 4;
}

static __always_inline int read_v6(struct __sk_buff *skb, struct gate_key *flow, int *hops)
{
	int at = sizeof(struct ipv6);
	struct ipv6 ip = {};

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return 0;
	flow->family = AF_INET6;
	flow->proto = ip.next;
	__builtin_memcpy(flow->saddr, ip.saddr, sizeof(ip.saddr));
	__builtin_memcpy(flow->daddr, ip.daddr, sizeof(ip.daddr));
	*hops = ip.hops;
	for (int i = 0; i < EXTENSIONS; i++) {
		__u8 head[4] = {}; /* next header, length in 8 octets less one; of a fragment its offset */

		if (flow->proto != HOPOPTS && flow->proto != ROUTING && flow->proto != DSTOPTS &&
		    flow->proto != FRAGMENT)
			return at;
		if (bpf_skb_load_bytes(skb, at, head, sizeof(head)))
			return 0;
		if (flow->proto == ROUTING && head[3])
			return 0; /* segments are left: it goes on, to another destination */
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
	case ICMP: case ICMPV6: /* type and code, as RFC 7296 section 3.13.1 has them for a port */
		if (bpf_skb_load_bytes(skb, at, words, sizeof(words[0])))
			return 0;
		flow->dport = words[0];
		return 1;
	}
	return 1;
}

static __always_inline int block(struct __sk_buff *skb, const struct gate_key *flow, int reason,
				 const struct gate_entry *policy)
{
	count(reason);
	tell(flow, reason, policy ? policy->id : ~0U, GATE_EGRESS, bpf_skb_cgroup_id(skb));
	if (!setting(GATE_AUDIT))
		return 0;
	count(GATE_AUDITED_PACKETS);
	return 1;
}

/* Remember that a socket's packets need not be looked at again, unless it speaks to many. */
static __always_inline int pass(struct bpf_sock *sk, const struct gate_key *flow, __u64 generation)
{
	struct gate_association now = { .kind = GATE_CLEAR, .flow = *flow,
					.generation = generation };
	struct gate_association *known;

	if (!sk)
		return 1;
	known = sockets.sk_storage_get(sk, 0, 0);
	if (!known || known->generation < generation)
		associate(sk, &now);
	return 1;
}

int egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	__u64 generation = setting(GATE_GENERATION);
	struct gate_association *known;
	struct gate_entry *policy;
	struct gate_key flow = {};
	int at, hops = 0;
	__u64 epoch, tun;

	if (skb->ifindex == LOOPBACK)
		return 1; /* to an address of this host: never leaves it */
	at = skb->protocol == bpf_htons(0x0800) ? read_v4(skb, &flow) : read_v6(skb, &flow, &hops);
	if (at && (flow.proto == ESP || flow.proto == AH))
		return 1;
	if (!at || !read_ports(skb, &flow, at))
		return block(skb, &flow, GATE_BLOCK_UNREADABLE, 0);
	flow.mark = skb->mark;
	known = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;
	if (known && known->kind == GATE_CLEAR && known->generation == generation &&
	    same_flow(&known->flow, &flow))
		return 1;
	if (known && known->kind == GATE_DAEMON && known->generation == setting(GATE_IKE))
		return 1;
	if (is_dhcp(&flow) || is_neighbour_discovery(&flow, hops))
		return 1;
	epoch = setting_after(generation, GATE_EPOCH + GATE_POLICY);
	if (!epoch) /* TCP asks at connect(): what stands may stand until policies are known */
		return flow.proto == TCP ? 1 : block(skb, &flow, GATE_BLOCK_NOT_READY, 0);
	policy = classify(GATE_POLICY, epoch, &flow);
	if (!policy) {
		/* TCP and UDP were asked, or answer what came from there. */
		if (!setting_after(generation, GATE_DENY) || flow.proto == TCP || flow.proto == UDP)
			return pass(sk, &flow, generation);
		return block(skb, &flow, GATE_BLOCK_DEFAULT, 0);
	}
	if (policy->state == GATE_BYPASS)
		return pass(sk, &flow, generation);
	if (policy->state != GATE_PROTECT)
		return block(skb, &flow, GATE_BLOCK_DISCARD, policy);
	tun = setting(GATE_TUN);
	if (tun && skb->ifindex == tun)
		return 1; /* the daemon makes ESP of it, or drops it */
	if (is_encapsulated(skb, sk, &flow, at))
		return 1;
	return block(skb, &flow, GATE_BLOCK_CLEAR, policy);
}
