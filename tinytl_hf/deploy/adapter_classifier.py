"""An adapter that labels photos, in torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tinytl_hf.data.tensors import as_tensor, pad_images
from tinytl_hf.device import forward_in_parts, is_told_cpu, set_threads
from tinytl_hf.lean.evaluation import evaluated_by_chains
from tinytl_hf.model import TinyTLModel


class AdapterClassifier:
    """Labels photos with an adapter, on CUDA or, if there is none or Accelerate is told so, on the CPU.

    Args:
        adapter: Its folder, or its name on the Hub.
        weights: Where to take the backbone's weights from; None: where the adapter says.
        revision: On the Hub: a branch, a tag or a commit; None: main.

    Raises:
        TinyTLError: The adapter cannot be loaded.
    """

    def __init__(self, adapter: str, weights: str | None, revision: str | None) -> None:
        set_threads(None)
        device = "cuda" if torch.cuda.is_available() and not is_told_cpu() else "cpu"
        self._model = TinyTLModel.from_pretrained(adapter, weights=weights, revision=revision).eval().to(device)
        self.label_names = self._model.label_names
        self.eval_size = self._model.config.preprocessing.eval_size

    @torch.inference_mode()
    def probabilities(self, photos: Sequence[np.ndarray], mirror: bool = False) -> np.ndarray:
        """Photos ``uint8`` ``[H, W, 3]`` of any sizes to ``[N, classes]``; ``mirror`` averages in the mirrored."""
        pixels, sizes = pad_images([as_tensor(photo) for photo in photos])
        view = self._model.normalise(pixels, sizes)
        with evaluated_by_chains(self._model.backbone) as pixels_at_a_time:
            logits = forward_in_parts(self._model, view, pixels_at_a_time)
            if mirror:
                logits = (logits + forward_in_parts(self._model, view.flip(3), pixels_at_a_time)) / 2
        return logits.softmax(1).cpu().numpy()
