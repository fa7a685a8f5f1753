"""What the hooks search: their maps' layout, and rules compiled into tables."""
