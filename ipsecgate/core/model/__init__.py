"""The domain's types: flows, SPD and SAD, the operator's policies, and events."""
