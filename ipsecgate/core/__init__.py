"""The pure core: domain types, codecs, tables and decisions, without I/O.

It opens no socket or file and reads no clock: inputs arrive as events (model/events.py), and
actions leave as commands (gate/commands.py). tests/unit/test_imports.py allows it only those parts
of the standard library that cannot reach outside the process.

    model    flows, SAs, policies, events
    codec    bytes to values and back: netlink, VICI, seccomp, OCI
    tables   the hooks' maps, and rules compiled into them
    state    what the kernel and the IKE daemon have, and which flows that protects
    check    what `check` found, judged
    gate     the decisions: events in, commands out
"""
