from grpo_lightning.rollout import RolloutEngine, draw_groups
from grpo_lightning.types import Completion, Coordinates, FinishReason, Prompt, SamplingParams, Stream

SAMPLING = SamplingParams(max_new_tokens=3)
COORDINATES = Coordinates(seed=1, stream=Stream.TRAINING, iteration=6)


class Echo(RolloutEngine):
    """Completes with the slot and the sample's number."""

    def setup(self, model, tokenizer, eos_token_ids): ...

    def update_weights(self, named_tensors, version): ...

    def generate(self, requests, sampling, coordinates):
        assert (sampling, coordinates) == (SAMPLING, COORDINATES)
        self.prompts = [request.token_ids for request in requests]
        return [
            Completion(token_ids=(r.slot, s), sampler_logprobs=(0.0,) * 2, text="", finish_reason=FinishReason.EOS)
            for r in requests
            for s in range(r.num_completions)
        ]


def test_one_rank_of_two_draws_groups_of_its_slots():
    prompts = [Prompt(index=7 * i, token_ids=(i,), text=str(i)) for i in range(4)]
    engine = Echo()
    rollout = draw_groups(
        engine, prompts, slots=range(1, 4, 2), group_size=2, sampling=SAMPLING, coordinates=COORDINATES
    )
    assert engine.prompts == [(1,), (3,)]
    assert (rollout.iteration, rollout.slots, rollout.group_size) == (6, (1, 3), 2)
    assert rollout.prompts == (prompts[1], prompts[3])
    assert [c.token_ids for c in rollout.completions] == [(1, 0), (1, 1), (3, 0), (3, 1)]
