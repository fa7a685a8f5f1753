"""What netfilter's rules make of a packet's addresses."""
