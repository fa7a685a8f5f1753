"""The short-lived work of the command line: load and attach the hooks, status, check."""
