"""A laboratory on one machine: two hosts with real IKE and ESP, and a kernel that has ESP."""
