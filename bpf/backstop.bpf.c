/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The backstop: outgoing packets of a gated cgroup, after XFRM. If their flow must be
 * protected they are ESP or AH by now, or they are dropped. It stops what no hook checks (raw
 * sockets, ping, SCTP), what a hook checked long ago (established connections, connected
 * sockets), and what a hook allowed just before its SA was removed.
 */

#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOCK_RAW 3
#define LISTEN 10
#define SYN 2

#define IKE 500 /* RFC 7296 section 2 */
#define IKE_NAT 4500
#define LOCALHOST 0x7f000001

static __always_inline int block(struct __sk_buff *skb, const struct gate_key *flow, int reason,
				 const struct gate_answer *policy)
{
	count(reason);
	tell(flow, reason, policy->state ? policy->id : ~0U, GATE_EGRESS, bpf_skb_cgroup_id(skb));
	if (!setting(GATE_AUDIT))
		return 0;
	count(GATE_AUDITED_PACKETS);
	return 1;
}

/* Let a packet leave, and remember its flow so that the socket's next packets pass faster. A
 * socket with many destinations keeps the first of this generation. */
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

/* TCP without data and without SYN: the kernel's replies for sockets that are gone, which it
 * sends through a raw socket of its own. */
static __always_inline int is_answer(struct __sk_buff *skb, const struct packet *packet)
{
	__u8 head[2] = {}; /* header length in 32-bit words, in the upper 4 bits; flags */

	return !packet->routed && !bpf_skb_load_bytes(skb, packet->at + 12, head, sizeof(head)) &&
	       !(head[1] & SYN) && skb->len == packet->at + (head[0] >> 4) * 4;
}

/* Did a hook check this flow, with this destination? A routing header or address translation
 * can give a packet another destination than the socket's. The hooks exempt loopback because
 * it never leaves the host, but this packet is leaving. For unconnected UDP this returns 0:
 * a hook checks each datagram, and refuses it where the answer matters. */
static __always_inline int was_asked(struct __sk_buff *skb, struct bpf_sock *sk,
				     const struct gate_key *flow, const struct packet *packet)
{
	/* The verifier requires a fixed offset for each read; volatile keeps them separate. */
	const volatile struct bpf_sock *peer = sk;
	__u32 to[4], v4;

	if (!sk || is_loopback(flow))
		return 0;
	if (flow->proto == TCP && sk->type == SOCK_RAW)
		return is_answer(skb, packet);
	if (flow->proto == TCP && sk->type == SOCK_STREAM && sk->state == LISTEN)
		return !packet->routed; /* a SYN-ACK */
	if (!(flow->proto == TCP && sk->type == SOCK_STREAM) &&
	    !(flow->proto == UDP && sk->type == SOCK_DGRAM && sk->protocol == UDP))
		return 0;
	for (int word = 0; word < 4; word++)
		to[word] = peer->dst_ip6[word];
	v4 = peer->dst_ip4;
	if (flow->family == IPV4)
		map_v4(to, v4);
	return same(to, flow->daddr);
}

/* Does the IKE daemon, known by its cgroup, have a UDP socket on this port in the packet's
 * namespace? The kernel searches that of the packet's device, so no sender can forge it. */
static __always_inline int is_beside_daemon(struct __sk_buff *skb, __u16 port)
{
	struct bpf_sock_tuple to = { .ipv4 = { .daddr = bpf_htonl(LOCALHOST),
					       .dport = bpf_htons(port) } };
	struct bpf_sock *sk = bpf_sk_lookup_udp(skb, &to, sizeof(to.ipv4), BPF_F_CURRENT_NETNS, 0);
	__u64 cgroup;

	if (!sk)
		return 0;
	cgroup = bpf_sk_cgroup_id(sk);
	bpf_sk_release(sk);
	return cgroup && cgroup == setting(GATE_IKE_CGROUP);
}

/* Does the packet leave through the daemon's TUN device? There the daemon encrypts it, or drops it.
 * The index is not enough: it is unique only within one network namespace, and root of another
 * namespace can choose it. */
static __always_inline int is_into_tun(struct __sk_buff *skb)
{
	__u64 tun = setting(GATE_TUN);

	return tun && skb->ifindex == tun &&
	       (is_beside_daemon(skb, IKE) || is_beside_daemon(skb, IKE_NAT));
}

int egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	__u64 generation = setting(GATE_GENERATION);
	struct gate_association *known;
	struct search search = {};
	const struct gate_answer *policy = &search.found;
	struct gate_key *flow = &search.flow;
	struct packet packet = {};

	if (skb->ifindex == LOOPBACK)
		return 1; /* to an address of this host: it never leaves */
	packet.at = skb->protocol == bpf_htons(0x0800) ? read_v4(skb, flow, &packet)
						       : read_v6(skb, flow, &packet);
	if (packet.at && (flow->proto == ESP || flow->proto == AH) && is_of_xfrm(skb, &packet))
		return 1;
	if (!packet.at || !read_ports(skb, flow, packet.at))
		return block(skb, flow, GATE_BLOCK_UNREADABLE, policy);
	flow->mark = bpf_htonl(skb->mark);
	known = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;
	if (known && known->kind == GATE_CLEAR && known->generation == generation &&
	    same_flow(&known->flow, flow))
		return 1;
	if (known && known->kind == GATE_DAEMON && known->generation == setting(GATE_IKE))
		return 1;
	if (is_dhcp(flow) || is_neighbour_discovery(skb, flow, packet.hops))
		return 1;
	if (!setting_after(generation, GATE_PUBLISHED + GATE_POLICY)) {
		/* TCP asked at connect(): a connection may go on until policies are known. */
		if (flow->proto == TCP && was_asked(skb, sk, flow, &packet))
			return 1;
		return block(skb, flow, GATE_BLOCK_NOT_READY, policy);
	}
	if (!call_search_policy(&search)) {
		search.found.state = 0; /* whatever it found */
		return block(skb, flow, GATE_BLOCK_NOT_READY, policy);
	}
	generation = search.generation;
	if (!policy->state) {
		if (!setting_after(generation, GATE_DENY) || was_asked(skb, sk, flow, &packet))
			return pass(sk, flow, generation);
		return block(skb, flow, GATE_BLOCK_DEFAULT, policy);
	}
	if (policy->state == GATE_BYPASS)
		return pass(sk, flow, generation);
	if (policy->state != GATE_PROTECT)
		return block(skb, flow, GATE_BLOCK_DISCARD, policy);
	if (is_into_tun(skb) || is_encapsulated(skb, sk, flow, &packet))
		return 1;
	return block(skb, flow, GATE_BLOCK_CLEAR, policy);
}
