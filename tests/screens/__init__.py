"""`make screens`: every screen of the CLI, recorded on a real gate and drawn as pictures.

The first step runs in the guest, where `world` brings a gate into a telling state with real IKE and
real ESP, and `recording` runs each command of `catalogue` in a terminal of 80 and of 140 columns.
The second step, `pictures`, draws what was recorded. Nothing is edited in between.
"""
