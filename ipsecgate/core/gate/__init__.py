"""The decisions: events in, commands out.

    event -> Gate.step -> Protection     which flows a live SA protects; the SPD table
                       -> PolicyTable    which flows must be protected; the POLICY table
                       -> Ike            what the daemon has loaded
                       -> Demand         flow -> policy -> child -> Negotiations
                       -> Holds          the calls that wait for an SA
                       -> Propagation    what a change means for the others
                       -> commands

Data flows one way: a component gets its input as arguments, and returns commands or an `Outcome`
that the caller passes on. None has a reference to its caller.
"""
