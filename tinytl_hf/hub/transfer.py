"""Adapters on the Hub: push one, pull one, find one by its name.

Only this file asks the Hub for adapters. Each failure becomes one line that ends with the command that
tries again; the adapter on the disk is never touched by it.
"""

from __future__ import annotations

import difflib
import filecmp
import functools
import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tinytl_hf.adapter.format import CARD_FILE, CONFIG_FILE, TENSORS_FILE, folder_named, read_config, read_tensors
from tinytl_hf.adapter.record import AdapterConfig
from tinytl_hf.config.hub import REPO_NAME, PullConfig, PushConfig
from tinytl_hf.disk import StrPath, write_together, writing
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.card import (
    ADAPTER_FILES,
    files_of_card,
    has_our_part,
    read_card,
    render_card,
    text_around,
    update_card,
    with_name,
)
from tinytl_hf.hub.card_words import dataset_name
from tinytl_hf.hub.failures import LOGIN, command, in_one_line, reason
from tinytl_hf.network.hub_weights import COMMIT
from tinytl_hf.network.weights import without_folder
from tinytl_hf.reports.run_folder import ADAPTER
from tinytl_hf.version import __version__

logger = logging.getLogger(__name__)

TIMM_FILES = ("config.json", "model.safetensors", CARD_FILE)  # of a model that timm loads
TIMM_EXAMPLES = ('"hf-hub:{}"', 'model="{}"')  # where the card of such a model has its name on the Hub
EXAMPLE_NAME = "user/name"  # which stands there until it has one
# What `from_pretrained` takes besides the arguments of a download.
LOADING = ("weights", "lean", "backend", "slice_mb", "gradient_checkpointing", "revision", "token")
# What a download is told here, and what gives no folder.
OURS = {"repo_id", "repo_type", "allow_patterns", "library_name", "library_version", "dry_run"}


def push(config: PushConfig, token: str | None = None) -> str:
    """Upload the files of an adapter, or of an exported timm model, in one commit, or in none if the Hub has them.

    Only the config, the tensors, the card and what the card refers to are uploaded. The card's example
    loads the adapter by its new name; what a person wrote into the card on the Hub stays.

    Args:
        config: What goes where.
        token: The Hub token; None: that of ``hf auth login`` or HF_TOKEN.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        TinyTLError: No adapter there, or the Hub cannot be reached or refuses, with the command to retry.
    """
    folder = _own_folder(folder_named("adapter", config.adapter))
    record = None if is_timm_model(folder) else read_config(folder)
    if record is not None:
        read_tensors(folder)
    what = "timm model" if record is None else f"{record.method} adapter for {record.backbone.name}"
    message = config.message or f"Upload {what}"
    with in_one_line(f"pushing {folder} to {config.repo}", command("push", config)):
        check_can_push(token)
        api = HfApi(token=token, library_name="tinytl_hf", library_version=__version__)
        _make_repo(api, config)
        revision = config.revision
        if revision is not None and revision != constants.DEFAULT_REVISION and not revision.startswith("refs/"):
            api.create_branch(config.repo, branch=revision, exist_ok=True)
        # Where another commit comes in between, the Hub refuses this one: it has the card as it was before.
        parent = api.model_info(config.repo, revision=revision).sha
        where = api, config.repo, parent
        files = _files_of_timm_model(folder, *where) if record is None else _changes(folder, record, *where)
        commit = api.create_commit(
            config.repo,
            files,
            commit_message=message,
            revision=revision,
            create_pr=config.create_pr,
            parent_commit=parent,
        )
    if config.create_pr and commit.pr_url is None:
        logger.warning("%s has these files already: no pull request was opened", config.repo)
    return commit.pr_url or commit.commit_url


def _make_repo(api: HfApi, config: PushConfig) -> None:
    """Make the repository, if there is none; one by a name that another had would cut that one's links."""
    try:
        there = api.model_info(config.repo)
    except RepositoryNotFoundError:
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        there = api.model_info(config.repo)
    if there.id.lower() != config.repo.lower():
        raise TinyTLError(f"repo={config.repo}: is called {there.id} now; name it so")
    if config.private and not there.private:
        raise TinyTLError("the repository is public already; make it private in its settings")


