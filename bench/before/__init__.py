"""What the hooks and the core's tables cost before they took any number of selector shapes."""
