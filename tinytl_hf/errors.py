"""The two exceptions whose messages are meant for the person at the keyboard."""


class TinyTLError(ValueError):
    """Bad input: the message names the thing, the value found and the fix."""


class Interrupted(Exception):
    """The run was asked to stop and has saved a checkpoint.

    Attributes:
        exit_code: 128 plus the signal's number, as shells expect.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
