"""Take secrets out of text before it leaves the machine: keys of SAs, passwords, private keys.

Rules of this module: what may be a key is hidden, even if it is none. Nothing is collected in the
first place that is known to hold secrets (`admin.bundle`); this is the second line.
"""

from __future__ import annotations

import re

HIDDEN = "<hidden>"
_PATTERNS = (
    # A private key or certificate in PEM, whole.
    re.compile(r"-----BEGIN (?P<a>[A-Z ]+)-----.*?-----END (?P=a)-----", re.DOTALL),
    # A key of an SA as ip(8) prints it: 56 bits (DES) and longer. An SPI or a mark has 32.
    re.compile(r"\b0x[0-9a-fA-F]{14,}"),
    # strongSwan's notation of secrets: hexadecimal, base64.
    re.compile(r"(?<![\w/])0[xs][0-9A-Za-z+/=]{14,}"),
    # secret = ..., "password": "...", --psk=..., psk_key: ...
    re.compile(
        r"(?i)(?P<keep>[\w-]*(?:secret|psk|passw(?:or)?d|passphrase|token|private[_-]?key)[\w-]*"
        r"[\"']?\s*[=:]\s*)(?!<hidden>)(?:(?P<quote>[\"'])[^\"'\n]*(?P=quote)|[^\s,}\]\"']+)"
    ),
)


def scrub(text: str) -> tuple[str, int]:
    """Return the text with each secret hidden, and how many there were."""
    total = 0
    for pattern in _PATTERNS:
        text, count = pattern.subn(_hide, text)
        total += count
    return text, total


def _hide(found: re.Match[str]) -> str:
    """Keep the name of a secret and the quotes around it, so that JSON stays JSON."""
    kept = found.groupdict()
    quote = kept.get("quote") or ""
    return f"{kept.get('keep', '')}{quote}{HIDDEN}{quote}"
