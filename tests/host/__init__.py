"""A host whose own kernel has ESP: the README's two commands on it, and its state as it was.

    python -m tests.host [--timeout S] [--results DIR] [COMMAND ...]

Debian's kernel under QEMU with systemd as process 1, on this machine's files (read-only, a layer
in memory above). The host has an IKE daemon with an SA of its own, policies, rules, routes, a
cgroup with a process, gated by an ipsecgate of its own. Before and after each command all of that
is written down (`state`), and must be equal.

    machine     boots it, runs the commands, hands the states out
    host-init   the last steps before systemd: the host's own units and configuration
    state       what is written down, inside the host
    __main__    the order of things, and the judgement
"""