@contextmanager
def folder_to_push() -> Iterator[Path]:
    """A new folder that goes with the block, but where a push failed: its message says to try again from there."""
    folder = Path(tempfile.mkdtemp(prefix="tinytl-adapter-"))
    try:
        yield folder
    except TinyTLError:
        with suppress(OSError):  # unless nothing could be saved into it
            folder.rmdir()
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def pull(config: PullConfig) -> Path:
    """Download an adapter into a folder of its own.

    Raises:
        TinyTLError: No such adapter, a folder that holds other files, or a failure, with the command to retry.
    """
    with in_one_line(f"pulling {config.repo}", command("pull", config)):
        source = _download(config.repo, config.revision, None)
    output = Path(config.output)
    files = [source / name for name in ADAPTER_FILES if (source / name).is_file()]
    others = [file.name for file in files if _is_another(output / file.name, file)]
    if others and not config.overwrite:
        raise TinyTLError(
            f"output={output}: holds another {others[0]} already; name another folder, or replace what is there "
            "with --overwrite true"
        )
    with writing(f"output={output}", "name another folder"):
        former = files_of_card(read_card(output) or "") if others else []
        write_together({output / file.name: file.read_bytes() for file in files})
        for name in set(former) - {file.name for file in files}:  # of the adapter that was there
            (output / name).unlink(missing_ok=True)
    return output


def _is_another(path: Path, file: Path) -> bool:
    """Whether something else than ``file`` is at ``path``, be it a link that leads nowhere."""
    return os.path.lexists(path) and not (path.is_file() and filecmp.cmp(file, path, shallow=False))


