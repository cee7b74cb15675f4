"""The model card of an adapter: ``card_template.md`` filled in, and put into a card that is there already.

Of such a card only our part is written anew: the text between our two marks and our own metadata.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from tinytl_hf.adapter.format import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from tinytl_hf.adapter.record import AdapterConfig, DataRecord
from tinytl_hf.config.check import check
from tinytl_hf.config.network import MethodName
from tinytl_hf.data.roles import HOLDOUT
from tinytl_hf.disk import check_is_file
from tinytl_hf.errors import TinyTLError
from tinytl_hf.hub.card_words import (
    AUTHORS,
    LICENCE,
    UNKNOWN,
    as_code,
    dataset_in_words,
    dataset_name,
    escaped,
    eval_data_in_words,
    hub_dataset,
    init_in_words,
    licence_of,
    weights_in_words,
)
from tinytl_hf.network.hub_weights import SOURCE
from tinytl_hf.network.weights import is_weights_file
from tinytl_hf.reports.run_folder import RESULTS_FILE
from tinytl_hf.words import counted

TEMPLATE = Path(__file__).with_name("card_template.md")
BEGIN, END = "<!-- tinytl_hf: begin -->", "<!-- tinytl_hf: end -->"
PICTURES = {"accuracy and loss by epoch": "curves.png", "confusion matrix": "confusion_matrix.png"}
ADAPTER_FILES = (CONFIG_FILE, TENSORS_FILE, CARD_FILE, RESULTS_FILE, *PICTURES.values())  # all that one can have
HERE = "."  # stands for the adapter's name in the card's examples until it is pushed
SHOWN_LABELS = 100
METRICS = {  # our name: the Hub's name of the metric, and the reader's
    "accuracy": ("accuracy", "accuracy"),
    "balanced_accuracy": ("balanced_accuracy", "balanced accuracy"),
    "top5": ("top_5_accuracy", "top-5 accuracy"),
    "f1": ("f1", "F1, macro average"),
    "ece": ("expected_calibration_error", "expected calibration error"),
}
MEASURED = "image classification, measured by tinytl_hf"  # tells our results from those of a person
# Fields of a card's metadata that we write; all others are a person's.
OUR_KEYS = {"library_name", "license", "pipeline_tag", "tags", "base_model", "base_model_relation", "datasets"}
OUR_KEYS |= {"model-index"}
# torchvision's networks whose very weight files timm has on the Hub, under the same names.
ON_THE_HUB = re.compile(r"(wide_)?res(net|next)\d")


@dataclass(frozen=True)
class RunFacts:
    """What a finished run adds to its adapter's card; without one, nothing.

    Attributes:
        recipe: Settings by name.
        time: A sentence about training time and its conditions.
        split: Name of the evaluation split, or ``holdout``.
        n: Images of the evaluation set.
        memory: What ``tinytl_hf.measure.memory.to_json`` gives, or None.
        pictures: Titles and file names of pictures next to the card.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    split: str = ""
    n: int = 0
    memory: Mapping[str, Any] | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)


