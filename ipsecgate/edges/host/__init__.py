"""The machine: configuration, cgroups, systemd, sockets and files."""
