"""The command line: ``tinytl-hf train | eval | predict | merge | export | memory | bench | ...``.

Every option is a field of a dataclass; a YAML file given with ``--config`` comes first and what is on
the command line wins. A mistake ends with one line; ``--debug`` shows where it was raised.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_dumper, set_loader, set_parsing_settings

from tinytl_hf.commands import PROG, VERBS, is_main_process, shown
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.hub import HubConfig
from tinytl_hf.config.numbers import check_numbers
from tinytl_hf.config.run import Config, MemoryConfig
from tinytl_hf.config.train import TrainConfig
from tinytl_hf.config.yaml12 import dump_yaml, load_yaml
from tinytl_hf.errors import Interrupted, Terminated, TinyTLError
from tinytl_hf.explained import explained
from tinytl_hf.version import __version__

VARIABLE = re.compile(r"^\$\w+|\$\{\w+\}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no name of a file or a class ends a command
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            with _clearing_up_when_terminated():
                _main(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:  # as it is where it was closed from the start
                sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell counts the signal that ends other programs here


@contextmanager
def _clearing_up_when_terminated() -> Iterator[None]:
    """Within it, SIGTERM, and SIGHUP of a terminal that is closed, end as Ctrl-C does: no half-written file stays.

    A signal that is ignored, as with nohup, or that somebody else takes, is left to them.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Terminated(signum)

    names = ("SIGTERM", "SIGHUP") if os.name == "posix" else ("SIGTERM",)
    in_main = threading.current_thread() is threading.main_thread()  # which alone can take signals
    wanted = [
        signum for signum in map(signal.Signals.__getitem__, names) if signal.getsignal(signum) == signal.SIG_DFL
    ]
    previous = {signum: signal.signal(signum, end) for signum in wanted} if in_main else {}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class _Shown(logging.Formatter):
    """Messages on a terminal, which would act on a control character in a name that somebody else's file holds."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))


def _main(argv: list[str]) -> None:
    debug = "--debug" in argv
    handler = logging.StreamHandler()
    handler.setFormatter(_Shown("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for library in ("huggingface_hub", "datasets"):  # they print their own lines, which would come twice
        logging.getLogger(library).propagate = False
    logging.getLogger("tinytl_hf").setLevel(logging.INFO if is_main_process() else logging.ERROR)
    if not debug:
        warnings.filterwarnings("ignore")
    try:
        execute(_with_values([argument for argument in argv if argument != "--debug"] or ["--help"]))
    except Interrupted as stop:
        if not is_main_process():
            sys.exit(stop.exit_code)  # the first process says it
        _end(str(stop), stop.exit_code)
    except Terminated as stop:
        _end("terminated", stop.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise
        if debug:
            traceback.print_exc()
        _end(f"error: {explained(error, _verb(argv))}", 2 if isinstance(error, ArgumentError) else 1)


def _output_is_closed() -> bool:
    """Whether nobody reads our output any more; else a broken pipe was another one, such as to a server."""
    try:
        sys.stdout.flush()
        if os.name == "posix":  # of a long text nothing is left to flush: the pipe itself tells
            poll = select.poll()
            poll.register(sys.stdout, 0)
            return bool(poll.poll(0))
    except BrokenPipeError:
        return True
    except OSError:  # output into no file, as in a notebook
        return False
    return False


def _load(text: str) -> Any:
    """A config file or an option's value; a text of one line that YAML takes for a comment or a mark is that text."""
    value = load_yaml(text)
    is_text = value is None and text.strip().lower() not in ("", "null", "~") and "\n" not in text
    return text if is_text else value


