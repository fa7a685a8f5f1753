/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Looking up a flow in a table: of all entries that match it, the one of the lowest rank. An entry is
 * found with one hash lookup for its mask (tuple-space search); the index says which masks to try.
 */

/* A hash of a key, for the index and for the decisions; layout.py (key_hash) has the same. It
 * hashes even and odd words apart, because a processor can multiply for both at once. */
static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ (hash >> 32);
}

static __always_inline __u64 hash_of(const __u64 *word)
{
	return mix(mix(mix(mix(0, word[0]), word[2]), word[4]),
		   mix(mix(mix(0, word[1]), word[3]), word[5]));
}

/* What an answer's `check` must be; packed.py (pack_entry) has the same. */
static __always_inline __u32 check_of(__u64 hash, __u64 since, const struct gate_answer *answer)
{
	__u64 what = (__u64)answer->error << 32 | answer->state;

	return mix(mix(mix(hash, since), answer->rank),
		   mix(mix(answer->deadline, what), answer->id));
}

/* A flow, and a search of one table for it. All functions of a hook share 512 bytes of stack, so
 * before a search and behind it this place has other uses. */
struct search {
	struct gate_key flow;
	union {
		struct {
			__u64 generation;
			struct gate_answer found;
			__u32 levels;   /* a bit for each that is still to be searched */
			__u32 table;
			__u32 slots;    /* which of the two maps is in use */
			__u32 index_bits;
			__u32 place_bits;
			__u32 at;       /* the next slot of the index */
		};
		struct gate_route route;   /* to find the flow's path */
		struct gate_memory memory; /* what the socket is to remember of the flow */
	};
	int torn;       /* an entry was replaced while it was read */
	__u64 read;     /* 0, and depends on all that was read: see having_read() */
};

/* Have a socket remember a flow (search->memory). Replace what it remembers as a whole: a concurrent
 * call on this socket must not see half of it. */
static __always_inline void associate(struct bpf_sock *sk, struct search *search)
{
	sockets.sk_storage_delete(sk);
	sockets.sk_storage_get(sk, search, BPF_SK_STORAGE_GET_F_CREATE);
}

/* Go to the next level; 0: there is none. index.py (prefix_hash) has the same hash. */
static __always_inline int next_level(struct search *search)
{
	const __u32 *to = search->flow.daddr;
	__u64 high = (__u64)bpf_ntohl(to[0]) << 32 | bpf_ntohl(to[1]);
	__u64 low = (__u64)bpf_ntohl(to[2]) << 32 | bpf_ntohl(to[3]);
	__u64 lowest = search->levels & -search->levels;
	__u32 level;

	if (!lowest)
		return 0;
	search->levels ^= lowest;
	level = __builtin_popcountll(lowest - 1); /* BCC crashes on __builtin_ctz() */
	if (level <= 8) {
		low = 0;
		high &= level ? ~0ULL << (64 - 8 * level) : 0;
	} else {
		low &= ~0ULL << (128 - 8 * level);
	}
	search->at = mix(mix(high, search->table << 8 | level), low) >> (64 - search->index_bits);
	return 1;
}

/* Return 0 if two keys are the same. */
static __always_inline __u64 difference(const __u64 *a, const __u64 *b)
{
	return (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) |
	       (a[5] ^ b[5]);
}

/* Take an entry's answer if it is better than what was found so far. */
static __always_inline void take(struct search *search, const struct gate_entry *entry, __u64 hash)
{
	__u64 since = *(volatile __u64 *)&entry->since;
	struct gate_answer answer = since <= search->generation ? entry->now : entry->before;

	barrier(); /* judge the copy, not what the entry says by now */
	search->read |= having_read(since | answer.rank | answer.deadline | answer.state |
				    answer.error | answer.id | answer.check);
	if (answer.check != check_of(hash, since, &answer)) {
		search->torn = 1;
		return;
	}
	/* Of two answers of one rank, take the longer-lived. */
	if (answer.state && (answer.rank < search->found.rank ||
			     (answer.rank == search->found.rank &&
			      outlives(answer.deadline, search->found.deadline))))
		search->found = answer;
}

