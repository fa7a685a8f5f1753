"""The edges: one outside library or kernel interface each, and no decisions."""