def execute(argv: list[str]) -> None:
    """Parse ``argv`` and do what it says. Slow imports, such as torch, happen once the arguments have been checked."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("yaml", _load, (yaml.YAMLError,))
    set_dumper("yaml", dump_yaml)
    argv = _with_config_first(argv)
    _check_numbers(argv)
    parser = make_parser(_verb(argv), _adapter_defaults(argv))
    try:
        parsed = parser.parse_args(argv)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ArgumentError(None, f"a config file or an option cannot be read: {error}") from error
    _check_no_variables(parsed[parsed.subcommand])
    for key in (field.name for field in fields(Config) if is_dataclass(field.default_factory)):
        if key in parsed[parsed.subcommand] and parsed[parsed.subcommand][key] is None:
            raise TinyTLError(f"{key}=null: it is a group of options; name one, or leave it out")
    values = parser.instantiate(parsed)[parsed.subcommand]
    if VERBS[parsed.subcommand].has_data_options:
        given = parser.parse_args(argv, defaults=False)[parsed.subcommand].get("data", Namespace())
        values.given = list(given.keys())
    if not VERBS[parsed.subcommand].is_shared and "LOCAL_RANK" in os.environ:
        if not is_main_process():
            return
        from tinytl_hf.device import forget_launch

        forget_launch()
    from tinytl_hf.hub.client import bound_waiting

    bound_waiting()
    VERBS[parsed.subcommand].does(values)


def _with_config_first(argv: list[str]) -> list[str]:
    """The words with each ``--config FILE`` right after the verb, as what is on the command line wins.

    Raises:
        ArgumentError, TinyTLError: As of :func:`_check_file`.
    """
    verb = _verb(argv)
    if verb is None or Config not in VERBS[verb].options:
        return argv
    files: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        value = text if equals else next(words, None) if name == "--config" else None
        if name != "--config" or value is None:  # of one at the end the parser says that a file is missing
            others.append(word)
        elif value:
            files.append(value)
        else:
            raise ArgumentError(None, "config=: it is empty, as of a variable that is not set; name a file")
    for file in files:
        _check_file(file, VERBS[verb].options)
    at = others.index(verb) + 1
    return [*others[:at], *(word for file in files for word in ("--config", file)), *others[at:]]


def _check_file(file: str, kinds: Sequence[type]) -> None:
    """Raise if a config file says what the parser would misunderstand.

    Args:
        file: Its path; of one that cannot be opened the parser says what is wrong.
        kinds: The dataclasses of the verb's options.

    Raises:
        ArgumentError: It is no YAML, is empty or sets an option twice.
        TinyTLError: A group of options in it is no group, or a number is written as YAML 1.1 has them.
    """
    try:
        values = load_yaml(Path(file).read_text(encoding="utf-8-sig"))
    except OSError:
        return
    except (ValueError, yaml.YAMLError) as error:
        raise ArgumentError(None, f"config={file}: cannot be read as YAML: {error}") from error
    if values is None:
        raise ArgumentError(None, f"config={file}: empty config file: it sets no option")
    if not isinstance(values, dict):
        raise ArgumentError(None, f"config={file}: holds no options by name; write them as `method: TinyTL-B`")
    twice = [name for name, count in Counter(_names(values)).items() if count > 1]
    if twice:  # of which the parser would take the last
        raise ArgumentError(None, f"config={file}: {twice[0]} is there twice, with and without a dot; leave one")
    _check_groups(values, Config, f"{file}: ")
    for kind in kinds:
        check_numbers(values, kind, folder=Path(file).parent)


def _names(values: Any, group: str = "") -> Iterator[str]:
    """What options of a file are called, however they are nested."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            yield from _names(value, f"{group}{key}.")
        else:
            yield f"{group}{key}"


def _check_groups(values: Any, kind: Any, where: str) -> None:
    """Raise if a file has a value where options belong: some of those the parser drops, and others confuse it."""
    for group in (field for field in fields(kind) if is_dataclass(field.default_factory)):
        given = values.get(group.name, {}) if isinstance(values, dict) else {}
        names_a_file = isinstance(given, str) and group.name not in VERBS
        if not isinstance(given, dict) and not names_a_file:
            raise TinyTLError(
                f"{where}{group.name}={'null' if given is None else given}: it is a group of options; write them "
                "below it, or leave it out"
            )
        _check_groups(given, group.default_factory, f"{where}{group.name}.")


def _check_numbers(argv: list[str]) -> None:
    """Raise if a number is written so that the parser would take it for another, as 1:30 for 90."""
    verb = VERBS.get(_verb(argv) or "")
    if verb is None:
        return
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, text = word.partition("=")
        values: Any = text if equals else following
        if not name.startswith("--"):
            continue
        with suppress(yaml.YAMLError):  # the parser says what is wrong
            read = load_yaml(values)
            values = read if isinstance(read, (list, dict)) else values
        for part in reversed(name[2:].rstrip("+").split(".")):
            values = {part: values}
        for options in verb.options:
            check_numbers(values, options)
        if verb.has_data_options:
            check_numbers(values.get("data"), DataConfig, "data")


