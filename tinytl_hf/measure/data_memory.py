"""What the data set of a run keeps in memory, before there is a run."""

from __future__ import annotations

from tinytl_hf.config.run import Config
from tinytl_hf.data.batches import survey
from tinytl_hf.data.sets import open_data
from tinytl_hf.measure.memory import DataMemory


def survey_data(config: Config) -> DataMemory:
    """What the data set of a run would keep in memory, by a sample of its images.

    Raises:
        TinyTLError: The data set cannot be found or read.
    """
    data = config.data
    opened = open_data(data)
    found = survey(opened.train, data, data.train_size)
    in_memory = {"train": found.in_memory}
    for name, split in (("eval", opened.evaluation), ("test", opened.test)):
        if split is not None:
            in_memory[name] = survey(split, data, data.eval_size or data.train_size).in_memory
    return DataMemory(in_memory, found.photo_size)
