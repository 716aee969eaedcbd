"""An engine that draws ahead without a server: on a copy of the model, so that any schedule of threads can be tried."""

import os
from copy import deepcopy
from threading import Condition

import torch

from grpo_lightning.rollout import DrawsAhead, InProcessEngine, RolloutLostError

WATCHDOG_SECONDS = 60


class CopyingEngine(InProcessEngine, DrawsAhead):
    """The in-process engine on a copy of the model, which takes the weights over when completions are asked for.

    Args:
        updates_first: How many updates must be announced before what was begun is drawn; 0 to draw it within `begin`,
            None to draw it at any time.
    """

    def __init__(self, updates_first=None):
        super().__init__()
        self.updates_first = updates_first
        self.is_drawing = self.is_closed = False
        self._announced = None
        self._changed = Condition()

    def setup(self, model, tokenizer, eos_token_ids):
        super().setup(deepcopy(model), tokenizer, eos_token_ids)

    def update_weights(self, named_tensors, version):
        with self._changed:
            self._announced = named_tensors, version
            self._changed.notify_all()

    def generate(self, requests, sampling, coordinates):
        assert not self.is_drawing, "nothing else is asked for while a rollout is in flight"
        self._take_over()
        return self.draw(requests, sampling, coordinates)

    def begin(self, requests, sampling, coordinates):
        assert not self.is_drawing, "one rollout at most is in flight"
        self.is_drawing = True
        self._take_over()
        return (
            self._now(requests, sampling, coordinates)
            if self.updates_first == 0
            else lambda: self._later(requests, sampling, coordinates)
        )

    def draw(self, requests, sampling, coordinates):
        return super().generate(requests, sampling, coordinates)

    def close(self):
        super().close()
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()

    def _now(self, *arguments):
        drawn = self.draw(*arguments)
        self.is_drawing = False
        return lambda: drawn

    def _later(self, *arguments):
        try:
            with self._changed:
                assert self._changed.wait_for(self._is_time, WATCHDOG_SECONDS)
            assert not self.is_closed, "closed before it was drawn"
            return self.draw(*arguments)
        finally:
            self.is_drawing = False

    def _is_time(self):
        return self.is_closed or self._announced[1] >= self.version + (self.updates_first or 0)

    @torch.no_grad()
    def _take_over(self):
        weights, self.version = self._announced
        parameters = dict(self._model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)


class LosingEngine(CopyingEngine):
    """Loses what the second rank draws ahead for iteration 2."""

    def draw(self, requests, sampling, coordinates):
        if self.is_drawing and coordinates.iteration == 2 and os.environ.get("LOCAL_RANK") == "1":
            raise RolloutLostError("a server is gone")
        return super().draw(requests, sampling, coordinates)
