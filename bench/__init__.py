"""Measurements, side by side in one run: ratios and medians, never a pass or a fail."""
