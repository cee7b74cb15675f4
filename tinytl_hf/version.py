"""The version of the package, and of the adapter format it writes."""

__version__ = "0.1.0"
