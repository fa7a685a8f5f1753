"""Held calls: seccomp listeners, and the processes that inspect what a held call asks for.

Core decides which call is held and how it is answered. What cannot be inspected goes on unheld, to
the hooks.
"""