/* Try the mask of one slot of the index. */
static __always_inline void try_mask(struct search *search, __u32 slot, void *slots_in_use,
				     void *all_entries)
{
	int number = search->table * GATE_MASKS + (slot & (GATE_MASKS - 1));
	struct gate_line *line = 0;
	struct gate_entry *entry;
	struct gate_mask *mask;
	__u64 key[GATE_KEY_WORDS];
	__u64 hash;
	__u32 at;

	mask = masks.lookup(&number);
	if (!mask)
		return;
	for (int word = 0; word < GATE_KEY_WORDS; word++)
		key[word] = ((__u64 *)&search->flow)[word] & mask->word[word];
	key[GATE_KEY_WORDS - 1] |= mask->last_word;
	hash = hash_of(key);
	if (!(slot >> (GATE_MASK_BITS + ((hash >> 32) * GATE_MARK_BITS >> 32)) & 1))
		return;
	at = hash >> (64 - search->place_bits);
	for (int probe = 0; probe < GATE_PROBES; probe++) {
		__u64 differs;
		__u32 place;

		number = (at >> 4) + (1U << search->index_bits >> 4);
		if (!line)
			line = bpf_map_lookup_elem(slots_in_use, &number);
		if (!line)
			break;
		place = line->slot[at & (GATE_LINE - 1)];
		search->read |= having_read(place);
		if (!place)
			return;
		if (place >> GATE_PLACE_BITS == (__u32)hash >> GATE_PLACE_BITS &&
		    place != GATE_GONE) {
			number = (place & ((1 << GATE_PLACE_BITS) - 1)) - 1;
			entry = bpf_map_lookup_elem(all_entries, &number);
			differs = entry ? difference(key, (const __u64 *)&entry->key) : 1;
			search->read |= having_read(differs);
			if (!differs)
				goto found;
		}
		at = (at + 1) & ((1U << search->place_bits) - 1);
		if (!(at & (GATE_LINE - 1)))
			line = 0;
	}
	search->torn = 1;
	return;
found:
	take(search, entry, hash);
}

/* Go through some slots; 1 ends the search. A function of its own, because a loop over all of them
 * is more than the verifier follows. */
int search_part(struct search *search)
{
	struct gate_line *line = 0;
	void *slots_in_use, *all_entries;
	int number = 0;

	if (!search)
		return 1;
	all_entries = entries.lookup(&number);
	number = search->slots;
	slots_in_use = slots.lookup(&number);
	if (!slots_in_use || !all_entries) {
		search->torn = 1;
		return 1;
	}
	for (int i = 0; i < PART; i++) {
		__u32 slot;

		number = search->at / GATE_LINE;
		if (!line)
			line = bpf_map_lookup_elem(slots_in_use, &number);
		if (!line) {
			search->torn = 1;
			return 1;
		}
		slot = line->slot[search->at & (GATE_LINE - 1)];
		search->read |= having_read(slot);
		if (slot) {
			try_mask(search, slot, slots_in_use, all_entries);
			search->at = (search->at + 1) & ((1U << search->index_bits) - 1);
			if (!(search->at & (GATE_LINE - 1)))
				line = 0;
		} else if (next_level(search)) {
			line = 0;
		} else {
			return 1;
		}
	}
	return 0;
}

int search(struct search *search)
{
	if (!search || !next_level(search))
		return 0;
	/* Unrolled, because Linux 6.1 refuses a jump back to an instruction behind a call. */
#pragma unroll
	for (int part = 0; part < PARTS; part++)
		if (call_search_part(search))
			return 0;
	search->torn = 1;
	return 0;
}

/* Look search->flow up in a table: find the answer of the lowest rank (tuple-space search), and
 * return its state; 0: no entry matches, and `found` is not set. */
static __always_inline int classify(__u32 table, __u64 generation, struct search *search)
{
	__u64 published = setting_after(generation, GATE_PUBLISHED + table);
	__u64 levels = setting_after(generation, GATE_LEVELS + table);
	__u64 used = setting_after(generation, GATE_SLOTS);

	search->generation = generation;
	search->found.rank = ~0ULL;
	search->found.deadline = 0;
	search->found.state = 0;
	search->levels = search->flow.family == IPV4 ? levels >> GATE_LEVELS_V4 : levels;
	search->table = table;
	search->slots = used >> 16;
	search->index_bits = used & 31;
	search->place_bits = used >> 8 & 31;
	if (published)
		call_search(search);
	return search->found.state;
}

/* Find the policy that names search->flow, as of one generation. Return 0 if another generation
 * began during each attempt. */
int search_policy(struct search *search)
{
	if (!search)
		return 0;
#pragma unroll
	for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
		__u64 generation = setting(GATE_GENERATION);

		search->torn = 0;
		search->read = 0;
		classify(GATE_POLICY, generation, search);
		if (!search->torn && setting_after(search->read, GATE_GENERATION) == generation)
			return 1;
	}
	return 0;
}

