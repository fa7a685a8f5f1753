"""What the kernel and the IKE daemon have now, and which flows that protects."""
