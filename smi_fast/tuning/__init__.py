"""What suits this machine: measured, kept, estimated; and `settings`, which decides from that and what was asked."""
