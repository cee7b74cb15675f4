"""PEFT for convolutional networks: train, save, load and use TinyTL adapters.

TinyTL: Cai et al., "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning",
NeurIPS 2020, https://arxiv.org/abs/2007.11622
"""

from tinytl_hf.errors import TinyTLError
from tinytl_hf.model import TinyTLModel
from tinytl_hf.version import __version__

__all__ = ["TinyTLError", "TinyTLModel", "__version__"]
