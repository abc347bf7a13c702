"""What experiments share: arguments, timing, worker processes, results, tables, models, and our engine's insides."""
