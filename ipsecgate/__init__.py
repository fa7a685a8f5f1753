"""ipsecgate."""
