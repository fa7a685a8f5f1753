"""Held system calls: seccomp listeners, container runtimes, and who reads the callers' memory."""
