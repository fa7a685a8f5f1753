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

#define LOCALHOST 0x7f000001

static __always_inline int block(struct __sk_buff *skb, struct gate_key *flow,
				 const struct origin *origin, int reason,
				 const struct named *policy)
{
	count(reason);
	tell(flow, origin, reason, policy->state ? policy->id : ~0U, GATE_EGRESS,
	     bpf_skb_cgroup_id(skb));
	if (!setting(GATE_AUDIT))
		return 0;
	count(GATE_AUDITED_PACKETS);
	return 1;
}

/* Let a packet leave, and remember its flow so that the socket's next packets pass faster. A
 * socket with many destinations keeps the first of this generation. */
static __always_inline int pass(struct bpf_sock *sk, struct search *search, __u64 generation)
{
	struct gate_memory *now = &search->memory;
	struct gate_association *known;

	if (!sk)
		return 1;
	known = sockets.sk_storage_get(sk, 0, 0);
	if (known && (known->memory.generation >= generation || known->memory.netns))
		return 1;
	now->kind = GATE_CLEAR;
	now->generation = generation;
	now->deadline = 0;
	now->netns = 0;
	now->replaced = 0;
	associate(sk, search);
	return 1;
}

/* May a packet leave in clear that must be protected? The host protects what comes from another
 * network namespace through it, and a kernel policy may exempt it. `state` is that of the policy that
 * names it. The hooks tell the socket its namespace. */
static __always_inline int is_let_go(struct search *search, const struct origin *origin,
				     __u32 state)
{
	__u64 generation = search->generation;
	struct gate_path *path;
	int reason;

	if (!origin->netns && state != GATE_DERIVED)
		return 0;
	reason = route(search, origin, &path);
	if (reason)
		return reason == GATE_ALLOW_EXEMPT;
	reason = follow(search, generation, path, state);
	if (search->torn || setting_after(search->read, GATE_GENERATION) != generation)
		return 0;
	return reason == GATE_ALLOW_PASSED || (origin->netns && reason == GATE_ALLOW_COVERED);
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

/* Does the packet leave through a device that encrypts it, or drops it: an XFRM or VTI interface, or
 * the TUN device of a daemon that does ESP itself? The index is not enough: it is unique only within
 * one network namespace, and root of another namespace can choose it. */
static __always_inline int is_into_tunnel(struct __sk_buff *skb)
{
	__u32 device = skb->ifindex;
	__u64 ports = setting(GATE_IKE_PORTS);

	return tunnels.lookup(&device) &&
	       (is_beside_daemon(skb, ports) || is_beside_daemon(skb, ports >> 16));
}

int egress(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
	__u64 generation = setting(GATE_GENERATION);
	struct gate_association *known;
	struct search search = {};
	struct named policy = {};
	struct gate_key *flow = &search.flow;
	struct packet packet = {};
	struct origin origin = {};

	if (skb->ifindex == LOOPBACK)
		return 1; /* to an address of this host: it never leaves */
	packet.at = skb->protocol == bpf_htons(0x0800) ? read_v4(skb, flow, &packet)
						       : read_v6(skb, flow, &packet);
	if (packet.at && (flow->proto == ESP || flow->proto == AH) && is_of_xfrm(skb, &packet))
		return 1;
	if (!packet.at || !read_ports(skb, flow, packet.at))
		return block(skb, flow, &origin, GATE_BLOCK_UNREADABLE, &policy);
	flow->mark = bpf_htonl(skb->mark);
	known = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;
	if (known && known->memory.kind == GATE_CLEAR && known->memory.generation == generation &&
	    same_flow(&known->flow, flow))
		return 1;
	if (known && known->memory.kind == GATE_DAEMON && known->memory.generation == setting(GATE_IKE))
		return 1;
	if (known && known->memory.kind == GATE_OTHER && others.lookup(&known->memory.netns))
		return 1;
	if (is_dhcp(flow) || is_neighbour_discovery(skb, flow, packet.hops))
		return 1;
	if (!setting_after(generation, GATE_PUBLISHED + GATE_POLICY)) {
		/* TCP asked at connect(): a connection may go on until policies are known. */
		if (flow->proto == TCP && was_asked(skb, sk, flow, &packet))
			return 1;
		return block(skb, flow, &origin, GATE_BLOCK_NOT_READY, &policy);
	}
	if (!call_search_policy(&search))
		return block(skb, flow, &origin, GATE_BLOCK_NOT_READY, &policy);
	generation = search.generation;
	name_policy(&policy, &search);
	if (!policy.state) {
		if (!setting_after(generation, GATE_DENY) || was_asked(skb, sk, flow, &packet))
			return pass(sk, &search, generation);
		return block(skb, flow, &origin, GATE_BLOCK_DEFAULT, &policy);
	}
	if (policy.state == GATE_BYPASS)
		return pass(sk, &search, generation);
	if (policy.state == GATE_DISCARD)
		return block(skb, flow, &origin, GATE_BLOCK_DISCARD, &policy);
	if (is_into_tunnel(skb) || is_encapsulated(skb, sk, flow, &packet))
		return 1;
	if (known)
		origin.netns = known->memory.netns;
	if (origin.netns)
		flow->mark = 0;
	if (sk)
		origin.device = sk->bound_dev_if;
	if (is_let_go(&search, &origin, policy.state))
		return 1;
	return block(skb, flow, &origin, GATE_BLOCK_CLEAR, &policy);
}
