"""What the method asks of a model: one file for each family, the catalog of names, and how any model is loaded."""
