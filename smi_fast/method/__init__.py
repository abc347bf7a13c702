"""What is optimised, and on which patches: priors, strategies, and the objective that is made of them."""
