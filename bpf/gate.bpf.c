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

static __always_inline int refuse(struct gate_key *flow, const struct origin *origin,
				  int reason, const struct named *policy, __u32 hook)
{
	__u32 error = policy->state ? policy->error : setting(GATE_ERROR);

	count(reason);
	tell(flow, origin, reason, policy->state ? policy->id : ~0U, hook,
	     bpf_get_current_cgroup_id());
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
	return known && known->memory.kind == GATE_COVERED && known->memory.generation == generation &&
	       same_flow(&known->flow, flow) && !is_over(known->memory.deadline);
}

/* Have a socket remember a covered flow. A socket with many destinations soon keeps the flow that
 * it remembers: replacing it for every datagram costs more than to decide. */
static __always_inline void associate_flow(struct bpf_sock *sk, struct search *search,
					   __u64 netns, __u64 generation, __u64 deadline,
					   int decided)
{
	struct gate_association *known = sockets.sk_storage_get(sk, 0, 0);
	struct gate_memory *now = &search->memory;

	now->replaced = 0;
	if (known && known->memory.kind == GATE_COVERED && known->memory.generation == generation &&
	    !is_over(known->memory.deadline)) {
		if (!decided || known->memory.replaced == GATE_REPLACED)
			return;
		now->replaced = known->memory.replaced + 1;
	}
	now->kind = GATE_COVERED;
	now->netns = netns;
	now->generation = generation;
	now->deadline = deadline;
	associate(sk, search);
}

/* The backstop knows no process: it knows the IKE daemon's sockets by what they sent before. */
static __always_inline void know_daemon(struct bpf_sock *sk, struct search *search)
{
	struct gate_memory *daemon = &search->memory;
	struct gate_association *known;
	__u64 ike = setting(GATE_IKE);

	if (!sk || !is_daemon())
		return;
	known = sockets.sk_storage_get(sk, 0, 0);
	if (known && known->memory.kind == GATE_DAEMON && known->memory.generation == ike)
		return;
	daemon->kind = GATE_DAEMON;
	daemon->generation = ike;
	daemon->deadline = 0;
	daemon->netns = 0;
	daemon->replaced = 0;
	associate(sk, search);
}

/* Leave a flow to the instance whose network namespace it comes from, and tell the backstop. */
static __always_inline int leave(struct bpf_sock *sk, struct search *search, __u64 netns)
{
	struct gate_memory *other = &search->memory;
	struct gate_association *known = sk ? sockets.sk_storage_get(sk, 0, 0) : 0;

	if (sk && !(known && known->memory.kind == GATE_OTHER)) {
		other->kind = GATE_OTHER;
		other->generation = 0;
		other->deadline = 0;
		other->netns = netns;
		other->replaced = 0;
		associate(sk, search);
	}
	return allow(GATE_ALLOW_OTHER);
}

static __always_inline int verdict(struct bpf_sock_addr *ctx, struct search *search, __u32 hook)
{
	struct gate_key *flow = &search->flow;
	struct bpf_sock *sk = ctx->sk;
	struct origin origin = { .device = sk ? sk->bound_dev_if : 0 };
	struct named policy = {};
	__u64 generation = setting(GATE_GENERATION), deadline = 0;
	int reason, decided;

	if (is_associated(sk, flow, generation))
		return allow(GATE_ALLOW_ASSOCIATED);
	origin.netns = bpf_get_netns_cookie(ctx);
	if (origin.netns == setting(GATE_NETNS))
		origin.netns = 0;
	else
		flow->mark = 0;
	if (origin.netns && others.lookup(&origin.netns))
		return leave(sk, search, origin.netns);
	reason = recall(flow, generation, &deadline);
	/* By a device or in another namespace, routing may lead elsewhere. */
	if ((reason == GATE_ALLOW_COVERED || reason == GATE_ALLOW_PASSED) &&
	    (origin.device || origin.netns))
		reason = -1;
	decided = reason < 0;
	if (decided)
		reason = decide_in_one_generation(&origin, search, &policy, &generation,
						  &deadline);
	if (reason >= GATE_REFUSE_UNCOVERED)
		return refuse(flow, &origin, reason, &policy, hook);
	if (reason == GATE_ALLOW_EXEMPT)
		know_daemon(sk, search);
	if (sk && ((reason == GATE_ALLOW_COVERED && flow->proto == UDP && !origin.device) ||
		   (origin.netns && (reason == GATE_ALLOW_COVERED || reason == GATE_ALLOW_PASSED ||
				     (reason == GATE_ALLOW_EXEMPT && !is_exempt(flow))))))
		associate_flow(sk, search, origin.netns, generation, deadline, decided);
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
	struct search search;
	struct gate_key *flow = &search.flow;
	struct bpf_sock *sk = ctx->sk;

	*flow = (struct gate_key){ .family = IPV4, .proto = ctx->protocol };
	if (!saddr && sk)
		saddr = sk->src_ip4;
	if (sk) {
		flow->sport = bpf_htons(sk->src_port);
		flow->mark = bpf_htonl(sk->mark);
	}
	map_v4(flow->saddr, saddr);
	map_v4(flow->daddr, ctx->user_ip4);
	flow->dport = ctx->user_port;
	return verdict(ctx, &search, hook);
}

/* A v4-mapped destination leaves as IPv4, whatever the socket's family. */
static __always_inline int gate_v6(struct bpf_sock_addr *ctx, int sends, __u32 hook)
{
	struct search search;
	struct gate_key *flow = &search.flow;
	struct bpf_sock *sk = ctx->sk;

	*flow = (struct gate_key){ .family = IPV6, .proto = ctx->protocol };
	if (sends) {
		flow->saddr[0] = ctx->msg_src_ip6[0];
		flow->saddr[1] = ctx->msg_src_ip6[1];
		flow->saddr[2] = ctx->msg_src_ip6[2];
		flow->saddr[3] = ctx->msg_src_ip6[3];
	}
	flow->daddr[0] = ctx->user_ip6[0];
	flow->daddr[1] = ctx->user_ip6[1];
	flow->daddr[2] = ctx->user_ip6[2];
	flow->daddr[3] = ctx->user_ip6[3];
	flow->dport = ctx->user_port;
	if (sk) {
		flow->sport = bpf_htons(sk->src_port);
		flow->mark = bpf_htonl(sk->mark);
		if (is_zero(flow->saddr)) {
			flow->saddr[0] = sk->src_ip6[0];
			flow->saddr[1] = sk->src_ip6[1];
			flow->saddr[2] = sk->src_ip6[2];
			flow->saddr[3] = sk->src_ip6[3];
		}
	}
	if (!flow->daddr[0] && !flow->daddr[1] && flow->daddr[2] == bpf_htonl(0xffff)) {
		flow->family = IPV4;
		map_v4(flow->saddr, flow->saddr[3]);
	}
	return verdict(ctx, &search, hook);
}

int connect4(struct bpf_sock_addr *ctx)
{
	return gate_v4(ctx, 0, GATE_CONNECT4);
}

int connect6(struct bpf_sock_addr *ctx)
{
	return gate_v6(ctx, 0, GATE_CONNECT6);
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	return gate_v4(ctx, ctx->msg_src_ip4, GATE_SENDMSG4);
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	return gate_v6(ctx, 1, GATE_SENDMSG6);
}
