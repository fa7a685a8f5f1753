"""ipsecgate: no packet leaves an application towards a protected peer before IPsec is ready.

One refused connection, through the house in one direction:

    bpf/gate.bpf.c          the hook refuses connect() or sendto(): EPERM, no packet exists
      -> edges.datapath     its ring record becomes an event, FlowRefused
      -> core.gate          which CHILD_SA would protect the flow? one Initiate
      -> edges.ike          strongSwan negotiates over VICI
      -> edges.xfrm         the kernel tells of the SA and of the policy that wins
      -> core.gate          SPD joined with SAD: the flow is live, SetEntry or Publish
      -> edges.datapath     one write, and the next attempt proceeds, inside ESP

A held call comes the same way: edges.listeners tells of it before the kernel carries it out,
and answers it after that one write. What it asks for stands in its caller's memory, which may
keep whoever looks waiting: edges.looker has a process of its own look, edges.looking. Where
strongSwan does ESP itself, edges.ike tells of the SA, and edges.routes whether the flow is
sent into its tunnel.

`core` decides and touches nothing; `edges` touch one thing each and decide nothing;
`controller` carries events in and commands out, with the modules beside it for hands (`kernel`,
`daemon`, `hooks`, `targets`, `reload`, `service`, `journal`); `cli` is for people; `lab` is two
hosts with real IKE for the demo and the tests.
"""
