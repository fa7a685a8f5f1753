"""A fleet of hosts with a real systemd, to try packaging/ansible: `make fleet-test`.

`hosts` boots them, `app.py` is the gated service of each, and `__main__` rolls out, breaks things
and judges. It needs no ESP: no host has an SA, so what must be protected is refused, or would be.
"""
