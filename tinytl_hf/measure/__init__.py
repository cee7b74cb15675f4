"""What is measured of a model: accuracy, training memory, speed."""
