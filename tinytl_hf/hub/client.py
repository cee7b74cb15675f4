"""How long the command line waits for the Hub."""

from __future__ import annotations

import time
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

TIMEOUT_S = 30.0
TRIES, PAUSE_S = 3, 0.5  # to connect


class HubUnreachableError(OfflineModeIsEnabled):
    """No connection to the Hub: its client then looks into its cache, as where it is offline by choice.

    Of a connection that failed it would try five times more, with 23 s of waiting, before it did so.
    """


def bound_waiting() -> None:
    """Let this process's client of the Hub give up after ``TIMEOUT_S`` without an answer; else it waits for ever.

    Without a connection it gives up after ``TRIES``. For the command line: a program that has this package as a
    library has a client of its own making.
    """
    set_client_factory(_patient_client)


class _Client(httpx2.Client):
    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        for _ in range(TRIES - 1):
            try:
                return super().send(request, **options)
            except httpx2.ConnectError:
                time.sleep(PAUSE_S)
        try:
            return super().send(request, **options)
        except httpx2.ConnectError as error:
            raise HubUnreachableError(str(error)) from error


def _patient_client() -> httpx2.Client:
    with default_client_factory() as client:
        hooks = client.event_hooks
    hooks = {**hooks, "request": [*hooks["request"], _bound]}
    return _Client(event_hooks=hooks, follow_redirects=True, timeout=httpx2.Timeout(TIMEOUT_S))


def _bound(request: httpx2.Request) -> None:
    """Bound a request that says of itself that it waits for ever."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {kind: limit or TIMEOUT_S for kind, limit in limits.items()}