def render_card(
    config: AdapterConfig,
    metrics: Mapping[str, float] | None = None,
    existing: str | None = None,
    facts: RunFacts | None = None,
) -> str:
    """Render the card of an adapter.

    Args:
        config: The adapter.
        metrics: Figures on the evaluation set, as fractions; those with a name known here are shown.
        existing: The card that is there already, for :func:`update_card`.
        facts: What is known of the run, where there was one.
    """
    figures = {} if metrics is None else _figures(metrics)
    facts = facts or RunFacts()
    if facts.split and config.data is not None:
        config = replace(config, data=replace(config.data, eval_split=facts.split))
    data, weights = config.data, config.backbone.weights
    in_file = config.backbone.sha256 is not None and is_weights_file(weights)
    option = f" --weights {shlex.quote(Path(weights).name)}" if in_file else ""
    card = ModelCard.from_template(
        _metadata(config, figures),
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        name=HERE,
        method=config.method,
        backbone=config.backbone.name,
        trained_blocks=counted(config.trained_blocks, "block") if config.trained_blocks else None,
        labels=[escaped(label) for label in config.label_names],
        shown_labels=SHOWN_LABELS,
        eval_size=config.preprocessing.eval_size,
        dtype=config.dtype,
        weights=weights_in_words(config),
        classes=counted(len(config.label_names), "class", "classes"),
        weights_file=json.dumps(Path(weights).name, ensure_ascii=False) if in_file else None,
        predict=as_code(f"tinytl-hf predict --adapter {HERE}{option} image.png"),
        dataset=dataset_in_words(data) if data else None,
        subset=as_code(data.subset) if data and data.subset else None,
        train_split=as_code(data.train_split) if data else None,
        eval_data=eval_data_in_words(data, facts.n) if data else None,
        init=init_in_words(config.init) if config.init else None,
        metrics={METRICS[name][1]: f"{value:.4f}" for name, value in figures.items()},
        ece="ece" in figures,
        results_file=RESULTS_FILE,
        recipe={key: escaped(value) for key, value in facts.recipe.items()},
        time=facts.time,
        n=f"{facts.n:,}" if facts.n else None,
        memory=facts.memory,
        pictures=facts.pictures,
    )
    new = re.sub(r"\n{3,}", "\n\n", str(card)).strip() + "\n"
    return new if existing is None else update_card(existing, new)


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of ``metrics`` that a card shows.

    Raises:
        TinyTLError: They are no figures by name, or none that is known here.
    """
    check(isinstance(metrics, Mapping), "metrics", metrics, "use figures by name, such as {'accuracy': 0.9}")
    known = [name for name in METRICS if name in metrics]
    check(bool(known) or not metrics, "metrics", metrics, f"a card shows {', '.join(METRICS)}; use one of those")
    figures = {}
    for name in known:
        try:
            figures[name] = float(metrics[name])
        except (TypeError, ValueError) as error:
            raise TinyTLError(f"metrics: {name} is {metrics[name]!r}; use a number from 0 to 1") from error
        is_share = 0 <= round(figures[name], 6) <= 1 and not isinstance(metrics[name], bool)
        check(is_share, f"metrics: {name}", metrics[name], "use a number from 0 to 1")
    return figures


def read_card(folder: Path) -> str | None:
    """The card in a folder, if there is one that is not empty; one that is no text is a person's, and "" to us.

    Raises:
        TinyTLError: It is there and cannot be read.
    """
    try:
        check_is_file(folder / CARD_FILE)
        card = (folder / CARD_FILE).read_text(encoding="utf-8-sig")
        return card if card.strip() else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise TinyTLError(f"{folder / CARD_FILE} cannot be read ({error}); move it away") from error


def update_card(existing: str, new: str) -> str:
    """Put our part of a card into another one.

    Args:
        existing: A card. One without our two marks belongs to a person, and is returned as it is, unless it has
            metadata only, such as the licence that the Hub asks for where a repository is made.
        new: A card with our part, else nothing comes of it. What a person wrote into its metadata comes along.
    """
    if REGEX_YAML_BLOCK.search(existing) and not has_our_part(existing) and not text_around(existing):
        existing = f"{existing.rstrip()}\n\n{BEGIN}{END}\n"
    before, begin, rest = existing.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end and has_our_part(new)):
        return existing
    text = f"{before}{BEGIN}{_block(new)}{END}{after}"
    head, own = REGEX_YAML_BLOCK.search(text), REGEX_YAML_BLOCK.search(new)
    if own is None:
        return text
    if head is None:
        return f"---\n{own[2]}\n---\n\n{text}"
    try:
        theirs = yaml.safe_load(head[2]) or {}
        merged = _merged(theirs, yaml.safe_load(own[2]) or {})
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError):
        return text  # a head that is no mapping of the Hub's is a person's business
    return text if merged == theirs else f"{_head(merged)}{text[head.end() :]}"


def is_untouched(card: str) -> bool:
    """Whether a card holds our part and nothing that a person wrote."""
    head = REGEX_YAML_BLOCK.search(card)
    licensed = re.search(r"^license: (\S+)$", head[2] if head else "", re.MULTILINE)
    licence = licensed[1] if licensed else None
    ours = licence in (LICENCE, UNKNOWN) or f"{AUTHORS} {escaped(licence)}." in _block(card)
    return has_our_part(card) and ours and not text_around(card)


def has_our_part(card: str) -> bool:
    """Whether a card has our part; one without it is a person's own."""
    return END in card.partition(BEGIN)[2]


def text_around(card: str) -> str:
    """What a person wrote around our part of a card, beside its metadata."""
    head = REGEX_YAML_BLOCK.search(card)
    before, _, rest = card[head.end() if head else 0 :].partition(BEGIN)
    return (before + rest.partition(END)[2]).strip()


