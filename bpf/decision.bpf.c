/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Deciding about a flow, and what a processor remembers of that.
 *
 *   policy   must this flow be protected? BYPASS -> allow; no entry -> allow, unless GATE_DENY is set
 *   exempt   loopback, DHCP, the IKE daemon -> allow
 *   SPD      which kernel policy wins, and has it a live SA? live -> allow
 *   anything else -> refuse
 *
 * A decision is valid for one generation of the tables. If another begins meanwhile, the flow is
 * decided again, ATTEMPTS times in all, and then refused.
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

static __always_inline struct decision *decision_of(__u64 hash)
{
	int at = hash % DECISIONS;

	return decisions.lookup(&at);
}

static __always_inline __u32 *tag_of(__u64 hash)
{
	int line = hash % DECISIONS / GATE_LINE;
	struct tags *found = tags.lookup(&line);

	return found ? &found->tag[hash % GATE_LINE] : 0;
}

static __always_inline __u32 tag_for(__u64 hash, __u64 generation)
{
	return (hash >> 32) + generation;
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
	__u32 *tag = tag_of(hash);
	struct decision *known;
	__u32 reason;

	if (!tag || *tag != tag_for(hash, generation))
		return -1;
	known = decision_of(hash);
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
	__u32 *tag = tag_of(hash);

	if (!known || !tag)
		return;
	*tag = tag_for(hash, generation);
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
	int published = !!setting_after(generation, GATE_PUBLISHED + GATE_POLICY);

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
		/* All of it is of one generation only if no other began meanwhile. */
		if (search.torn || setting_after(search.read, GATE_GENERATION) != *generation)
			continue;
		if (reason < GATE_ALLOW_EXEMPT && !(sk && sk->bound_dev_if))
			remember(flow, *generation, *deadline, reason);
		return reason;
	}
	return GATE_REFUSE_NOT_READY;
}

