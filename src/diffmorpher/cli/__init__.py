"""The command line: `diffmorpher morph` and its like. Thin: what a film is made of is in the recipe."""
