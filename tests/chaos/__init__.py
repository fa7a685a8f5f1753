"""Prove that no packet leaks: a thousand faults under traffic, with a capture between the hosts.

    sender        a gated process that sends all the time, in every possible way
    held_sender   another one, whose calls are held; `held_calls` judges them
    targets       the connections and what the senders send to
    world         two hosts and the gate; reads the capture and the senders' reports
    build_world   builds it
    tally         counts everything, and knows from the kernel's events when what was covered
    fault         what a fault is; faults_gate, _kernel, _operator, _scarce: the faults
    fault_tools   what faults are made of; scarce: limits on descriptors, disk and memory
    run           the faults in turn, from a seed; the table
    hammer        connect() without pause while the hooks are loaded, upgraded and published
    restarts      the same for a whole gate that is killed, stopped and reloaded
    soak          thousands of rekeys, and the resources that the controller holds meanwhile

Rules: nothing that the gate itself reports counts as evidence. The capture shows what left, the
kernel's events show what was covered, and system calls show what an application got.
"""
