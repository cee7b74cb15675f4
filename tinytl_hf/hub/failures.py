"""What the Hub's client raises, as one line: what was done, what went wrong, how to mend it, how to retry."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tinytl_hf.config.hub import PullConfig, PushConfig
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub import client

# What the client raises: the last is for an argument of another type.
FAILURES = (httpx2.HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError, KeyError, TypeError)
LOGIN = "run `hf auth login` or set HF_TOKEN"


@contextmanager
def in_one_line(what: str, retry: str) -> Iterator[None]:
    """Turn a failure into one line: what was done, what went wrong, how to mend it, how to retry."""
    try:
        yield
    except (TinyTLError, *FAILURES) as error:
        why = str(error) if isinstance(error, TinyTLError) else reason(error)
        raise TinyTLError(f"{what}: {why}; then retry with: {retry}") from error


def reason(error: Exception) -> str:
    """What went wrong and how to mend it, of an error of the Hub's client."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled) and not isinstance(error, client.HubUnreachableError):
        return "HF_HUB_OFFLINE is set and the adapter is not in the cache; unset it"
    if isinstance(error, GatedRepoError):
        return f"the repository is gated; ask for access on its page, and {LOGIN} with a token of who has it"
    if isinstance(error, DisabledRepoError):
        return "the repository is disabled (403); its page says why"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision (404); name a branch, a tag or a commit that it has"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one (404); check the name, and {LOGIN} with a token that can read it"
    if isinstance(error, HfHubHTTPError):
        return _answer(error.response.status_code, error)
    if isinstance(error, httpx2.TimeoutException):
        return f"{constants.ENDPOINT} did not answer in {client.TIMEOUT_S:g} s; check the network"
    if isinstance(error, (httpx2.HTTPError, ConnectionError)):
        return f"{constants.ENDPOINT} cannot be reached ({_first_two_lines(error)}); check the network"
    return f"{_first_two_lines(error)} ({type(error).__name__})"


def _answer(status: int, error: HfHubHTTPError) -> str:
    if status == 401:
        return f"the Hub does not know the token (401); {LOGIN} with a valid one"
    if status == 403:
        said = f"{message}; " if (message := error.server_message) else ""
        return f"the token has no right to that (403); {said}use one that has it, or a namespace of your own"
    if status == 429:
        return "too many requests (429); wait some minutes"
    if status >= 500:
        return f"the Hub has a server error ({status}); wait a little"
    return f"the Hub answered {status}: {error.server_message or _first_two_lines(error)}"


def _first_two_lines(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def command(verb: str, config: PushConfig | PullConfig) -> str:
    """The command that does what this config says."""
    words = ["tinytl-hf", verb]
    for key, value in vars(config).items():
        if value is True:
            words.append(f"--{key}")
        elif value:
            words += [f"--{key}", str(value)]
    return shlex.join(words)
