"""Tables as other tools write them: read where that is certain, else named with what to do."""

import datasets
import pytest
from test_tables import opened, png

from tinytl_hf import TinyTLError

LABELS = ["cat", "dog"] * 4


def test_saved_splits_of_no_rows_are_read(tmp_path, caplog):
    full = datasets.Dataset.from_dict({"image": [png(number) for number in range(8)], "label": LABELS})
    datasets.DatasetDict(train=full, test=full.select([])).save_to_disk(tmp_path / "both")
    assert opened(tmp_path / "both").found.images == {"train": 8, "test": 0}
    assert f"split test is not used: split test of {tmp_path / 'both'} has no rows" in caplog.text
    full.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(TinyTLError, match=r"split train of .* has no rows; use another split or data set"):
        opened(tmp_path / "none")
