"""Measurements with and without the gate in one run: ratios and medians, without pass or fail."""