def find_adapter(name: StrPath, revision: str | None = None, token: str | None = None, **options: Any) -> Path:
    """The folder of an adapter: a local one, or one that is downloaded by its name on the Hub.

    Args:
        name: A path, of a run too, or a name such as ``user/name``.
        revision: A branch, a tag or a commit on the Hub.
        token: The Hub token; None: that of ``hf auth login`` or HF_TOKEN.
        **options: Further ones of ``huggingface_hub.snapshot_download``, such as ``cache_dir``.

    Raises:
        TinyTLError: No such folder and no such adapter on the Hub, or a local folder with a revision.
    """
    _check_options(options)
    path, name = folder_named("adapter", name), os.fspath(name)
    if path.exists() or not REPO_NAME.fullmatch(name):
        if revision is not None:
            raise TinyTLError(f"revision={revision}: {name} is a path, and only names on the Hub have revisions")
        return _own_folder(path)
    retry = command("pull", PullConfig(repo=name, output=path.name, revision=revision))
    with in_one_line(f"{name} is no folder here, and loading it from the Hub failed", retry):
        return _download(name, revision, token, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise for an argument that is none of a download's: a slip, or one of another library."""
    known = inspect.signature(snapshot_download).parameters.keys() - OURS
    for name in options.keys() - known:
        if name in LOADING:
            hint = "another adapter has that of the model it is loaded into"
            raise TinyTLError(f"{name}={options[name]}: {hint}; leave it out")
        near = difflib.get_close_matches(name, [*LOADING, *known], n=1, cutoff=0.75)
        others = f"use {', '.join(LOADING)} or those of a download; move and cast what was loaded with model.to()"
        hint = f"did you mean {near[0]}?" if near else others
        raise TinyTLError(f"{name}={options[name]}: loading an adapter has no such argument; {hint}")


def _own_folder(folder: Path) -> Path:
    """The folder of an adapter, where that of a run can be given."""
    if (folder / CONFIG_FILE).exists() or not (folder / ADAPTER / CONFIG_FILE).is_file():
        return folder
    _say_is_run(folder)
    return folder / ADAPTER


@functools.cache  # once, though more than one look is taken
def _say_is_run(folder: Path) -> None:
    logger.info("%s is a run; its adapter is %s", folder, folder / ADAPTER)


def check_can_push(token: str | None = None) -> None:
    """Raise if a push cannot work, as far as this can be known without the network.

    Raises:
        TinyTLError: No token, or the client is offline by choice.
    """
    if constants.is_offline_mode():
        raise TinyTLError("HF_HUB_OFFLINE is set; unset it")
    if token is None and get_token() is None:
        raise TinyTLError(f"no Hub token; {LOGIN}")


def is_timm_model(folder: Path) -> bool:
    """Whether a folder is no adapter but what ``tinytl-hf export --format timm`` writes."""
    return not (folder / CONFIG_FILE).exists() and all((folder / name).is_file() for name in TIMM_FILES)


def _files_of_timm_model(folder: Path, api: HfApi, repo: str, commit: str | None) -> list[CommitOperationAdd]:
    """What a push of an exported timm model uploads: its card loads it by its new name."""
    if api.file_exists(repo, CONFIG_FILE, revision=commit):
        raise TinyTLError(
            f"repo={repo}: holds an adapter, whose card that of a timm model would replace; name another repository"
        )
    card = read_card(folder) or ""
    for example in TIMM_EXAMPLES:
        card = card.replace(example.format(EXAMPLE_NAME), example.format(repo))
    if (there := _card_there(api, repo, commit)) is not None:
        card = _with_what_is_there(card, there)
    files = [CommitOperationAdd(name, folder / name) for name in TIMM_FILES if name != CARD_FILE]
    return [*files, CommitOperationAdd(CARD_FILE, card.encode())]


def _changes(
    folder: Path, record: AdapterConfig, api: HfApi, repo: str, commit: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a push of an adapter uploads, and what it removes of one that was there."""
    card, there = read_card(folder), _card_there(api, repo, commit)
    if card is None:  # taken away; the one on the Hub would tell of the adapter that was there
        card = render_card(record)
    if there is not None:
        if all(example.format(repo) in there for example in TIMM_EXAMPLES):
            raise TinyTLError(
                f"repo={repo}: holds a timm model that tinytl-hf exported, whose card says nothing of an "
                "adapter; name another repository"
            )
        card = _with_what_is_there(card, there)
    names = [TENSORS_FILE, *(name for name in files_of_card(card) if (folder / name).is_file())]
    operations = [CommitOperationAdd(CONFIG_FILE, without_paths(record).to_json().encode())]
    operations += [CommitOperationAdd(name, folder / name) for name in names]
    if card:
        operations.append(CommitOperationAdd(CARD_FILE, with_name(card, repo).encode()))
    former = [name for name in files_of_card(there or "") if name not in names]  # of an adapter that this one replaces
    gone = [name for name in former if api.file_exists(repo, name, revision=commit)]
    return [*operations, *(CommitOperationDelete(name) for name in gone)]


def _with_what_is_there(card: str, there: str) -> str:
    """The card of this folder for a repository that has one, with what a person wrote into either.

    Where both have text around ours, that of this folder is taken: the Hub keeps the other in its history.
    """
    text, text_there = text_around(card), text_around(there)
    if not text and text_there and not has_our_part(there):
        logger.warning(
            "README.md on the Hub stays as it is: it is not of this package; remove it there to get the card here"
        )
    if text and text_there and not (text in text_there or text_there in text):
        logger.warning(
            "README.md on the Hub has text that the card here has not; it is replaced by that of the card here, and "
            "stays in the repository's history"
        )
    if not text or text in text_there:
        return update_card(there, card)
    merged = update_card(there, card)
    return update_card(card, merged) if has_our_part(merged) else card


def without_paths(config: AdapterConfig) -> AdapterConfig:
    """The adapter's config as others may read it: it does not say where things lie on this disk."""
    if config.data is not None:
        config = replace(config, data=replace(config.data, dataset=dataset_name(config.data)))
    return replace(config, backbone=replace(config.backbone, weights=without_folder(config.backbone.weights)))


def _card_there(api: HfApi, repo: str, commit: str | None) -> str | None:
    try:
        path = api.hf_hub_download(repo, CARD_FILE, revision=commit)
    except RemoteEntryNotFoundError:
        return None
    return read_card(Path(path).parent)


def _download(repo: str, revision: str | None, token: str | None, **options: Any) -> Path:
    """The Hub's folder of an adapter in the client's cache; nothing but an adapter's files is fetched.

    Where the Hub does not say what the newest commit is, the client takes the one that it has; then a warning says so.
    """
    refusal = None if options.get("local_files_only") else _refusal(repo, revision, token, options)
    if refusal is not None:
        options["local_files_only"] = True  # it was asked already, and need not be waited for again
    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*ADAPTER_FILES],
                token=token,
                library_name="tinytl_hf",
                library_version=__version__,
                **options,
            )
        )
    except LocalEntryNotFoundError:
        if refusal is None:
            raise
        raise refusal from None
    if not (folder / CONFIG_FILE).is_file():  # of a push, the cache has the card alone
        raise refusal or TinyTLError(f"the repository is no TinyTL adapter: it has no {CONFIG_FILE}")
    if refusal is not None and not constants.is_offline_mode():
        _say_is_of_cache(repo, folder.name[:7], reason(refusal))
    try:
        read_config(folder)
        read_tensors(folder)
    except TinyTLError as error:
        remedy = f"if the copy in the cache is damaged, remove it with: hf cache rm model/{repo}"
        raise TinyTLError(f"{error}; {remedy}") from error
    return folder


@functools.cache  # once, though a command can look for its adapter more than once
def _say_is_of_cache(repo: str, commit: str, why: str) -> None:
    logger.warning("%s: %s; taken from the cache, as of commit %s", repo, why, commit)


def _refusal(repo: str, revision: str | None, token: str | None, options: Mapping[str, Any]) -> Exception | None:
    """Why the Hub does not say which commit ``revision`` is, if it does not."""
    if revision is not None and COMMIT.fullmatch(revision):
        return None  # a commit is what it is
    asked = {name: options.get(name) for name in ("endpoint", "headers")}
    api = HfApi(token=token, library_name="tinytl_hf", library_version=__version__, **asked)
    try:
        api.model_info(repo, revision=revision)
    except RevisionNotFoundError:
        raise
    except (httpx2.HTTPError, OSError) as error:
        return error
    return None
