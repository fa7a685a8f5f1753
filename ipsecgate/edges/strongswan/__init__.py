"""strongSwan over VICI: what it has loaded and established, and the commands that it takes.

Only core decides which child to negotiate or terminate, and when to try again.
"""
