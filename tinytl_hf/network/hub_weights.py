"""Weights of a backbone on the Hub: safetensors and a model's config, pinned to a commit; never a pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from tinytl_hf.errors import TinyTLError
from tinytl_hf.version import __version__

HUB = "hf-hub:"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SOURCE = re.compile(r"hf-hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")  # of a download, which callers may give


def fetch(source: str, file: str = WEIGHTS_FILE, **options: Any) -> Path:
    """A file of the repository that ``source`` names, out of the client's cache or downloaded into it.

    Args:
        source: ``hf-hub:user/repo`` or ``hf-hub:user/repo@revision``.
        file: Its name there.
        **options: Those of ``OPTIONS`` are handed to ``huggingface_hub.hf_hub_download``.

    Raises:
        TinyTLError: No such name, or the file is neither in the cache nor to be had; says which file to bring.
    """
    found = SOURCE.fullmatch(source)
    if found is None:
        raise TinyTLError(f"{source}: use {HUB}user/repo or {HUB}user/repo@revision")
    repo, revision = found["repo"], found["revision"]
    known = {name: value for name, value in options.items() if name in OPTIONS}
    try:
        path = hf_hub_download(
            repo, file, revision=revision, library_name="tinytl-hf", library_version=__version__, **known
        )
    except (httpx2.HTTPError, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        at = f" --revision {revision}" if revision else ""
        raise TinyTLError(
            f"{source}: {_reason(error, file)}; where there is a network, `hf download {repo} {file}{at}` brings it "
            f"into the cache, or name a copy of the file with --backbone.weights path/to/{WEIGHTS_FILE} (weights=)"
        ) from error
    return Path(path)


def is_cached(repo: str) -> bool:
    """Whether the weights of a repository's main branch are in the client's cache."""
    return isinstance(try_to_load_from_cache(repo, WEIGHTS_FILE), str)


def pinned(source: str, path: Path) -> str:
    """``source`` with the commit that :func:`fetch` found ``path`` at, so that a later load gets the same bytes."""
    found = SOURCE.fullmatch(source)
    commit = path.parent.name  # of the cache's snapshots/COMMIT/FILE
    return source if found is None or not COMMIT.fullmatch(commit) else f"{HUB}{found['repo']}@{commit}"


def _reason(error: Exception, file: str) -> str:
    if constants.is_offline_mode() or isinstance(error, LocalEntryNotFoundError):
        return f"{file} is not in the cache ({constants.HF_HUB_CACHE}), and the Hub cannot be asked"
    if isinstance(error, EntryNotFoundError):
        return f"the repository has no {file}, and nothing else is read from there"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{file} cannot be had from the Hub ({' '.join(lines[:2])[:200] or type(error).__name__})"
