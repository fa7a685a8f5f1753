/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The gate: four hooks over one verdict, and a backstop behind them. The hooks run in the
 * caller's connect(), sendto() or sendmsg(), before the request reaches TCP or UDP (US
 * 7,028,332, claim 1).
 *
 *   policy: must this flow be protected?   no entry -> the default, BYPASS -> allow
 *   exempt: loopback, DHCP, the IKE daemon -> allow
 *   SPD:    which kernel policy wins, and has it a live SA?
 *           live -> allow, anything else -> refuse, and one event for userspace
 *
 * The backstop sees every packet after XFRM. By then, traffic that must be protected is ESP or
 * AH, or the packet is dropped. It cannot replace the hooks: they exist to avoid a dropped SYN.
 *
 * Anything unknown (no table, no source address) means refusal.
 */
static __always_inline int is_zero(const __u32 *addr)
{
	return !(addr[0] | addr[1] | addr[2] | addr[3]);
}

/* 127.0.0.0/8, ::1, and the unspecified addresses, which the kernel connects to loopback.
 * They never leave the host, but XFRM does look up policies for ::1. */
static __always_inline int is_loopback(const struct gate_key *flow)
{
	const __u32 *d = flow->daddr;

	if (flow->family == AF_INET)
		return !d[3] || (d[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !(d[0] | d[1] | d[2]) && (!d[3] || d[3] == bpf_htonl(1));
}

/* A host without an address requests one: RFC 2131 section 4.1, RFC 8415 sections 7.1 and 7.2.
 * The request stays on the link, and no SA could carry it. The client ports are privileged. */
static __always_inline int is_dhcp(const struct gate_key *flow)
{
	const __u32 *d = flow->daddr;

	if (flow->proto != UDP)
		return 0;
	if (flow->family == AF_INET)
		return flow->sport == bpf_htons(68) && flow->dport == bpf_htons(67) && d[3] == ~0U;
	return flow->sport == bpf_htons(546) && flow->dport == bpf_htons(547) &&
	       d[0] == bpf_htonl(0xff020000) && !d[1] && !d[2] && d[3] == bpf_htonl(0x00010002);
}

static __always_inline int is_daemon(void)
{
	__u64 ike = setting(GATE_IKE);
	__u64 cgroup = setting(GATE_IKE_CGROUP);

	return ike && bpf_get_current_pid_tgid() >> 32 == ike &&
	       (!cgroup || bpf_get_current_cgroup_id() == cgroup);
}

static __always_inline int is_exempt(const struct gate_key *flow)
{
	return is_loopback(flow) || is_dhcp(flow) || is_daemon();
}

static __always_inline int allow(int reason)
{
	count(reason);
	return 1;
}

static __always_inline int refuse(const struct gate_key *flow, int reason,
				  const struct gate_entry *policy, __u32 hook)
{
	__u32 error = policy ? policy->error : setting(GATE_ERROR);

	count(reason);
	tell(flow, reason, policy ? policy->id : ~0U, hook, bpf_get_current_cgroup_id());
	if (setting(GATE_AUDIT)) {
		count(GATE_AUDITED);
		return 1;
	}
	/* Linux 7.3 requires proof that the value is an errno, hence the mask. 0 means EPERM. */
	if (error > EPERM)
		bpf_set_retval(-(int)(error & MAX_ERRNO));
	return 0;
}

/* Fill in the source that routing would choose; return 0 if it is unknown. The table applies
 * only to sockets without a mark or device: with one, routing may choose another source. */
static __always_inline int route(struct gate_key *flow, int plain)
{
	struct gate_route to = { .prefixlen = 128 };
	struct gate_source *source;

	if (flow->family == AF_INET ? flow->saddr[3] : !is_zero(flow->saddr))
		return 1;
	if (!plain)
		return 0;
	__builtin_memcpy(to.daddr, flow->daddr, sizeof(to.daddr));
	source = sources.lookup(&to);
	if (!source || is_zero(source->saddr))
		return 0;
	__builtin_memcpy(flow->saddr, source->saddr, sizeof(flow->saddr));
	return 1;
}

/* The hooks run for each datagram of a UDP socket, mostly for the same flow: remember it. */
static __always_inline int is_associated(struct bpf_sock *sk, const struct gate_key *flow,
					 __u64 generation)
{
	struct gate_association *known;

	if (!sk || flow->proto != UDP || sk->bound_dev_if)
		return 0;
	known = sockets.sk_storage_get(sk, 0, 0);
	return known && known->kind == GATE_COVERED && known->generation == generation &&
	       same_flow(&known->flow, flow) && !is_over(known->deadline);
}

/* The backstop cannot see the process, so the hooks mark the IKE daemon's sockets for it. */
static __always_inline void know_daemon(struct bpf_sock *sk, const struct gate_key *flow)
{
	struct gate_association daemon = { .kind = GATE_DAEMON, .flow = *flow };
	struct gate_association *known;

	daemon.generation = setting(GATE_IKE);
	if (!sk || !is_daemon())
		return;
	known = sockets.sk_storage_get(sk, 0, 0);
	if (!known || known->kind != GATE_DAEMON || known->generation != daemon.generation)
		associate(sk, &daemon);
}

static __always_inline int verdict(struct bpf_sock_addr *ctx, const struct gate_key *flow,
				   __u32 hook)
{
	struct bpf_sock *sk = ctx->sk;
	/* Read before the tables, so that a change in between outdates what the socket remembers. */
	struct gate_association now = { .kind = GATE_COVERED, .flow = *flow,
					.generation = setting(GATE_GENERATION) };
	struct gate_key routed = *flow;
	struct gate_entry *policy;
	struct gate_entry *winner;
	__u64 epoch;

	if (is_associated(sk, flow, now.generation))
		return allow(GATE_ALLOW_ASSOCIATED);
	epoch = setting_after(now.generation, GATE_EPOCH + GATE_POLICY);
	policy = epoch ? classify(GATE_POLICY, epoch, flow) : 0;
	if (policy && policy->state == GATE_BYPASS)
		return allow(GATE_ALLOW_BYPASS);
	if (!policy && epoch && !setting(GATE_DENY))
		return allow(GATE_ALLOW_DEFAULT);
	if (is_exempt(flow)) {
		know_daemon(sk, flow);
		return allow(GATE_ALLOW_EXEMPT);
	}
	if (!epoch)
		return refuse(flow, GATE_REFUSE_NOT_READY, 0, hook);
	if (!policy)
		return refuse(flow, GATE_REFUSE_DEFAULT, 0, hook);
	if (policy->state != GATE_PROTECT)
		return refuse(flow, GATE_REFUSE_DISCARD, policy, hook);
	if (bpf_get_netns_cookie(ctx) != setting(GATE_NETNS))
		return refuse(flow, GATE_REFUSE_NETNS, policy, hook);
	if (!route(&routed, !flow->mark && !(sk && sk->bound_dev_if)))
		return refuse(flow, GATE_REFUSE_NO_SOURCE, policy, hook);
	if (same(routed.saddr, routed.daddr))
		return allow(GATE_ALLOW_EXEMPT); /* the host's own address: it never leaves the host */
	winner = classify(GATE_SPD, setting_after(now.generation, GATE_EPOCH + GATE_SPD), &routed);
	if (!winner || winner->state != GATE_LIVE || is_over(winner->deadline))
		return refuse(flow, GATE_REFUSE_UNCOVERED, policy, hook);
	now.deadline = winner->deadline;
	if (sk && flow->proto == UDP && !sk->bound_dev_if)
		associate(sk, &now);
	return allow(GATE_ALLOW_COVERED);
}

static __always_inline void map_v4(__u32 *addr, __u32 v4)
{
	addr[0] = 0;
	addr[1] = 0;
	addr[2] = bpf_htonl(0xffff);
	addr[3] = v4;
}

/* sk's source is the bound address; src_port is in host order. */
static __always_inline int gate_v4(struct bpf_sock_addr *ctx, __u32 saddr, __u32 hook)
{
	struct gate_key flow = { .family = AF_INET, .proto = ctx->protocol };
	struct bpf_sock *sk = ctx->sk;

	if (!saddr && sk)
		saddr = sk->src_ip4;
	if (sk) {
		flow.sport = bpf_htons(sk->src_port);
		flow.mark = sk->mark;
	}
	map_v4(flow.saddr, saddr);
	map_v4(flow.daddr, ctx->user_ip4);
	flow.dport = ctx->user_port;
	return verdict(ctx, &flow, hook);
}

/* A v4-mapped destination leaves as IPv4, whatever the socket's family. */
static __always_inline int gate_v6(struct bpf_sock_addr *ctx, __u32 *saddr, __u32 hook)
{
	struct gate_key flow = { .family = AF_INET6, .proto = ctx->protocol };
	struct bpf_sock *sk = ctx->sk;

	flow.daddr[0] = ctx->user_ip6[0];
	flow.daddr[1] = ctx->user_ip6[1];
	flow.daddr[2] = ctx->user_ip6[2];
	flow.daddr[3] = ctx->user_ip6[3];
	flow.dport = ctx->user_port;
	if (sk) {
		flow.sport = bpf_htons(sk->src_port);
		flow.mark = sk->mark;
		if (is_zero(saddr)) {
			saddr[0] = sk->src_ip6[0];
			saddr[1] = sk->src_ip6[1];
			saddr[2] = sk->src_ip6[2];
			saddr[3] = sk->src_ip6[3];
		}
	}
	if (!flow.daddr[0] && !flow.daddr[1] && flow.daddr[2] == bpf_htonl(0xffff)) {
		flow.family = AF_INET;
		map_v4(flow.saddr, saddr[3]);
	} else {
		__builtin_memcpy(flow.saddr, saddr, sizeof(flow.saddr));
	}
	return verdict(ctx, &flow, hook);
}

int connect4(struct bpf_sock_addr *ctx)
{
	return gate_v4(ctx, 0, GATE_CONNECT4);
}

int connect6(struct bpf_sock_addr *ctx)
{
	__u32 unbound[4] = {};

	return gate_v6(ctx, unbound, GATE_CONNECT6);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return gate_v4(ctx, ctx->msg_src_ip4, GATE_SENDMSG4);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	__u32 source[4] = { ctx->msg_src_ip6[0], ctx->msg_src_ip6[1],
			    ctx->msg_src_ip6[2], ctx->msg_src_ip6[3] };

	return gate_v6(ctx, source, GATE_SENDMSG6);
}
