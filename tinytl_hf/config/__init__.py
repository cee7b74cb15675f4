"""Every option of the command line as a field of a frozen dataclass."""
