/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The gate: four hooks over one verdict. The hooks run in the caller's connect(), sendto() or
 * sendmsg(), before the request reaches TCP or UDP (US 7,028,332, claim 1).
 *
 *   verdict   let go before in this generation, as its socket (UDP) or this processor (recall)
 *             remembers? -> allow
 *             else decide (decision.bpf.c) -> allow, or refuse: an errno, and one event for
 *             userspace
 *
 * backstop.bpf.c sees every packet after XFRM. It cannot replace the hooks: they exist to avoid
 * a dropped SYN. Anything unknown (no table, no source address) means refusal.
 */
static __always_inline int allow(int reason)
{
	count(reason);
	return 1;
}

static __always_inline int refuse(const struct gate_key *flow, int reason,
				  const struct gate_answer *policy, __u32 hook)
{
	__u32 error = policy->state ? policy->error : setting(GATE_ERROR);

	count(reason);
	tell(flow, reason, policy->state ? policy->id : ~0U, hook, bpf_get_current_cgroup_id());
	if (setting(GATE_AUDIT)) {
		count(GATE_AUDITED);
		return 1;
	}
	/* Linux 7.3 requires proof that the value is an errno, hence the mask. 0 means EPERM. */
	if (error > EPERM)
		bpf_set_retval(-(int)(error & MAX_ERRNO));
	return 0;
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

/* Have a socket remember a covered flow. A socket with many destinations soon keeps the flow that
 * it remembers: replacing it for every datagram costs more than to decide. */
static __always_inline void associate_flow(struct bpf_sock *sk, const struct gate_key *flow,
					   __u64 generation, __u64 deadline, int decided)
{
	struct gate_association now = { .kind = GATE_COVERED, .flow = *flow,
					.generation = generation, .deadline = deadline };
	struct gate_association *known = sockets.sk_storage_get(sk, 0, 0);

	if (known && known->kind == GATE_COVERED && known->generation == generation &&
	    !is_over(known->deadline)) {
		if (!decided || known->replaced == GATE_REPLACED)
			return;
		now.replaced = known->replaced + 1;
	}
	associate(sk, &now);
}

/* The backstop knows no process: it knows the IKE daemon's sockets by what they sent before. */
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
	struct gate_answer policy = {};
	__u64 generation = setting(GATE_GENERATION), deadline = 0;
	int reason, decided;

	if (is_associated(sk, flow, generation))
		return allow(GATE_ALLOW_ASSOCIATED);
	reason = recall(flow, generation, &deadline);
	/* By a device routing may choose another source; another namespace has another SPD. */
	if (reason == GATE_ALLOW_COVERED && ((sk && sk->bound_dev_if) ||
					     bpf_get_netns_cookie(ctx) != setting(GATE_NETNS)))
		reason = -1;
	decided = reason < 0;
	if (decided)
		reason = decide_in_one_generation(ctx, flow, &policy, &generation,
						  &deadline);
	if (reason >= GATE_REFUSE_UNCOVERED)
		return refuse(flow, reason, &policy, hook);
	if (reason == GATE_ALLOW_EXEMPT)
		know_daemon(sk, flow);
	if (reason == GATE_ALLOW_COVERED && sk && flow->proto == UDP && !sk->bound_dev_if)
		associate_flow(sk, flow, generation, deadline, decided);
	return allow(reason);
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
	struct gate_key flow = { .family = IPV4, .proto = ctx->protocol };
	struct bpf_sock *sk = ctx->sk;

	if (!saddr && sk)
		saddr = sk->src_ip4;
	if (sk) {
		flow.sport = bpf_htons(sk->src_port);
		flow.mark = bpf_htonl(sk->mark);
	}
	map_v4(flow.saddr, saddr);
	map_v4(flow.daddr, ctx->user_ip4);
	flow.dport = ctx->user_port;
	return verdict(ctx, &flow, hook);
}

/* A v4-mapped destination leaves as IPv4, whatever the socket's family. */
static __always_inline int gate_v6(struct bpf_sock_addr *ctx, __u32 *saddr, __u32 hook)
{
	struct gate_key flow = { .family = IPV6, .proto = ctx->protocol };
	struct bpf_sock *sk = ctx->sk;

	flow.daddr[0] = ctx->user_ip6[0];
	flow.daddr[1] = ctx->user_ip6[1];
	flow.daddr[2] = ctx->user_ip6[2];
	flow.daddr[3] = ctx->user_ip6[3];
	flow.dport = ctx->user_port;
	if (sk) {
		flow.sport = bpf_htons(sk->src_port);
		flow.mark = bpf_htonl(sk->mark);
		if (is_zero(saddr)) {
			saddr[0] = sk->src_ip6[0];
			saddr[1] = sk->src_ip6[1];
			saddr[2] = sk->src_ip6[2];
			saddr[3] = sk->src_ip6[3];
		}
	}
	if (!flow.daddr[0] && !flow.daddr[1] && flow.daddr[2] == bpf_htonl(0xffff)) {
		flow.family = IPV4;
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
