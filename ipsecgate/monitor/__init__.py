"""Watch a gate from outside: metrics for Prometheus, and the live view `top`.

It reads what `ipsecgate status` reads, so it works without a controller, and the controller imports
nothing of it.
"""
