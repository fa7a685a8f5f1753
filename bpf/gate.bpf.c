/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The gate: four hooks over one verdict. The hooks run in the caller's connect(), sendto() or
 * sendmsg(), before the request reaches TCP or UDP (US 7,028,332, claim 1).
 *
 *   verdict   let go before in this generation, as its socket (UDP) or this processor (recall)
 *             remembers? -> allow
 *             else decide -> allow, or refuse: an errno, and one event for userspace
 *   decide    policy   must this flow be protected? BYPASS -> allow; no entry -> allow, unless
 *                      GATE_DENY is set
 *             exempt   loopback, DHCP, the IKE daemon -> allow
 *             SPD      which kernel policy wins, and has it a live SA? live -> allow
 *             anything else -> refuse
 *
 * A decision is valid for one generation of the tables. If another begins meanwhile, the hook
 * decides again, ATTEMPTS times in all, and then refuses.
 *
 * backstop.bpf.c sees every packet after XFRM. It cannot replace the hooks: they exist to avoid
 * a dropped SYN. Anything unknown (no table, no source address) means refusal.
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

	if (flow->family == IPV4)
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
	if (flow->family == IPV4)
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

/* Fill in the source that routing would choose; return 0 if it is unknown. The table applies
 * only to sockets without a mark or device: with one, routing may choose another source. */
static __always_inline int route(struct gate_key *flow, int plain)
{
	struct gate_route to = { .prefixlen = 128 };
	struct gate_source *source;

	if (flow->family == IPV4 ? flow->saddr[3] : !is_zero(flow->saddr))
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

static __always_inline struct decision *decision_of(__u64 hash)
{
	int at = hash % DECISIONS;

	return decisions.lookup(&at);
}

static __always_inline __u32 check_of_decision(__u64 hash, __u64 generation, __u64 deadline,
					       __u32 reason)
{
	return mix(mix(hash, generation), mix(deadline, reason));
}

/* Return the reason for which this flow was let go in this generation, -1 if none is known. */
static __always_inline int recall(const struct gate_key *flow, __u64 generation, __u64 *deadline)
{
	__u64 hash = hash_of((const __u64 *)flow);
	struct decision *known = decision_of(hash);
	__u32 reason;

	if (!known || known->generation != generation || !same_flow(&known->flow, flow))
		return -1;
	*deadline = *(volatile __u64 *)&known->deadline;
	reason = *(volatile __u32 *)&known->reason;
	if (known->check != check_of_decision(hash, generation, *deadline, reason) ||
	    is_over(*deadline))
		return -1;
	return reason;
}

static __always_inline void remember(const struct gate_key *flow, __u64 generation,
				     __u64 deadline, int reason)
{
	__u64 hash = hash_of((const __u64 *)flow);
	struct decision *known = decision_of(hash);

	if (!known)
		return;
	known->flow = *flow;
	known->generation = generation;
	known->deadline = deadline;
	known->reason = reason;
	known->check = check_of_decision(hash, generation, deadline, reason);
}

/* Decide about search->flow for one generation; return the reason. `policy` is the one that names
 * the flow, if any, and `found` the SA that covers it. */
static __always_inline int decide(struct bpf_sock_addr *ctx, __u64 generation,
				  struct search *search, struct gate_answer *policy)
{
	struct bpf_sock *sk = ctx->sk;
	struct gate_key *flow = &search->flow;
	int published = !!setting_after(generation, GATE_LIST + GATE_POLICY);

	policy->state = 0;
	if (classify(GATE_POLICY, generation, search))
		*policy = search->found;
	if (policy->state == GATE_BYPASS)
		return GATE_ALLOW_BYPASS;
	if (!policy->state && published && !setting_after(generation, GATE_DENY))
		return GATE_ALLOW_DEFAULT;
	if (is_exempt(flow))
		return GATE_ALLOW_EXEMPT;
	if (!published)
		return GATE_REFUSE_NOT_READY;
	if (!policy->state)
		return GATE_REFUSE_DEFAULT;
	if (policy->state != GATE_PROTECT)
		return GATE_REFUSE_DISCARD;
	if (bpf_get_netns_cookie(ctx) != setting(GATE_NETNS))
		return GATE_REFUSE_NETNS;
	if (!route(flow, !flow->mark && !(sk && sk->bound_dev_if)))
		return GATE_REFUSE_NO_SOURCE;
	if (same(flow->saddr, flow->daddr))
		return GATE_ALLOW_EXEMPT; /* the host's own address: never leaves it */
	if (classify(GATE_SPD, generation, search) != GATE_LIVE ||
	    is_over(search->found.deadline))
		return GATE_REFUSE_UNCOVERED;
	return GATE_ALLOW_COVERED;
}

/* Decide about a flow as of one generation; refuse it if another began during each attempt. */
static __always_inline int decide_in_one_generation(struct bpf_sock_addr *ctx,
						    const struct gate_key *flow,
						    struct gate_answer *policy,
						    __u64 *generation, __u64 *deadline)
{
	struct bpf_sock *sk = ctx->sk;

	/* Unrolled, because Linux 6.1 refuses a jump back to an instruction behind a call. */
#pragma unroll
	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		struct search search = { .flow = *flow };
		int reason;

		*generation = setting(GATE_GENERATION);
		reason = decide(ctx, *generation, &search, policy);
		*deadline = reason == GATE_ALLOW_COVERED ? search.found.deadline : 0;
		/* All of it is of one generation only if no other began meanwhile. The deadline
		 * only orders this load after the lookups; its highest bit is 0. */
		if (search.torn ||
		    setting_after(search.found.deadline, GATE_GENERATION) != *generation)
			continue;
		if (reason < GATE_ALLOW_EXEMPT && !(sk && sk->bound_dev_if))
			remember(flow, *generation, *deadline, reason);
		return reason;
	}
	return GATE_REFUSE_NOT_READY;
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
