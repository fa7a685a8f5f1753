"""What all tests share."""

import signal

from hypothesis import settings

# Shared machines are noisy: no test may fail for taking long.
settings.register_profile("ipsecgate", deadline=None)
settings.load_profile("ipsecgate")

# A shell has what it starts in the background ignore this, and so would all that we start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
