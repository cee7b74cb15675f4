"""Backbones, their blocks, norms and head, lite residuals, and which of it all trains."""
