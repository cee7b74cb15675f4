"""PEFT for convolutional networks: train, save, load and use TinyTL adapters.

TinyTL: Cai et al., "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning",
NeurIPS 2020, https://arxiv.org/abs/2007.11622
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinytl_hf.errors import TinyTLError
from tinytl_hf.version import __version__

if TYPE_CHECKING:
    from tinytl_hf.deploy.merge import load_merged
    from tinytl_hf.model import TinyTLModel

__all__ = ["TinyTLError", "TinyTLModel", "__version__", "load_merged"]

_WHERE = {"TinyTLModel": "tinytl_hf.model", "load_merged": "tinytl_hf.deploy.merge"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: ``tinytl-hf --help`` does not need it."""
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
