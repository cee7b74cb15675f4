"""What goes to the Hub and comes from it, as frozen dataclasses: options of a run and of two verbs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tinytl_hf.config.check import check, check_text, check_types, expand_paths

REPO_NAME = re.compile(r"(?!.*(\.\.|--|\.git$))\w[\w.-]{0,95}/\w[\w.-]{0,95}(?<![.-])", re.ASCII)


@dataclass(frozen=True)
class HubConfig:
    """What goes to the Hub once a run is finished and on the disk."""

    push: bool = False
    """Push the run's adapter at the end, with the token of `hf auth login` or HF_TOKEN."""
    repo: str | None = None
    """Name of the repository on the Hub, as user/name; it is made if there is none."""
    private: bool = False
    """Make the repository a private one."""

    def __post_init__(self) -> None:
        check_types(self, "hub.")
        check(not self.push or self.repo is not None, "hub.push", self.push, "say where to, as --hub.repo user/name")
        if self.repo is not None:
            _check_repo("hub.repo", self.repo)


@dataclass(frozen=True)
class PushConfig:
    """Push an adapter to the Hub, in one commit."""

    adapter: str
    """Folder of the adapter, or of the run that made it."""
    repo: str
    """Name of the repository on the Hub, as user/name; it is made if there is none."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """Branch to push to, made if there is none; null: main."""
    create_pr: bool = False
    """Open a pull request with the commit."""
    message: str | None = None
    """Message of the commit; null: what the adapter is."""

    def __post_init__(self) -> None:
        expand_paths(self, "adapter")
        check_types(self)
        _check_repo("repo", self.repo)
        fits = not self.create_pr or self.revision in (None, "main")
        check(fits, "revision", self.revision, "a pull request is against main; leave one of the two out")


@dataclass(frozen=True)
class PullConfig:
    """Download an adapter from the Hub into a folder."""

    repo: str
    """Name of the repository on the Hub, as user/name."""
    output: str
    """Folder to write to."""
    revision: str | None = None
    """Branch, tag or commit; null: main."""
    overwrite: bool = False
    """Replace another adapter that the folder holds."""

    def __post_init__(self) -> None:
        expand_paths(self, "output")
        check_types(self)
        check_text("output", self.output)
        _check_repo("repo", self.repo)


def _check_repo(key: str, repo: str) -> None:
    check(REPO_NAME.fullmatch(repo) is not None, key, repo, "use a name on the Hub, as user/name")
