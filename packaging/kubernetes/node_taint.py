"""Keep new pods away from this node until ipsecgate's policies are covered.

The node gets the taint `TAINT` if not every policy that protects is covered now. Once all are, it
goes. A peer that is lost later brings none: the gate refuses what must be protected.

It runs in the pod, with the image's Python and nothing else. Source: Kubernetes API, Node v1 core.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

TAINT = {"key": "ipsecgate.example/not-protected", "effect": "NoSchedule"}
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
COVERED = ("ipsecgate", "wait", "--all", "--timeout")
CONFLICT = 409
PAUSE = 5.0  # seconds between attempts
LIMIT = 10.0  # seconds for one request


class Node:
    """A node of the cluster, over the API server's REST interface."""

    def __init__(self, name: str, server: str, account: Path = ACCOUNT) -> None:
        self._url = f"{server}/api/v1/nodes/{name}"
        self._account = account
        self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))

    def set_taint(self, wanted: bool) -> bool:
        """Add or remove the taint; return whether that changed the node. Raises: URLError."""
        while True:
            node = self._ask("GET")
            body = patch(node, wanted)
            if body is None:
                return False
            try:
                self._ask("PATCH", body)
            except HTTPError as error:
                if error.code != CONFLICT:
                    raise
                continue  # somebody else has changed the node since we read it
            return True

    def _ask(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self._url, method=method)  # noqa: S310 - always https
        # Read each time, because the kubelet renews it.
        request.add_header("Authorization", f"Bearer {(self._account / 'token').read_text()}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/merge-patch+json")
        with urllib.request.urlopen(request, timeout=LIMIT, context=self._tls) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found


def patch(node: dict[str, Any], wanted: bool) -> dict[str, Any] | None:
    """Return the merge patch that adds or removes the taint; None if nothing is to do.

    It names the version of the node that it changes, because it replaces the whole list.
    """
    taints = node["spec"].get("taints") or []
    others = [taint for taint in taints if taint["key"] != TAINT["key"]]
    if (len(others) < len(taints)) is wanted:
        return None
    version = {"resourceVersion": node["metadata"]["resourceVersion"]}
    return {"metadata": version, "spec": {"taints": [*others, *([TAINT] if wanted else [])]}}


def say(text: str) -> None:
    """Write a line to the pod's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def set_taint(node: Node, wanted: bool) -> None:
    """Set the taint, for as long as it takes."""
    while True:
        try:
            changed = node.set_taint(wanted)
        except (OSError, ValueError) as error:  # URLError and HTTPError among them
            say(f"cannot change the node's taint, trying again: {error}")
            time.sleep(PAUSE)
            continue
        verb = "added" if wanted else "removed"
        say(f"taint {TAINT['key']}: {verb if changed else 'as it should be'}")
        return


def main() -> None:
    """Taint the node, wait, lift the taint; then stay, because a container of a pod should."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    address = f"[{host}]" if ":" in host else host
    node = Node(os.environ["NODE_NAME"], f"https://{address}:{port}")
    if subprocess.run([*COVERED, "0", "--no-negotiate"], check=False).returncode:
        set_taint(node, wanted=True)
    while subprocess.run([*COVERED, "infinity"], check=False).returncode:
        time.sleep(PAUSE)
    set_taint(node, wanted=False)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
