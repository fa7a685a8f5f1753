"""The kernel over netlink: XFRM, the host floor, routes and sockets.

This package keeps core up to date and carries out its commands. Only core decides whether a flow is
protected.
"""
