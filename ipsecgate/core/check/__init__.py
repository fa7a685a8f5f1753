"""The judgement of `ipsecgate check`: from what was found on a host to what is wrong with it."""
