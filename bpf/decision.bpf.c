/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Deciding about a flow, and what a processor remembers of that.
 *
 *   policy   must this flow be protected? BYPASS -> allow; no entry -> allow, unless GATE_DENY is set
 *   exempt   loopback, DHCP, the IKE daemon -> allow
 *   path     where does routing lead, with which source? unknown -> refuse
 *   SPD      which kernel policy wins, and has it a live SA? live -> allow
 *   anything else -> refuse
 *
 * A decision is valid for one generation of the tables. If another begins meanwhile, the flow is
 * decided again, ATTEMPTS times in all, and then refused.
 */

/* What a policy says about a flow that it names. */
struct named {
	__u32 state;    /* 0: none names it */
	__u32 error;
	__u32 id;
};

static __always_inline void name_policy(struct named *policy, const struct search *search)
{
	policy->state = search->found.state;
	policy->error = search->found.error;
	policy->id = search->found.id;
}

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

static __always_inline int is_bound(const struct gate_key *flow)
{
	return flow->family == IPV4 ? !!flow->saddr[3] : !is_zero(flow->saddr);
}

static __always_inline void unbind(struct gate_key *flow)
{
	flow->saddr[3] = 0;
	if (flow->family == IPV6) {
		flow->saddr[0] = 0;
		flow->saddr[1] = 0;
		flow->saddr[2] = 0;
	}
}

/* Find a flow's path, and fill in the source address that routing would choose. Return the reason
 * to refuse the flow, or 0. Without a path (*found is 0) the SPD is looked up once. */
static __always_inline int route(struct search *search, const struct origin *origin,
				 struct gate_path **found)
{
	struct gate_key *flow = &search->flow;
	struct gate_route *to = &search->route;
	int bound = is_bound(flow);
	__u64 needed = setting(GATE_PATHS);
	struct gate_path *path;

	*found = 0;
	if (bound && !needed && !origin->netns)
		return 0;
	to->prefixlen = GATE_ORIGIN_BITS + 128;
	to->netns[0] = origin->netns;
	to->netns[1] = origin->netns >> 32;
	to->device = origin->device;
	to->mark = flow->mark & bpf_htonl(setting(GATE_MARKS));
	__builtin_memcpy(to->daddr, flow->daddr, sizeof(to->daddr));
	path = paths.lookup(to);
	if (!path)
		return origin->netns ? GATE_REFUSE_NETNS : GATE_REFUSE_NO_SOURCE;
	if (path->reason)
		return path->reason;
	if (origin->netns && same(path->saddr, flow->daddr))
		return GATE_ALLOW_EXEMPT; /* for the host itself, or the namespace: never leaves it */
	if (bound && (origin->netns || needed > 1 || path->flags & GATE_TRANSLATED) &&
	    !same(flow->saddr, path->saddr))
		return GATE_REFUSE_NO_SOURCE;
	*found = path;
	if (bound)
		return 0;
	if (is_zero(path->saddr))
		return GATE_REFUSE_NO_SOURCE;
	__builtin_memcpy(flow->saddr, path->saddr, sizeof(flow->saddr));
	return 0;
}

static __always_inline int is_live(const struct search *search)
{
	return search->found.state == GATE_LIVE && !is_over(search->found.deadline);
}

/* Is a flow covered on its path, or exempt by a kernel policy? Return the reason. `state` is that
 * of the policy that names it. */
static __always_inline int follow(struct search *search, __u64 generation,
				  const struct gate_path *path, __u32 state)
{
	struct gate_key *flow = &search->flow;
	int flags = path ? path->flags : 0;
	__u16 sport = flow->sport;
	__u32 mark = flow->mark;

	classify(GATE_SPD, generation, search);
	if (flags) {
		/* What a policy matches here is decided, unless a translation follows. */
		if (is_live(search) && !(flags & GATE_TRANSLATED))
			return GATE_ALLOW_COVERED;
		if (search->found.state == GATE_DEAD ||
		    (search->found.state == GATE_LIVE && !is_live(search)))
			return GATE_REFUSE_UNCOVERED;
		if (flags & GATE_TRANSLATED) {
			__builtin_memcpy(flow->saddr, path->translated, sizeof(flow->saddr));
			flow->sport = 0; /* it may be translated, too */
		}
		if (flags & GATE_MARKED)
			flow->mark = path->mark;
		flow->if_id = path->if_id;
		classify(GATE_SPD, generation, search);
		if (flags & GATE_TRANSLATED)
			__builtin_memcpy(flow->saddr, path->saddr, sizeof(flow->saddr));
		flow->sport = sport;
		flow->mark = mark;
		flow->if_id = 0;
	}
	if (is_live(search))
		return GATE_ALLOW_COVERED;
	if (search->found.state == GATE_PASS && state == GATE_DERIVED && !(flags & GATE_TUNNELED))
		return GATE_ALLOW_PASSED;
	return GATE_REFUSE_UNCOVERED;
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
static __always_inline int decide(const struct origin *origin, __u64 generation,
				  struct search *search, struct named *policy)
{
	struct gate_key *flow = &search->flow;
	int published = !!setting_after(generation, GATE_PUBLISHED + GATE_POLICY);
	struct gate_path *path;
	int reason;

	classify(GATE_POLICY, generation, search);
	name_policy(policy, search);
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
	if (policy->state == GATE_DISCARD)
		return GATE_REFUSE_DISCARD;
	reason = route(search, origin, &path);
	if (reason)
		return reason;
	if (same(flow->saddr, flow->daddr))
		return GATE_ALLOW_EXEMPT; /* the host's own address: never leaves it */
	return follow(search, generation, path, policy->state);
}

/* Decide about a flow as of one generation; refuse it if another began during each attempt. */
static __always_inline int decide_in_one_generation(const struct origin *origin,
						    struct search *search,
						    struct named *policy,
						    __u64 *generation, __u64 *deadline)
{
	struct gate_key *flow = &search->flow;
	int bound = is_bound(flow);

	/* Unrolled, because Linux 6.1 refuses a jump back to an instruction behind a call. */
#pragma unroll
	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		int reason;

		search->torn = 0;
		search->read = 0;
		*generation = setting(GATE_GENERATION);
		reason = decide(origin, *generation, search, policy);
		*deadline = reason == GATE_ALLOW_COVERED ? search->found.deadline : 0;
		if (!bound)
			unbind(flow);
		/* All of it is of one generation only if no other began meanwhile. */
		if (search->torn || setting_after(search->read, GATE_GENERATION) != *generation)
			continue;
		if (reason < GATE_ALLOW_EXEMPT && !origin->netns && !origin->device)
			remember(flow, *generation, *deadline, reason);
		return reason;
	}
	return GATE_REFUSE_NOT_READY;
}
