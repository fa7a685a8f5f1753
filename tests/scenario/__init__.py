"""Five hosts, each with one mistake: can a stranger with the README and `--help` find it?

`faults` has the mistakes, `host` runs in the guest, and the command line starts a host and runs
commands on it. Whoever investigates must not read these files.
"""
