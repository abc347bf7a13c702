"""What is timed: the published loop and a tuned one, our engine, and what each technique adds."""
