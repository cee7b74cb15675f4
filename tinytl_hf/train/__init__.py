"""The training run, from its options to a finished folder."""
