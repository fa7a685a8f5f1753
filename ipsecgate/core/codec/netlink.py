"""Netlink's framing: a datagram holds messages, a message a structure and attributes.

Rules of this module: bytes in, values out; it opens no socket and knows nothing of what a message
means. Headers are in host order and everything is padded to 4 bytes. A read beyond the end of a
message raises `DecodeError`, so callers need not check lengths.

Source: linux/netlink.h (struct nlmsghdr, nlattr), RFC 3549 section 2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLA_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, sender's port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERRNO = struct.Struct("=i")
_MAX_ERRNO = 4095  # Source: linux/err.h


class DecodeError(GateError):
    """A message that does not match the kernel's headers.

    It has the message's type, the field, and that field's offset in the datagram.
    """

    def __init__(self, message_type: int, field: str, offset: int) -> None:
        self.message_type = message_type
        self.field = field
        self.offset = offset
        super().__init__(
            f"netlink message type {message_type:#x}: bad {field} at byte {offset}",
            hint="ipsecgate cannot read this kernel's messages: report a bug, with `uname -r`",
        )


Span = tuple[int, int]
"""The position of an attribute's payload in the datagram: [start, end)."""


@value
class Message:
    """One message inside a datagram; its payload is data[start:end]."""

    data: bytes
    type: int
    flags: int
    sequence: int
    start: int
    end: int

    def bad(self, field: str, offset: int) -> DecodeError:
        """Return the error to raise for a field at an offset of the datagram."""
        return DecodeError(self.type, field, offset)

    def structure(self, size: int, field: str) -> int:
        """Return the offset of the fixed structure. Raises: DecodeError if it is truncated."""
        if self.start + size > self.end:
            raise self.bad(field, self.start)
        return self.start

    def attributes(self, structure_size: int) -> dict[int, Span]:
        """Return the attributes after the structure, by type. A repeated one replaces the first.

        Raises: DecodeError if one extends beyond the message.
        """
        return dict(self.items(structure_size))

    def items(self, structure_size: int) -> Iterator[tuple[int, Span]]:
        """Yield the type and the position of each attribute after the structure, in order.

        Raises: DecodeError if one extends beyond the message.
        """
        at = self.start + align(structure_size)
        while at < self.end:
            if at + _ATTRIBUTE.size > self.end:
                raise self.bad("attribute header", at)
            length, kind = _ATTRIBUTE.unpack_from(self.data, at)
            if length < _ATTRIBUTE.size or at + length > self.end:
                raise self.bad("attribute length", at)
            yield kind & NLA_TYPE_MASK, (at + _ATTRIBUTE.size, at + length)
            at += length + 3 & ~3

    def payload(
        self, attributes: Mapping[int, Span], kind: int, size: int, field: str
    ) -> int | None:
        """Return the offset of an attribute's payload, None if the attribute is absent.

        Raises: DecodeError if it is shorter than `size`.
        """
        if kind not in attributes:
            return None
        start, end = attributes[kind]
        if end - start < size:
            raise self.bad(field, start)
        return start

    def nested(self, attributes: Mapping[int, Span], kind: int) -> dict[int, Span]:
        """Return the attributes inside an attribute, none if it is absent. Raises: DecodeError."""
        if kind not in attributes:
            return {}
        start, end = attributes[kind]
        return replace(self, start=start, end=end).attributes(0)

    def text(self, attributes: Mapping[int, Span], kind: int) -> str:
        """Return a text that ends in NUL, "" if the attribute is absent."""
        start, end = attributes.get(kind, (0, 0))
        return self.data[start:end].rstrip(b"\0").decode(errors="replace")


@value
class DumpEnd:
    """The end of a dump. `error`: an errno or 0. `interrupted`: inconsistent, so repeat it."""

    error: int
    interrupted: bool = False


def align(length: int) -> int:
    """Round up to netlink's 4 bytes."""
    return (length + 3) & ~3


def messages(datagram: bytes) -> Iterator[Message]:
    """Yield the messages of a datagram. Raises: DecodeError at an invalid header."""
    for at, length, kind, flags, sequence in _headers(datagram):
        yield Message(datagram, kind, flags, sequence, at + _HEADER.size, at + length)


def _headers(datagram: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield offset, length, type, flags and sequence of each message. Raises: DecodeError."""
    at, size = 0, len(datagram)
    while at < size:
        if at + _HEADER.size > size:
            raise DecodeError(0, "message header", at)
        length, kind, flags, sequence, _port = _HEADER.unpack_from(datagram, at)
        if length < _HEADER.size or at + length > size:
            raise DecodeError(kind, "message length", at)
        yield at, length, kind, flags, sequence
        at += length + 3 & ~3


def dump_end(datagram: bytes, sequence: int) -> DumpEnd | None:
    """Return the end of the dump with this sequence number, None if the datagram has none.

    NLMSG_DONE and NLMSG_ERROR both begin with an errno, negative or 0. Raises: DecodeError.
    """
    interrupted = False
    for start, length, kind, flags, own_sequence in _headers(datagram):
        if own_sequence != sequence:
            continue
        interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
        if kind in (NLMSG_DONE, NLMSG_ERROR):
            at = start + _HEADER.size
            if at + _ERRNO.size > start + length:
                raise DecodeError(kind, "errno", at)
            error = -_ERRNO.unpack_from(datagram, at)[0]
            if not 0 <= error <= _MAX_ERRNO:
                raise DecodeError(kind, "errno", at)
            return DumpEnd(error, interrupted)
    return None


def encode_dump(message_type: int, body: bytes, sequence: int) -> bytes:
    """Encode a request to dump all objects; `body` is the structure that the type requires."""
    return _encode(message_type, NLM_F_REQUEST | NLM_F_DUMP, body, sequence)


def encode_request(message_type: int, body: bytes, sequence: int) -> bytes:
    """Encode a request about one object; its reply ends as a dump does (`dump_end`)."""
    return _encode(message_type, NLM_F_REQUEST | NLM_F_ACK, body, sequence)


def _encode(message_type: int, flags: int, body: bytes, sequence: int) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), message_type, flags, sequence, 0) + body
