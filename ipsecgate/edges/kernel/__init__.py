"""The kernel over netlink: XFRM, routes, sockets."""
