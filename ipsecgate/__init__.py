"""ipsecgate: no packet leaves an application towards a protected peer before IPsec is ready.

One refused connection goes through the code in one direction:

    bpf/gate.bpf.c             the hook refuses connect() or sendto() with EPERM; no packet exists
      -> edges/bpf             a ring record becomes an event, FlowRefused
      -> core/gate             finds the CHILD_SA that would protect the flow: one Initiate
      -> edges/strongswan      strongSwan negotiates over VICI
      -> edges/kernel          XFRM notifications: the new SA, and the policy that uses it
      -> core/state            SPD joined with SAD: the flow is protected
      -> core/gate             Change or Publish
      -> edges/bpf             entries, then the one write that puts them in force; the next
                               attempt proceeds, inside ESP

A held call takes the same way. `edges/holding` reports it before the kernel carries it out, and
answers it after that write.

    core         decides, and touches nothing outside
    edges        touch one outside thing each; no edge decides what happens to a flow
    controller   the long-lived process: carries events in and commands out
    admin        the short-lived work: load, attach, status, check
    cli          the commands that people type
    lab          two hosts with real IKE and ESP, for the demo and the tests

docs/architecture.md has the walk in full, by file and function.
"""
