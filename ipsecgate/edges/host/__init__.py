"""The machine: configuration, saved state, cgroups, systemd, control socket and file systems.

This room validates what it reads. What a valid configuration means for a flow is core's to decide.
"""
