"""Networks, and what they are told."""
