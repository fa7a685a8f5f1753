"""What all tests share."""

from hypothesis import settings

# Shared machines are noisy: no test may fail for taking long.
settings.register_profile("ipsecgate", deadline=None)
settings.load_profile("ipsecgate")
