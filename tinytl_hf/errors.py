"""The one exception whose message is meant for the person at the keyboard."""


class TinyTLError(ValueError):
    """Bad input: the message names the thing, the value found and the fix."""
