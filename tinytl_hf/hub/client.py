"""How long the command line waits for the Hub."""

from __future__ import annotations

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

TIMEOUT_S = 30.0


def bound_waiting() -> None:
    """Let this process's client of the Hub give up after ``TIMEOUT_S`` without an answer; else it waits for ever.

    For the command line: a program that has this package as a library has a client of its own making.
    """
    set_client_factory(_patient_client)


def _patient_client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = httpx2.Timeout(TIMEOUT_S)
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], _bound]}
    return client


def _bound(request: httpx2.Request) -> None:
    """Bound a request that says of itself that it waits for ever."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {kind: limit or TIMEOUT_S for kind, limit in limits.items()}
