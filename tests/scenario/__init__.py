"""Six hosts, five of them with one mistake: does a stranger find it with README and `--help`?

`faults` has the mistakes, `host` runs in the guest, and the command line starts a host and runs
commands on it. Whoever investigates must not read these files.
"""
