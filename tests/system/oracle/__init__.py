"""An oracle: the gate's verdict on a flow must agree with what the kernel does.

    generate  a random SPD and SAD, and random calls, from a seed      -> World
    wire      install them, by netlink messages of its own
    topology  a VRF, VTIs, XFRM interfaces and random routes into them; where the kernel sends
    container a namespace whose packets the host forwards, and translates in some worlds
    two_namespaces   the rest: a veth, a cgroup with the real hooks on it, and two callers
    caller    the process that makes the calls: one copy gated, one free
    capture   the packets at the other end of the veth, call by call
    model     a naive reading of the kernel's rules: which documented limit explains a stricter
              gate, and whether the kernel did something that its rules do not allow
    judge     the comparison; it shrinks the first wrong answer

The kernel's side (installing, capturing, explaining) uses nothing of the gate's own model of XFRM:
not its codec, its SPD or its tables, and not what it makes of routes and NAT rules.

    python -m tests.system.oracle      100,000 calls, or ORACLE_CASES; ORACLE_SEED repeats
"""
