"""Nothing gets out: faults by the thousand, under traffic, with a capture between the hosts.

    speaker   a gated process that speaks all the time, in every way there is
    waiter    another, whose calls are held; `waiting` judges it
    world     two hosts, the gate, the witnesses; sees what leaked and what was refused
    bed       makes it
    tally     counts it, and knows from the kernel's events what was covered when
    fault     what a fault is; faults_gate, -kernel, -operator, -scarce: those there are
    run       the faults in turn, from a seed; the table
    hammer    connect() without a pause, while what is pinned is loaded, upgraded, published
    lives     the same for a whole gate that is killed, ended, reloaded
    soak      thousands of rekeys, and what the controller holds meanwhile

Rules: the gate's own word counts for nothing. What left is the capture's, what was covered is
the kernel's, what an application met is what its system calls returned.
"""
