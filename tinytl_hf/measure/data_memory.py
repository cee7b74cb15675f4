"""What the data set of a run keeps in memory, before there is a run."""

from __future__ import annotations

from tinytl_hf.config.run import Config
from tinytl_hf.data.batches import survey
from tinytl_hf.data.sets import open_splits
from tinytl_hf.measure.memory import DataMemory


def survey_data(config: Config) -> DataMemory:
    """What the data set of a run would keep in memory, by a sample of its images.

    Raises:
        TinyTLError: The data set cannot be found or read.
    """
    data = config.data
    train, evaluation = open_splits(data)
    found = survey(train, data, data.train_size)
    evaluated = survey(evaluation, data, data.eval_size or data.train_size)
    return DataMemory({"train": found.in_memory, "eval": evaluated.in_memory}, found.photo_size)
