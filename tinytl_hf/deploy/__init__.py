"""What a finished adapter is for: labels of images, one file of weights."""