def with_name(card: str, name: str) -> str:
    """Let the code of our part load the adapter by ``name``."""
    before, begin, rest = card.partition(BEGIN)
    block, end, after = rest.partition(END)
    block = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{name}"', block)
    block = re.sub(r"`tinytl-hf predict --adapter \S+", f"`tinytl-hf predict --adapter {name}", block)
    return f"{before}{begin}{block}{end}{after}"


def files_of_card(card: str) -> list[str]:
    """The metadata and picture files that our part of a card refers to."""
    return [name for name in (RESULTS_FILE, *PICTURES.values()) if f"]({name})" in _block(card)]


def _head(metadata: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)}---\n"


def _block(card: str) -> str:
    return card.partition(BEGIN)[2].partition(END)[0]


def _metadata(config: AdapterConfig, figures: Mapping[str, float]) -> ModelCardData:
    base_model = _base_model(config)
    dataset = hub_dataset(config.data)
    more: dict[str, Any] = {"base_model_relation": "adapter"} if base_model else {}
    return ModelCardData(
        library_name="tinytl-hf",  # the Hub's ids are in lower case with hyphens
        license=licence_of(config),
        pipeline_tag="image-classification",
        tags=["tinytl", config.backbone.name, config.method],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        model_name=f"{config.method} adapter for {config.backbone.name}" if figures else None,
        eval_results=[_result(config.data, name, value) for name, value in figures.items()] or None,
        **more,
    )


def _result(data: DataRecord | None, name: str, value: float) -> EvalResult:
    kind, title = METRICS[name]
    split = data.eval_split if data is not None else None
    return EvalResult(
        task_type="image-classification",
        task_name=MEASURED,
        dataset_type=hub_dataset(data) or "custom",
        dataset_name=dataset_name(data),
        dataset_config=data.subset if data else None,
        dataset_split=None if split == HOLDOUT else split,
        metric_type=kind,
        metric_name=title,
        metric_value=value,
    )


def _merged(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Their metadata with ours in it: our fields, our entries of lists, our results, and what else is in ours."""
    persons = {key: value for key, value in own.items() if key not in OUR_KEYS}
    merged = {**theirs, **persons}
    if own.get("license", LICENCE) not in (LICENCE, UNKNOWN) or "license" not in theirs:
        merged["license"] = own.get("license", LICENCE)
    if str(theirs.get("base_model")).startswith("timm/") and theirs.get("base_model_relation") == "adapter":
        del merged["base_model"], merged["base_model_relation"]  # ours, of the adapter that was there
    for key in ("library_name", "pipeline_tag", "base_model", "base_model_relation"):
        if key in own:
            merged[key] = own[key]
    former = _our_tags(_as_list(theirs.get("tags")))
    kept = [tag for tag in _as_list(theirs.get("tags")) if tag not in former]
    merged["tags"] = kept + [tag for tag in _as_list(own.get("tags")) if tag not in kept]
    datasets = _as_list(theirs.get("datasets"))
    if new := [name for name in _as_list(own.get("datasets")) if name not in datasets]:
        merged["datasets"] = datasets + new
    merged.pop("model-index", None)
    models = _models(theirs, ours=False)
    models += [model for model in _models(own, ours=False) if model not in models] + _models(own, ours=True)
    return {**merged, "model-index": models} if models else merged


def _our_tags(tags: Sequence[Any]) -> list[Any]:
    """The backbone and the method among the tags of a card, which we write one after the other."""
    methods = get_args(MethodName)
    return [*methods, *(backbone for backbone, method in pairwise(tags) if method in methods)]


def _models(metadata: Mapping[str, Any], ours: bool) -> list[dict[str, Any]]:
    """The models of a card's metadata with the results that we measured, or with those of a person."""
    found = []
    for model in _as_list(metadata.get("model-index")):
        results = [r for r in model.get("results", []) if ((r.get("task") or {}).get("name") == MEASURED) is ours]
        if results:
            found.append({**model, "results": results})
    return found


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _base_model(config: AdapterConfig) -> str | None:
    """The Hub's name of the backbone's weights, where the Hub has those very weights."""
    name, weights = config.backbone.name, config.backbone.weights
    if config.backbone.sha256 is not None and (on_hub := SOURCE.fullmatch(weights)):
        return on_hub["repo"]
    if config.backbone.sha256 is None or not ON_THE_HUB.match(name) or not weights.startswith("IMAGENET1K_V"):
        return None
    return f"timm/{name}.tv{'' if weights.endswith('V1') else '2'}_in1k"
