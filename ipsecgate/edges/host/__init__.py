"""The machine: configuration, saved state, cgroups, systemd, control socket and file systems.

This package validates what it reads. Core decides what a valid configuration means for a flow.
"""
