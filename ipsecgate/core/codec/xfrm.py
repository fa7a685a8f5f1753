"""Codec for NETLINK_XFRM: the kernel's datagrams into events, and requests for dumps.

Rules of this module: bytes in, values out; it opens no socket. It decodes what an application's
flow or its replies can meet: main policies with dir in or out, and states, which do not have a
direction. It skips well-formed messages about anything else: forward policies, per-socket policies
(dir 3 and 4, an IKE daemon's), sub policies (Mobile IPv6), soft expiries and unknown types. It
treats MIGRATE as a flush, because that rewrites policies and states without saying how.

It does not judge: it passes on larval states, and states that no policy uses.

Source: net/xfrm/xfrm_user.c for what each message carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ipsecgate.core.codec.netlink import Message, encode_dump, messages
from ipsecgate.core.codec.xfrm_structures import (
    EXPIRE_SIZE,
    POLEXPIRE_SIZE,
    POLICY_ID_SIZE,
    POLICY_SIZE,
    SA_ID_SIZE,
    SA_SIZE,
    XFRMA_POLICY,
    is_main,
    policy,
    sa,
    sa_id,
    sa_packets,
)
from ipsecgate.core.model.events import (
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.ipsec import SaId

NEWSA, DELSA, GETSA, NEWPOLICY, DELPOLICY, GETPOLICY = range(0x10, 0x16)
EXPIRE, UPDPOLICY, UPDSA, POLEXPIRE, FLUSHSA, FLUSHPOLICY = range(0x18, 0x1E)
MIGRATE = 0x21


def decode(datagram: bytes) -> Iterator[XfrmEvent]:
    """Yield the events of a datagram in order.

    Raises: DecodeError at the first invalid message, after the events of those before it.
    """
    for message in messages(datagram):
        decoder = _DECODERS.get(message.type)
        if decoder is not None and (event := decoder(message)) is not None:
            yield event


def packets_of_sas(datagram: bytes) -> Iterator[tuple[SaId, int]]:
    """Yield the states of a dump, and how many packets each has carried. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type == NEWSA:
            yield sa_packets(message, message.structure(SA_SIZE, "xfrm_usersa_info"))


def encode_policy_dump(sequence: int) -> bytes:
    """Encode XFRM_MSG_GETPOLICY for all policies.

    The kernel requires the whole structure, although a dump reads nothing from it.
    Source: xfrm_msg_min[] in net/xfrm/xfrm_user.c.
    """
    return encode_dump(GETPOLICY, bytes(POLICY_ID_SIZE), sequence)


def encode_sa_dump(sequence: int) -> bytes:
    """Encode XFRM_MSG_GETSA for all states."""
    return encode_dump(GETSA, bytes(SA_ID_SIZE), sequence)


# --- messages -----------------------------------------------------------------------


def _new_policy(message: Message) -> PolicySet | None:
    at = message.structure(POLICY_SIZE, "xfrm_userpolicy_info")
    entry = policy(message, at, message.attributes(POLICY_SIZE))
    return PolicySet(entry) if entry else None


def _del_policy(message: Message) -> PolicyGone | None:
    message.structure(POLICY_ID_SIZE, "xfrm_userpolicy_id")
    attributes = message.attributes(POLICY_ID_SIZE)
    at = message.payload(attributes, XFRMA_POLICY, POLICY_SIZE, "XFRMA_POLICY")
    if at is None:
        raise message.bad("XFRMA_POLICY (missing)", message.end)
    entry = policy(message, at, attributes)
    return PolicyGone(entry.key) if entry else None


def _policy_expired(message: Message) -> PolicyGone | None:
    at = message.structure(POLEXPIRE_SIZE, "xfrm_user_polexpire")
    entry = policy(message, at, message.attributes(POLEXPIRE_SIZE))
    return PolicyGone(entry.key) if entry and message.data[at + POLICY_SIZE] else None


def _flush_policies(message: Message) -> PoliciesFlushed | None:
    return PoliciesFlushed() if is_main(message, message.attributes(0)) else None


def _new_sa(message: Message) -> SaSet:
    at = message.structure(SA_SIZE, "xfrm_usersa_info")
    return SaSet(sa(message, at, message.attributes(SA_SIZE)))


def _del_sa(message: Message) -> SaGone:
    at = message.structure(SA_ID_SIZE, "xfrm_usersa_id")
    message.attributes(SA_ID_SIZE)
    return SaGone(sa_id(message, at))


def _sa_expired(message: Message) -> SaGone | None:
    at = message.structure(EXPIRE_SIZE, "xfrm_user_expire")
    state = sa(message, at, message.attributes(EXPIRE_SIZE))
    return SaGone(state.id) if message.data[at + SA_SIZE] else None


def _flush_sas(message: Message) -> SasFlushed:
    message.structure(1, "xfrm_usersa_flush")
    return SasFlushed()


_DECODERS: Mapping[int, Callable[[Message], XfrmEvent | None]] = {
    NEWPOLICY: _new_policy,
    UPDPOLICY: _new_policy,
    DELPOLICY: _del_policy,
    POLEXPIRE: _policy_expired,
    FLUSHPOLICY: _flush_policies,
    NEWSA: _new_sa,
    UPDSA: _new_sa,
    DELSA: _del_sa,
    EXPIRE: _sa_expired,
    FLUSHSA: _flush_sas,
    MIGRATE: lambda _message: PoliciesFlushed(),
}
