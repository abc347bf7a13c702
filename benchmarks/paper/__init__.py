"""What the images are for, as in the tables of the paper."""
