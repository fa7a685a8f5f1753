"""A server that keeps one node as the Kubernetes API does: over TLS, by token, with versions."""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

OTHER = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": "now"}


class ApiServer(HTTPServer):
    """One node, over TLS. Somebody else changes it after the first time that it is read."""

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.version = 1
        self.taints: list[dict[str, str]] = []
        self.seen: list[tuple[str, str, str | None]] = []


class Request(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        self.answer(200)
        if self.server.version == 1:
            self.server.version = 2
            self.server.taints = [OTHER]

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["metadata"]["resourceVersion"] != str(self.server.version):
            self.send_error(409)
            return
        self.server.version += 1
        self.server.taints = body["spec"]["taints"]
        self.answer(200)

    def answer(self, code: int) -> None:
        token, kind = self.headers["Authorization"], self.headers["Content-Type"]
        self.server.seen.append((f"{self.command} {self.path}", token, kind))
        metadata = {"resourceVersion": str(self.server.version)}
        node = {"metadata": metadata, "spec": {"taints": self.server.taints}}
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(node).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


def account(folder: Path) -> Path:
    """Make a pod's account, a token and a certificate; return the server's certificate and key."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "1", "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key", "-out", folder / "ca.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    pem = folder / "pem"
    pem.write_text((folder / "key").read_text() + (folder / "ca.crt").read_text())
    (folder / "token").write_text("secret")
    return pem


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[ApiServer]:
    """Serve in the network namespace of the calling thread; `folder` gets a pod's account."""
    made = ApiServer(account(folder))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.shutdown()
        thread.join()
        made.server_close()
