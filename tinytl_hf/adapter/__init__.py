"""The delta on disk and off it: which tensors it is, its folder, and several of them over one backbone."""
