"""The hooks' tables: the layout of their maps, and rules compiled into masks and entries."""
