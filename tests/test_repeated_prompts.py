"""A prompt that an iteration draws twice is two groups: drawn apart, and normalised apart."""

import replay
import torch
from lightning.pytorch.callbacks import Callback


class ThreePrompts(replay.Sums):
    """Fewer prompts than an iteration takes, so that each one is drawn twice in some iteration."""

    def rows(self, split):
        return super().rows(split)[:3]


class Watch(Callback):
    """Notes the groups of every iteration: (prompt, tokens of each completion, advantage of each completion)."""

    def __init__(self):
        self.iterations = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollout = pl_module.rollout
        G = rollout.group_size
        groups = [slice(p * G, (p + 1) * G) for p in range(len(rollout.prompts))]
        tokens = [tuple(c.token_ids for c in rollout.completions[group]) for group in groups]
        advantages = [pl_module.advantages_B[group] for group in groups]
        indices = [prompt.index for prompt in rollout.prompts]
        self.iterations.append(list(zip(indices, tokens, advantages, strict=True)))


def test_a_prompt_drawn_twice_in_an_iteration_gets_two_different_groups():
    watch = Watch()
    module, _, trainer, _ = replay.make(live=True, iterations=3, callbacks=[watch], dtype="float64")
    trainer.fit(module, ThreePrompts())
    assert len(watch.iterations) == 3
    for groups in watch.iterations:
        twice = [index for index, *_ in groups if [other for other, *_ in groups].count(index) == 2]
        assert twice, "four draws from three prompts"
        first, second = (group for group in groups if group[0] == twice[0])
        assert not set(first[1]) & set(second[1]), "no completion of one is one of the other"
        for _, _, advantages_G in groups:
            # (r - mean) / (std + epsilon) sums to zero within each group, and to nothing else over both.
            torch.testing.assert_close(advantages_G.sum(), advantages_G.new_zeros(()), atol=1e-9, rtol=0)
            assert advantages_G.abs().max() > 0.5
