"""What the data set of a run keeps in memory, before there is a run."""

from __future__ import annotations

from tinytl_hf.config.data import DataConfig
from tinytl_hf.data.batches import survey_headers
from tinytl_hf.data.sets import Opened
from tinytl_hf.measure.memory import DataMemory


def data_memory(opened: Opened, data: DataConfig) -> DataMemory:
    """What the splits of a run would keep in memory, by the headers of their images."""
    train = survey_headers(opened.train, data, data.train_size)
    in_memory = {"train": train.in_memory}
    for name, split in (("eval", opened.evaluation), ("test", opened.test)):
        if split is not None:
            in_memory[name] = survey_headers(split, data, data.eval_size or data.train_size).in_memory
    return DataMemory(in_memory, train.photo_size)
