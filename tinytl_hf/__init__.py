"""PEFT for convolutional networks: train, save, load and use TinyTL adapters.

TinyTL: Cai et al., "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning",
NeurIPS 2020, https://arxiv.org/abs/2007.11622
"""

from typing import TYPE_CHECKING, Any

from tinytl_hf.errors import TinyTLError
from tinytl_hf.version import __version__

if TYPE_CHECKING:
    from tinytl_hf.model import TinyTLModel

__all__ = ["TinyTLError", "TinyTLModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the model, and with it torch, when it is asked for: ``tinytl-hf --help`` does not need it."""
    if name == "TinyTLModel":
        from tinytl_hf.model import TinyTLModel

        return TinyTLModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
