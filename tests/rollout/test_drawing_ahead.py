"""A real vLLM server that draws the next rollout while this one is learned from."""

from functools import partial

import pytest
import replay
from real_server import ONE_BY_ONE, kill, needs_vllm

from grpo_lightning.rollout import VLLMServerEngine


class KilledAhead(VLLMServerEngine):
    """Its server is killed when the fifth completion of the rollout of iteration 2 is drawn, in the background."""

    num_asked = None

    def begin(self, requests, sampling, coordinates):
        draw = super().begin(requests, sampling, coordinates)
        self.num_asked = 0 if coordinates.iteration == 2 else None
        return draw

    def _complete(self, server, body):
        if self.num_asked is not None:
            self.num_asked += 1
            if self.num_asked == 5:
                kill(self)
        return super()._complete(server, body)


@needs_vllm
@pytest.mark.parametrize(("kind", "staleness"), [(VLLMServerEngine, [0, 1, 1, 1]), (KilledAhead, [0, 1, 0, 1])])
def test_a_VLLM_server_draws_ahead(kind, staleness, caplog):
    caplog.set_level("INFO")
    record, _ = replay.run(
        engine=partial(kind, local=ONE_BY_ONE, max_requests=1),
        objective="default",
        draw_ahead=True,
        head_dim=32,
        iterations=4,
        lr=1e-2,
    )
    assert [metrics["sampler/staleness"] for metrics in record.metrics] == staleness
    is_same = [metrics["sampler/logprob_difference"] < 1e-4 for metrics in record.metrics]
    assert is_same == [updates == 0 for updates in staleness]
    said = [line for line in caplog.messages if "drawn ahead, are drawn again" in line]
    assert len(said) == staleness[1:].count(0)
