"""A sampler that is not quite the trainer's policy: the uncorrected run degrades, truncated weights recover it.

Weights: TIS, https://fengyao.notion.site/off-policy-rl. The engine's head has an error that stays the same, as rounded
weights would have, and so favours some tokens. Rewards are not compared with a baseline. On average the uncorrected
update then adds mu_k r_k - pi_k sum_j mu_j r_j to the logit of token k, which feeds what the engine favours even where
all rewards are equal. The weights put pi in the place of mu.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from grpo_lightning import GRPOModule
from grpo_lightning.evaluation import Evaluation
from grpo_lightning.objective import (
    Clipped,
    Correction,
    NoBaseline,
    Objective,
    TokenMean,
    TokenRatio,
    TruncatedWeights,
)
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams, Stream
from tools.experiments.cold_start import adamw
from tools.experiments.digits import Numbered, ShareOf, random_policy
from tools.experiments.experiment import Comparison, Experiment, Panel, main
from tools.experiments.outcome import mean_of_last
from tools.experiments.training import Curves, train


class InexactEngine(InProcessEngine):
    """Draws training completions with an error in the head's weights, and reports the log-probs of what it drew from.

    The error is the same throughout the run. Held-out prompts are completed without: what is judged is the policy.

    Args:
        deviation: Of the errors, which are Gaussian and drawn from the run's seed; >= 0.
    """

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request."""
        if coordinates.stream != Stream.TRAINING:
            return super().generate(requests, sampling, coordinates)
        head = self._model.get_output_embeddings()
        generator = torch.Generator().manual_seed(coordinates.seed)
        errors_VC = self.deviation * torch.randn(head.weight.shape, generator=generator)

        def inexact(_: torch.nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            return logits + arguments[0] @ errors_VC.T

        handle = head.register_forward_hook(inexact)
        try:
            return super().generate(requests, sampling, coordinates)
        finally:
            handle.remove()


LENGTH = 8
DEVIATION = 0.1
ARMS: dict[str, tuple[float, Correction | None]] = {
    "no perturbation": (0.0, None),
    "uncorrected": (DEVIATION, None),
    "TIS": (DEVIATION, TruncatedWeights(weight=TokenRatio(), upper=2.0)),
}


def train_arm(arm: str, *, seed: int, num_updates: int) -> Curves:
    """One update on each rollout; the arms differ in the sampler and in the correction."""
    deviation, correction = ARMS[arm]
    module = GRPOModule(
        random_policy(),
        Objective(
            advantage=NoBaseline(),
            scale=None,
            ratio=TokenRatio(),
            surrogate=Clipped(clip_low=0.2, clip_high=0.2),
            aggregation=TokenMean(),
            correction=correction,
        ),
        SamplingParams(max_new_tokens=LENGTH, min_new_tokens=LENGTH),
        partial(adamw, lr=3e-3),
        prompts_per_iteration=16,
        group_size=8,
        engine=InexactEngine(deviation),
        evaluation=Evaluation(greedy=False, num_samples=8),
        seed=seed,
    )
    metrics = ("sampler/kl",) if correction else ()
    return train(module, Numbered(), ShareOf("7"), num_updates=num_updates, metrics=metrics, evaluate_every=10)


def outcome(curves: Curves) -> float:
    """What held-out samples of the policy itself are worth at the end."""
    return mean_of_last(curves["held_out"], 3)


EXPERIMENT = Experiment(
    name="sampler_mismatch",
    arms=tuple(ARMS),
    num_updates=70,
    train=train_arm,
    outcome=outcome,
    outcome_label="held-out reward, mean of the last three evaluations",
    comparisons=(
        Comparison(larger="no perturbation", smaller="uncorrected"),
        Comparison(larger="TIS", smaller="uncorrected"),
    ),
    panels=(Panel(x="evaluated", y="held_out", label="held-out reward of the policy"),),
)


if __name__ == "__main__":
    main(EXPERIMENT)
