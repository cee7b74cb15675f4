"""What the Hub shows of an adapter: its card and the card's metadata."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from tinytl_hf.adapter import AdapterConfig

BEGIN, END = "<!-- tinytl_hf: begin -->", "<!-- tinytl_hf: end -->"


def render_card(config: AdapterConfig, metrics: Mapping[str, float] | None = None, existing: str | None = None) -> str:
    """Render a short model card.

    Args:
        config: The adapter.
        metrics: Figures on the evaluation set, as fractions.
        existing: The card that is there already: only the part between our two marks is replaced, and a
            card without them is returned as it is.
    """
    block = "\n".join([BEGIN, *_body(config, metrics or {}), END])
    if existing is not None:
        before, begin, rest = existing.partition(BEGIN)
        _, end, after = rest.partition(END)
        return f"{before}{block}{after}" if begin and end else existing
    data = ModelCardData(
        library_name="tinytl_hf",
        pipeline_tag="image-classification",
        tags=["tinytl", "image-classification", config.backbone.name, config.method],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{block}\n"


def _body(config: AdapterConfig, metrics: Mapping[str, float]) -> list[str]:
    labels = ", ".join(config.label_names[:20]) + (", ..." if len(config.label_names) > 20 else "")
    lines = [
        f"# {config.method} adapter for {config.backbone.name}",
        "",
        f"Classifies images of {config.preprocessing.image_size} px into {len(config.label_names)} classes: {labels}.",
        "It holds only what was trained; the frozen weights come from "
        f"`{config.backbone.weights}` and are checked by their hash.",
        "",
        "```python",
        "from PIL import Image",
        "from tinytl_hf import TinyTLModel",
        "",
        'model = TinyTLModel.from_pretrained("PATH_OF_THIS_FOLDER").eval()',
        'logits = model(model.preprocess([Image.open("image.png")]))',
        "print(model.label_names[logits.argmax()])",
        "```",
    ]
    if config.data is not None:
        lines += ["", f"Trained on `{config.data.dataset}`."]
    if metrics:
        lines += ["", "| metric (evaluation set) | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    return lines
