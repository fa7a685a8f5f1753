"""The lab's servers: they count what reaches them."""

from __future__ import annotations

import os
import select
import socket
import sys

from ipsecgate.lab.options import NUMBER_LENGTH, RUN_LENGTH, Options, new_socket, say

RECEIVE_BUFFER = 4 << 20


def listener(options: Options, kind: int) -> socket.socket:
    """Bind a server's socket; :: takes IPv4 as well."""
    sock = new_socket(kind, options.bind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.bind == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((options.bind, options.port))
    return sock


def tcp_server(options: Options) -> None:
    """Echo what each connection sends. A line on the input: report and start anew."""
    server = listener(options, socket.SOCK_STREAM)
    server.listen(1024)
    say({"ready": "tcp-server", "port": server.getsockname()[1]})
    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    poll.register(server, select.EPOLLIN)
    peers: dict[int, socket.socket] = {}
    accepted = 0
    while True:
        for fd, _ in poll.poll():
            if fd == 0:
                if not os.read(0, 4096):
                    return
                say({"role": "tcp-server", "accepted": accepted})
                accepted = 0
            elif fd == server.fileno():
                peer, _ = server.accept()
                peers[peer.fileno()] = peer
                poll.register(peer, select.EPOLLIN)
                accepted += 1
            else:
                echo(peers, fd)


def echo(peers: dict[int, socket.socket], fd: int) -> None:
    """Send back what came in on one connection; forget it at its end."""
    try:
        data = peers[fd].recv(65536)
        if data:
            peers[fd].sendall(data)
            return
    except OSError:
        pass
    # Closing takes it out of the epoll set as well.
    peers.pop(fd).close()


def udp_server(options: Options) -> None:
    """Count datagrams: `received` all of them, `distinct` by sender's run and number.

    A line "N S" on the input: report once N distinct ones are in, or S seconds after the
    last one; then start anew.
    """
    server = listener(options, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    say({"ready": "udp-server", "port": server.getsockname()[1]})
    seen: set[bytes] = set()
    received = 0
    wanted: tuple[int, float] | None = None
    while True:
        inputs = [server] if wanted else [server, sys.stdin]
        ready = select.select(inputs, [], [], wanted[1] if wanted else None)[0]
        if server in ready:
            seen.add(server.recv(65536)[: RUN_LENGTH + NUMBER_LENGTH])
            received += 1
        if wanted and (len(seen) >= wanted[0] or not ready):
            say({"role": "udp-server", "received": received, "distinct": len(seen)})
            seen.clear()
            received, wanted = 0, None
        elif sys.stdin in ready:
            line = sys.stdin.readline().split()
            if not line:
                return
            wanted = (int(line[0]), float(line[1]))
