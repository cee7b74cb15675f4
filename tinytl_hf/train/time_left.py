"""How long the rest of a run will take, said on a log line early in its first minute and after each epoch."""

from __future__ import annotations

import logging
import time

from tinytl_hf.config.run import Config

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps, in which kernels and memory get ready
SAY_AFTER = 10  # seconds after those


class TimeLeft:
    """Watches the steps of a run. An epoch's work is taken to grow with the number of its images' pixels.

    Args:
        config: The run, with its epochs settled.
    """

    def __init__(self, config: Config) -> None:
        self.work = [config.train_size_in(epoch) ** 2 for epoch in range(config.train.plan.epochs)]
        self.steps, self.said = 0, False
        self.start: tuple[float, float] = (0.0, 0.0)  # when the warm-up ended, and what was done by then

    def after_step(self, epoch: int, share: float) -> None:
        """Note a step, at which so much of its epoch is done; say once what is left."""
        self.steps += 1
        now, done = time.perf_counter(), self._done(epoch) + share * self.work[epoch]
        if self.steps <= WARM_UP:
            self.start = now, done
        elif not self.said and now - self.start[0] >= SAY_AFTER:
            self.said = True
            logger.info("%s of training left, and the evaluations", self._left(now, done))

    def after_epoch(self, epoch: int) -> str:
        """What is left after an epoch and its evaluation, in words; nothing after the last."""
        done = self._done(epoch + 1)
        if self.steps == 0 or epoch + 1 == len(self.work) or done <= self.start[1]:
            return ""  # with no step, a run was resumed for an evaluation, and no time was taken
        return f"; {self._left(time.perf_counter(), done)} left"

    def _done(self, epochs: int) -> float:
        return float(sum(self.work[:epochs]))

    def _left(self, now: float, done: float) -> str:
        since, done_then = self.start
        return about((sum(self.work) - done) / (done - done_then) * (now - since))


def about(seconds: float) -> str:
    """A time in words, to two digits or so."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"
