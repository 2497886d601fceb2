"""The method (docs of each equation inside), on tensors and modules: no files, no printing, no global state."""
