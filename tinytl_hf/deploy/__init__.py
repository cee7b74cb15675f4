"""What a finished adapter is for: labels of images, one file of weights, models for other runtimes."""
