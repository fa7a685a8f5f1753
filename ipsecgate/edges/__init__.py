"""The edges: one outside library or kernel interface each, and no decisions.

`libbpf`, `pins`, `maps`, `datapath`, `bytecode`, `compiler`: the hooks.
`xfrm`, `routes`: the kernel, over `netlink`. `ike`: strongSwan, over `vici`.
`config`, `memory`, `cgroups`, `mounts`, `control`, `systemd`, `probe`: the host.
"""