def _verb(argv: list[str]) -> str | None:
    return next((word for word in argv if word in VERBS), None)


def _check_no_variables(values: Namespace) -> None:
    """Refuse ``${VAR}``, which a shell expands on a command line and nobody in a config file.

    To expand it would let a file that someone sent put secrets of the environment into names that are looked up.
    """
    for key, value in values.items():
        if isinstance(value, str) and (found := VARIABLE.search(value)):
            raise TinyTLError(
                f"{key}={value}: {found[0]} is not expanded; write it out, or give --{key} on the command line, where "
                "the shell expands it"
            )


def make_parser(chosen: str | None, data_defaults: dict[str, Any] | None = None) -> ArgumentParser:
    """The parser of the command line.

    Args:
        chosen: The verb whose options it knows: those of all verbs take half a second to gather.
        data_defaults: What a verb with options of data takes from its adapter.
    """
    parser = ArgumentParser(
        prog=PROG, exit_on_error=False, allow_abbrev=False, description="TinyTL adapters, the Hugging Face way."
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("--debug", action="store_true", help="Show where an error was raised.")
    verbs = parser.add_subcommands(metavar="VERB")
    for name, verb in VERBS.items():
        added = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        verbs.add_subcommand(name, added, help=verb.about)
        if name != chosen:
            continue
        if Config in verb.options:
            added.add_argument("--config", action="config", help="YAML file with any of the options below.")
        for options in verb.options:
            added.add_class_arguments(options)
        if verb.has_data_options:
            added.add_class_arguments(DataConfig, "data")
            added.set_defaults(data_defaults or {})
        if verb.takes is not None:
            takes = verb.takes
            added.add_argument(takes.name, nargs=takes.nargs, metavar=takes.metavar, help=takes.about)
    return parser


def _adapter_defaults(argv: list[str]) -> dict[str, Any]:
    """Data options of the adapter that a verb is about; only its preprocessing if other data is named."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("verb", nargs="?")
    first.add_argument("--adapter")
    first.add_argument("--revision")
    first.add_argument("--data.dataset", dest="dataset")
    first.add_argument("--data", type=load_yaml)
    try:
        known, _ = first.parse_known_args(argv)
    except argparse.ArgumentError:
        return {}  # the real parser says what is wrong
    verb = VERBS.get(known.verb)
    if verb is None or not verb.has_data_options or known.adapter is None:
        return {}
    if known.dataset is None and isinstance(known.data, dict):
        known.dataset = known.data.get("dataset")
    from tinytl_hf.adapter.format import read_config
    from tinytl_hf.data.find import is_same_place
    from tinytl_hf.hub.client import bound_waiting
    from tinytl_hf.hub.transfer import find_adapter

    bound_waiting()
    config = read_config(find_adapter(known.adapter, known.revision))
    defaults: dict[str, Any] = {
        "train_size": config.preprocessing.train_size,
        "eval_size": config.preprocessing.eval_size,
        "crop_pct": config.preprocessing.crop_pct,
    }
    if config.data is not None and (known.dataset is None or is_same_place(known.dataset, config.data.dataset)):
        defaults.update(config.data.options())
    return {f"data.{key}": value for key, value in defaults.items()}


def _with_values(argv: list[str]) -> list[str]:
    """Let an option that is true or false stand alone, as ``--json``: it is true then."""
    verb = VERBS.get(_verb(argv) or "")
    groups: list[tuple[str, type]] = [("", options) for options in verb.options] if verb is not None else []
    groups += [("data.", DataConfig), ("train.", TrainConfig), ("memory.", MemoryConfig), ("hub.", HubConfig)]
    flags = {f"--{prefix}{field.name}" for prefix, kind in groups for field in fields(kind) if field.type == "bool"}
    result = []
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        argument = "--create_pr" if argument == "--create-pr" else argument  # as the Hub's own client spells it
        result.append(argument)
        if argument in flags and following.lower() in {"yes", "no", "on", "off", "0", "1", "null", "none"}:
            raise TinyTLError(f"{argument[2:]}={following}: use true or false")
        if argument in flags and following.lower() not in {"true", "false"}:
            result.append("true")
    return result


def _end(message: str, code: int) -> NoReturn:
    rank = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f" (process {os.environ.get('RANK', '0')})"
    print(f"{PROG}{rank}: {message}", file=sys.stderr)
    sys.exit(code)
