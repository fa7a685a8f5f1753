"""The IKE daemon, over VICI."""
