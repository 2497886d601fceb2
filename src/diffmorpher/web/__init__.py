"""The page of `diffmorpher web`. It knows nothing of the command line."""
