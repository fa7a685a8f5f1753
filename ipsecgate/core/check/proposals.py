"""Which algorithms an IKE proposal of strongSwan's needs, such as aes256-sha256-x25519.

Rule of this module: a word that is not in the tables needs nothing, because a guess would raise a
false alarm.

Source: "IKEv2 Cipher Suites" of strongSwan's documentation; the names are those of VICI's
get-algorithms.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

ENCRYPTION, AEAD, INTEGRITY, PRF = "encryption", "aead", "integrity", "prf"
KEY_EXCHANGE = "ke"  # since strongSwan 6; before, it is "dh"

_CIPHERS = (
    (r"aes(?:128|192|256)?", ENCRYPTION, "AES_CBC"),
    (r"aes(?:128|192|256)?ctr", ENCRYPTION, "AES_CTR"),
    (r"camellia(?:128|192|256)?", ENCRYPTION, "CAMELLIA_CBC"),
    (r"3des", ENCRYPTION, "3DES_CBC"),
    (r"serpent(?:128|192|256)?", ENCRYPTION, "SERPENT_CBC"),
    (r"aes(?:128|192|256)?(gcm|ccm)(?:8|64)", AEAD, r"AES_\1_8"),
    (r"aes(?:128|192|256)?(gcm|ccm)(?:12|96)", AEAD, r"AES_\1_12"),
    (r"aes(?:128|192|256)?(gcm|ccm)(?:16|128)?", AEAD, r"AES_\1_16"),
    (r"chacha20poly1305", AEAD, "CHACHA20_POLY1305"),
    (r"prfsha1", PRF, "PRF_HMAC_SHA1"),
    (r"prfsha(256|384|512)", PRF, r"PRF_HMAC_SHA2_\1"),
    (r"prfaesxcbc", PRF, "PRF_AES128_XCBC"),
    (r"prfaescmac", PRF, "PRF_AES128_CMAC"),
    (r"(?:ke[1-7]_)?modp(768|1024|1536|2048|3072|4096|6144|8192)", KEY_EXCHANGE, r"MODP_\1"),
    (r"(?:ke[1-7]_)?ecp(192|224|256|384|521)", KEY_EXCHANGE, r"ECP_\1"),
    (r"(?:ke[1-7]_)?(?:curve|x)(25519|448)", KEY_EXCHANGE, r"CURVE_\1"),
    (r"(?:ke[1-7]_)?mlkem(512|768|1024)", KEY_EXCHANGE, r"ML_KEM_\1"),
)
# The hash of a proposal authenticates its packets, and derives the keys if no PRF is named.
_HASHES = {
    "sha": ("HMAC_SHA1_96", "PRF_HMAC_SHA1"),
    "sha1": ("HMAC_SHA1_96", "PRF_HMAC_SHA1"),
    "sha256": ("HMAC_SHA2_256_128", "PRF_HMAC_SHA2_256"),
    "sha384": ("HMAC_SHA2_384_192", "PRF_HMAC_SHA2_384"),
    "sha512": ("HMAC_SHA2_512_256", "PRF_HMAC_SHA2_512"),
    "aesxcbc": ("AES_XCBC_96", "PRF_AES128_XCBC"),
    "aescmac": ("AES_CMAC_96", "PRF_AES128_CMAC"),
}


def needs(proposal: str) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each algorithm that a proposal needs."""
    words = proposal.lower().split("-")
    known = [found for word in words for found in _of(word)]
    yield from known
    kinds = {kind for kind, _ in known}
    for word in words:
        if word in _HASHES:
            integrity, prf = _HASHES[word]
            if AEAD not in kinds:
                yield INTEGRITY, integrity
            if PRF not in kinds:
                yield PRF, prf


def _of(word: str) -> Iterator[tuple[str, str]]:
    for pattern, kind, name in _CIPHERS:
        if match := re.fullmatch(pattern, word):
            yield kind, match.expand(name).upper()


def lacking(proposal: str, algorithms: Mapping[str, Collection[str]]) -> list[str]:
    """Return the algorithms of a proposal that strongSwan has not loaded, in order."""
    if not algorithms:
        return []
    have = {**algorithms, KEY_EXCHANGE: algorithms.get("ke") or algorithms.get("dh", ())}
    return list(dict.fromkeys(n for kind, n in needs(proposal) if n not in have.get(kind, ())))
