"""A laboratory on one machine: two hosts with real IKE and ESP, on a kernel that has ESP."""
