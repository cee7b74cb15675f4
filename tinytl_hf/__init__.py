"""PEFT for convolutional networks: train, save, load and use TinyTL adapters.

TinyTL: Cai et al., "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning",
NeurIPS 2020, https://arxiv.org/abs/2007.11622
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinytl_hf.errors import TinyTLError
from tinytl_hf.version import __version__

if TYPE_CHECKING:
    from tinytl_hf.config.data import DataConfig
    from tinytl_hf.config.network import HeadConfig, LiteConfig
    from tinytl_hf.config.train import LrFactors
    from tinytl_hf.cuda_graph import ReplayedPasses
    from tinytl_hf.deploy.merge import load_merged
    from tinytl_hf.model import TinyTLModel

__all__ = [
    "DataConfig",
    "HeadConfig",
    "LiteConfig",
    "LrFactors",
    "ReplayedPasses",
    "TinyTLError",
    "TinyTLModel",
    "__version__",
    "load_merged",
]

_WHERE = {
    "DataConfig": "tinytl_hf.config.data",
    "HeadConfig": "tinytl_hf.config.network",
    "LiteConfig": "tinytl_hf.config.network",
    "LrFactors": "tinytl_hf.config.train",
    "ReplayedPasses": "tinytl_hf.cuda_graph",
    "TinyTLModel": "tinytl_hf.model",
    "load_merged": "tinytl_hf.deploy.merge",
}


if not TYPE_CHECKING:  # a type checker would take any name to be there

    def __getattr__(name: str) -> Any:
        """Import what needs torch when it is asked for: ``tinytl-hf --help`` does not need it."""
        if name in _WHERE:
            return getattr(import_module(_WHERE[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
