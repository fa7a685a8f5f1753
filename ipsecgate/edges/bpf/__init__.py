"""The hooks: compiled, loaded and pinned; their maps read and written through libbpf.

Core decides what the tables hold; this package carries it into the kernel.
"""
