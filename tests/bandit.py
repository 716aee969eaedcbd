"""Six arms through the real loop: a language model of six tokens that completes one prompt with a single token."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from grpo_lightning import GRPOModule
from grpo_lightning.data import PromptDataModule
from grpo_lightning.objective import KLPenalty, LeaveOneOut, NoBaseline, NoRatio, Objective, Reinforce, SequenceSum
from grpo_lightning.policy import CharacterPolicy, Policy, PretrainedPolicy
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.rollout import RolloutEngine
from grpo_lightning.types import (
    Coefficients,
    Completion,
    FinishReason,
    LossBatch,
    LossOutput,
    MinibatchCounts,
    SamplingParams,
    TokenScores,
)

BETA = 0.5
REWARDS = (1.0, 0.2, -0.4, 0.6, 0.0, -0.1)
"""Of the arms, the tokens 0 to 5: the end of sequence is one of them."""
PROMPT = "a"


class Arm(RewardCallback):
    """The reward of the arm that was pulled."""

    def __init__(self) -> None:
        super().__init__("arm")

    def score(self, prompts, completions):
        return [REWARDS[completion.token_ids[0]] for completion in completions]


class OnePrompt(PromptDataModule):
    """The same prompt in every row."""

    def rows(self, split):
        return [{"prompt": PROMPT}] * (2048 if split == "train" else 0)


class EveryArm(RolloutEngine):
    """Pulls each arm once."""

    def setup(self, model, tokenizer, eos_token_ids):
        pass

    def generate(self, requests, sampling, coordinates):
        return [
            Completion(token_ids=(arm,), sampler_logprobs=(0.0,), text=str(arm), finish_reason=FinishReason.LENGTH)
            for _ in requests
            for arm in range(len(REWARDS))
        ]

    def update_weights(self, named_tensors, version):
        pass


@dataclass(frozen=True, kw_only=True)
class Expected(Objective):
    """The objective's own loss of each completion, weighed by the probability that the policy draws it."""

    def loss(
        self, scores: TokenScores, batch: LossBatch, counts: MinibatchCounts, coefficients: Coefficients
    ) -> LossOutput:
        def of_arm(arm: int) -> LossOutput:
            row = slice(arm, arm + 1)
            own_scores = TokenScores(*(part[row] for part in scores))
            own_batch = LossBatch(*(None if part is None else part[row] for part in batch))
            return super(Expected, self).loss(own_scores, own_batch, counts._replace(sequences=1), coefficients)

        outputs = [of_arm(arm) for arm in range(len(batch.mask_BT))]
        probabilities = scores.logprobs_BT.detach().exp().flatten()
        loss = sum(p * output.loss for p, output in zip(probabilities, outputs, strict=True))
        return LossOutput(loss, outputs[0].statistics)


def reference(folder: Path) -> str:
    """A policy folder whose arms are far from equally likely."""
    source = CharacterPolicy("abc", hidden_size=8, num_layers=1, num_heads=2, max_positions=8, init_std=0.6)
    Policy(source.load_model(seed=1), source.load_tokenizer()).save(folder)
    return str(folder)


def parts(kl: KLPenalty) -> dict:
    return {"scale": None, "ratio": NoRatio(), "surrogate": Reinforce(), "aggregation": SequenceSum(), "kl": kl}


def exact(kl: KLPenalty) -> Objective:
    """Every arm counts by its probability, which makes a baseline superfluous."""
    return Expected(advantage=NoBaseline(), **parts(kl))


def sampled(kl: KLPenalty) -> Objective:
    """The mean of the others as baseline: the policy gradient without a bias."""
    return Objective(advantage=LeaveOneOut(), **parts(kl))


def train(path: str, objective: Objective, *, steps: int, optimizer: Callable, seed: int = 0, **settings) -> Tensor:
    """The probabilities of the arms at the end of a run that begins at the reference, in fp64."""
    module = GRPOModule(
        PretrainedPolicy(path, dtype="float64"),
        objective,
        SamplingParams(max_new_tokens=1),
        optimizer,
        seed=seed,
        **settings,
    )
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Arm()],
    )
    trainer.fit(module, OnePrompt())
    return probabilities(module.policy)


def probabilities(policy: Policy) -> Tensor:
    """Of the arms, fp64."""
    ids = torch.tensor([policy.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return policy.model(input_ids=ids).logits[0, -1].double().softmax(0)


def probabilities_of(path: str) -> Tensor:
    source = PretrainedPolicy(path, dtype="float64")
    return probabilities(Policy(source.load_model(seed=0), source.load_tokenizer()))


def tilted(reference_V: Tensor, beta: float = BETA) -> Tensor:
    """pi_ref exp(R / beta) / Z."""
    return (reference_V.log() + torch.tensor(REWARDS, dtype=torch.float64) / beta).softmax(0)


def hyperbolic(reference_V: Tensor, beta: float = BETA) -> Tensor:
    """beta pi_ref / (lambda - R), with lambda such that it sums to 1, by bisection."""
    rewards_V = torch.tensor(REWARDS, dtype=torch.float64)
    low, high = rewards_V.max().item(), rewards_V.max().item() + beta
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference_V / (middle - rewards_V)).sum() > 1 else (low, middle)
    return beta * reference_V / (high - rewards_V)


def total_variation(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().sum().item() / 2
