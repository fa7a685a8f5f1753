"""The lab's servers: they count the connections or datagrams that reach them."""

from __future__ import annotations

import os
import select
import socket
import sys

from ipsecgate.lab.options import NUMBER_LENGTH, RUN_LENGTH, Options, new_socket, say

RECEIVE_BUFFER = 4 << 20


def listener(options: Options, kind: int) -> socket.socket:
    """Bind a server's socket; :: includes IPv4."""
    sock = new_socket(kind, options.bind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if options.bind == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((options.bind, options.port))
    return sock


def tcp_server(options: Options) -> None:
    """Echo the data of each connection. Each input line: report, then reset the count."""
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
    """Echo pending data on one connection, or close it at its end."""
    try:
        data = peers[fd].recv(65536)
        if data:
            peers[fd].sendall(data)
            return
    except OSError:
        pass
    # Closing also removes it from the epoll set.
    peers.pop(fd).close()


def udp_server(options: Options) -> None:
    """Count datagrams: `received` is all, `distinct` those with a different run id and number.

    Input line "N S": report once N distinct ones have arrived, or S seconds after the last one;
    then reset the counts.
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
        if sys.stdin in ready:
            line = sys.stdin.readline().split()
            if not line:
                return
            wanted = (int(line[0]), float(line[1]))
        if wanted and (len(seen) >= wanted[0] or not ready):
            say({"role": "udp-server", "received": received, "distinct": len(seen)})
            seen.clear()
            received, wanted = 0, None
