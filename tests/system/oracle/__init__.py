"""An oracle: what does the kernel do with a flow, and does the gate say the same?

    generate  a random SPD and SAD, and random calls, from a seed      -> World
    wire      install them, by netlink messages of its own
    namespaces       namespaces, a veth, a cgroup with the real hooks on it, and two callers
    caller    the process that makes the calls: one copy gated, one free
    capture   what came out at the other end of the veth, call by call
    model     what the kernel's rules make of a call, read naively: which limit explains
              a gate that is stricter, and whether the kernel itself surprises us
    judge     all of it together; the first wrong answer, shrunk

Nothing of the gate's own idea of XFRM (its codec, its SPD, its tables) is used for the kernel's
side: neither to install, nor to see, nor to explain.

    python -m tests.system.oracle      100,000 calls, or ORACLE_CASES; ORACLE_SEED repeats
"""
