"""From a data set's name or path to batches of pixels."""
