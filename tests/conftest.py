"""Settings for all tests."""

import signal

from hypothesis import settings

# On a shared machine timing is unreliable: no test may fail because it is slow.
settings.register_profile("ipsecgate", deadline=None)
settings.load_profile("ipsecgate")

# A shell makes its background jobs ignore SIGINT, and our child processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
