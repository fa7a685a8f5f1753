"""The domain's types: flows, IPsec's databases, the operator's policies, and events."""
