"""A hub on real ESP: hundreds of sites and thousands of road warriors loaded, some of them up.

    tunnels     the connections, of mixed prefix lengths, from a seed
    world       two hosts, the gate, the senders; reads the capture and the senders' reports
    changes     rekeys, deletions and ends of tunnels, under traffic
    closing     how long after the deletion of an SA its flows are refused
    closer      the process that deletes and sends
    run         all of it in turn; the table

Host a is the hub. Host b stands for all peers: it has an address for each tunnel that is up. The
evidence is that of `tests.chaos`: the capture between the hosts, the kernel's events, and what
system calls return.
"""
