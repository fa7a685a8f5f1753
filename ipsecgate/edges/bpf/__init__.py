"""The hooks: compiled, loaded, pinned, and their maps read and written through libbpf."""
