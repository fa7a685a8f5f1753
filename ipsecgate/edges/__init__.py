"""The edges: one package for each interface to the outside.

An edge keeps its own protocol working: it retries, resyncs and rejects what it cannot read. What
happens to a flow is decided in core; no edge may import `core.gate` (tests/unit/test_imports.py).

    host         configuration, saved state, cgroups, systemd, the control socket
    bpf          the hooks and their maps
    kernel       netlink: XFRM, routes, sockets
    strongswan   VICI
    holding      seccomp listeners and the inspector processes
"""
