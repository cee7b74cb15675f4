"""Errors of a command on one line, in the names of its own options: what is wrong, with which value, and the fix."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields

from jsonargparse import ArgumentError

from tinytl_hf.commands import VERBS
from tinytl_hf.config.data import DataConfig
from tinytl_hf.config.run import RENAMED, Config, flat
from tinytl_hf.errors import TinyTLError, one_line

# What to say where jsonargparse says which type it expected.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text (in a file, in quotes)",
    "NoneType": "null",
}

# What Transformers, PEFT and timm call options of a run.
OTHERS = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.global_batch_size",
    "model": "backbone.name",
    "model_name_or_path": "backbone.name",
    "img_size": "data.train_size",
    "warmup_ratio": "train.warmup_epochs",
    "warmup_steps": "train.warmup_epochs",
}

# What helps each verb where the memory of the device, or of the machine, is not enough.
NEEDS_LESS = {
    "train": "use fewer images at a time (--train.gradient_accumulation_steps 2, or more) or smaller ones "
    "(--data.train_size); `tinytl-hf fit` says what fits",
    "eval": "use a smaller --batch_size",
}
# What torch.distributed raises in the processes that wait for one that has ended.
OTHER_ENDED = re.compile(r"by peer|remote (worker crash|server shutdown|process exited)", re.I)


def explained(error: Exception, verb: str | None) -> str:
    """What went wrong with a command of this verb and how to mend it, without the library's own layout."""
    text = one_line(error)
    if text.startswith("Caught TinyTLError in DataLoader"):  # torch wraps what a worker process raises
        text = text.rpartition("TinyTLError: ")[2]
    if isinstance(error, TinyTLError):
        return _with_own_names(text, verb)
    if _is_of_memory(error):
        fix = NEEDS_LESS.get(verb or "", "see what else takes it")
        return f"not enough memory ({text.partition('. GPU ')[0].rstrip('.')}); {fix}"
    if isinstance(error, RuntimeError) and OTHER_ENDED.search(text):
        return "another process of the run has ended; its own message, or that of the launcher, says why"
    if not isinstance(error, ArgumentError):
        return f"{type(error).__name__}: {text} (unexpected: --debug shows where)"
    unknown = re.search(r"does not accept option '([^']+)'|unrecognized arguments: (-*)([^\s=]+)", text)
    if unknown and unknown[2] == "":
        return _no_option(text.partition("unrecognized arguments: ")[2].split()[0], verb)
    if unknown:
        return _no_such_option(unknown[1] or unknown[3], verb)
    if missing := re.match(r"the following arguments are required: (.*)", text):
        return _missing(missing[1].split(", "))
    text = re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r'Parser key "([^"]+)": ', r"\1: ", text)
    if text.startswith("adapter: Unable to load config"):
        return "adapter: train makes one; --adapter.init PATH_OR_NAME goes on from another"
    if group := re.match(r"(\w+): Unable to load config '([^']*)'", text):
        example = next(name for name in flat(Config().to_dict()) if name.startswith(f"{group[1]}."))
        return f"{group[1]}={group[2]}: it is a group of options; name one, as --{example} {group[2]}"
    return _with_fix(text)


def _is_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had not as much memory as it was asked for."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    from accelerate.utils.memory import should_reduce_batch_size  # here, as its import takes long

    return should_reduce_batch_size(error)


def _with_own_names(text: str, verb: str | None) -> str:
    """A message that calls options as the verb does: ``weights`` what a run has as ``backbone.weights``."""
    own, of_run = [] if verb is None else _options(verb), flat(Config().to_dict())

    def own_name(found: re.Match[str]) -> str:
        name, last = found[0], found[0].rpartition(".")[2]
        return last if name in of_run and name not in own and last in own else name

    return re.sub(r"(?<![\w./])(backbone|train|adapter)\.\w+", own_name, text)


def _with_fix(text: str) -> str:
    """What is wrong with an option's value, with a value of the right form where that is not plain to see."""
    key, colon, _ = text.partition(": ")
    value = re.split(r"(?:Got|Given) value:(?: |$)", text)[-1]
    if not colon or value == text:
        return text
    expected = re.split(r" Errors: |\.? (?:Got|Given) value:", text)[0]  # the library cuts the value out of the rest
    if "NoneType" in expected and value.lower() == "none":
        return f"{key}={value}: use null"
    if "Expected a tuple" in text:
        example = flat(Config().to_dict()).get(key)
        return f"{key}={value}: use {len(example)} values in brackets, such as '{example}'" if example else text
    if re.search("Expected (a )?list", text) and not value.startswith("["):
        example = "" if value.lower() in ("none", "null") else f", as '[{value}]'"
        return f"{key}={value}: use values in brackets{example}"
    names = re.findall(r"'(.*?)'", " ".join(re.findall(r"Literal\[(.*?)\]", expected)))
    kinds = [KINDS[kind] for kind in re.findall(r"\w+", re.sub(r"Literal\[.*?\]", "", expected)) if kind in KINDS]
    wanted = [f"one of {', '.join(names)}" if len(names) > 1 else "".join(names), *kinds]
    if not any(wanted):
        return text
    near = difflib.get_close_matches(value.lower(), [name.lower() for name in names], n=1)
    meant = next((f"; did you mean {name}?" for name in names if name.lower() in near), "")
    return f"{key}={value}: use {' or '.join(word for word in wanted if word)}{meant}"


def _no_such_option(key: str, verb: str | None) -> str:
    if key in RENAMED:
        return f"{key}: this option is called {RENAMED[key]} now"
    options = {name: _options(name) for name in VERBS}
    own = options[verb] if verb is not None else [name for names in options.values() for name in names]
    last = key.rpartition(".")[2]
    spelled = key.replace("-", "_")
    word = spelled.rpartition(".")[2]
    alike = [name for name in own if name == spelled or name.rpartition(".")[2] == word]
    theirs = [OTHERS[word]] if OTHERS.get(word) in own else []
    near = [last] if last in own else alike or theirs or difflib.get_close_matches(spelled, own, n=1)
    owners = [name for name, names in options.items() if key in names]
    if owners:
        has = f"{', '.join(owners)} {'have' if len(owners) > 1 else 'has'}"
        own_name = last if last in own else "".join(theirs)
        return f"{key}: this verb has no such option ({has}){f'; it has {own_name}' if own_name else ''}"
    return f"{key}: no such option{f'; did you mean {near[0]}?' if near else '; see --help'}"


def _no_option(word: str, verb: str | None) -> str:
    """What to say of a word that no option stands before."""
    own = [] if verb is None else _options(verb)
    if word.partition("=")[0] in own:
        return f"{word}: write --{word}"
    of_data = f"; --data.dataset {word} names data" if "data.dataset" in own else ""
    return f"{word}: no option stands before it{of_data}; see --help"


def _missing(keys: list[str]) -> str:
    """What to say where something that a verb cannot do without is missing; the library names it ``verb.name``."""
    verb = VERBS.get(keys[0].partition(".")[0])
    if verb is None:
        return f"name what to do: {', '.join(VERBS)}"
    names = [key.partition(".")[2] for key in keys]
    takes = verb.takes
    wanted = [takes.metavar if takes is not None and name == takes.name else f"--{name}" for name in names]
    return f"{' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} missing; see --help"


def _options(name: str) -> list[str]:
    """What a verb's options are called."""
    verb = VERBS[name]
    names = [field.name for kind in verb.options if kind is not Config for field in fields(kind)]
    names += [*flat(Config().to_dict())] if Config in verb.options else []
    return names + [f"data.{field.name}" for field in fields(DataConfig)] if verb.has_data_options else names
