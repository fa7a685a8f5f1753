"""Run the README's two commands on a host whose own kernel has ESP; they must not change its state.

    python -m tests.host [--kernel uml|qemu] [--timeout S] [--results DIR] [COMMAND ...]

The host is user-mode-linux, or Debian's kernel under QEMU, which takes many hours. Its process 1 is
systemd, on this machine's files (read-only, with a layer in memory above). It has an IKE daemon
with an SA, policies, rules, routes, and a cgroup with a process that its own ipsecgate gates. Its
state is recorded (`state`) before and after each command, and must be equal.

    machine     boots the host, runs the commands, returns the states
    host-init   the last steps before systemd: the host's units and configuration
    state       records the state, inside the host
    __main__    runs all this, and compares the states
"""
