"""The SAs and policies that the kernel and the IKE daemon have, and the flows they protect."""
