"""Files, run folders, and what is known of the machine."""
