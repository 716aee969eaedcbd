"""What the loop hands to the update: which tokens, which completions, which prompts, which rewards, which reference."""

from dataclasses import replace

import replay
import torch
from enumeration import far, worst
from lightning.pytorch.callbacks import Callback
from mutants import Mutant, replaced

from grpo_lightning.callbacks.prompt_retirement import PromptRetirement
from grpo_lightning.functional.advantages import group_normalized_advantages
from grpo_lightning.objective import (
    Clipped,
    GroupMean,
    GroupStd,
    Objective,
    SequenceMeanTokenMean,
    TokenRatio,
    TruncatedCompletions,
)
from grpo_lightning.rewards import RewardCallback
from grpo_lightning.types import FinishReason

EOS = 1


class EndedEngine(replay.RecordedEngine):
    """Three completions in four end in the end of sequence; or, with tools, every second one begins with a tool's."""

    has_tools = False

    def _completion(self, slot, sample, coordinates):
        completion = super()._completion(slot, sample, coordinates)
        if self.has_tools and sample % 2 and len(completion.token_ids) > 1:
            loss_mask = (False, *[True] * (len(completion.token_ids) - 1))
            return replace(completion, loss_mask=loss_mask)
        if (slot + sample) % 4 == 0 or self.has_tools:
            return completion
        return replace(
            completion,
            token_ids=(*completion.token_ids, EOS),
            sampler_logprobs=(*completion.sampler_logprobs, -1.0),
            finish_reason=FinishReason.EOS,
        )


class Watch(Callback):
    """What the first update of each iteration learns from."""

    def __init__(self):
        self.iterations = []

    def on_phase(self, trainer, pl_module, phase):
        if phase == "update" and pl_module.outcomes:
            seen = ("rollout", "rewards", "advantages_B", "experience", "outcomes")
            self.iterations.append({name: getattr(pl_module, name) for name in seen})


def run(*, callbacks=(), has_tools=False, **settings):
    watch = Watch()
    module, data, trainer, record = replay.make(callbacks=[watch, *callbacks], dtype="float64", **settings)
    if not settings.get("live"):
        module.engine = EndedEngine()
        module.engine.has_tools = has_tools
    trainer.fit(module, data)
    return module, record, watch.iterations


FILTERED = Objective(
    advantage=GroupMean(),
    scale=GroupStd(ddof=1, epsilon=0.0),
    ratio=TokenRatio(),
    surrogate=Clipped(clip_low=0.2, clip_high=0.2),
    aggregation=SequenceMeanTokenMean(),
    masks=(TruncatedCompletions(),),
)


def test_truncated_completions_are_compared_with_and_not_learned_from(prove):
    def error():
        *_, (iteration,) = run(objective=FILTERED, iterations=1)
        completions = iteration["rollout"].completions
        ended = [c for c in completions if c.token_ids[-1] == EOS]
        samples = list(iteration["experience"].samples())
        (counts,) = iteration["experience"].counts
        rewards_PG = iteration["rewards"].totals_B.view(4, 4)
        want = group_normalized_advantages(rewards_PG, torch.ones(4, 4, dtype=torch.bool), ddof=1, epsilon=0.0)
        return worst(
            abs(len(samples) - len(ended)),
            sum(int(sample.completion_ids[-1]) != EOS for sample in samples),
            abs(sum(int(sample.loss_mask.sum()) for sample in samples) - sum(len(c.token_ids) for c in ended)),
            abs(counts.tokens - sum(len(c.token_ids) for c in ended)),
            abs(counts.sequences - len(ended)),
            far(iteration["advantages_B"], want.flatten()),
        )

    def not_compared_with(groups_of):
        def mutated(rollout, rewards):
            groups = groups_of(rollout, rewards)
            return replace(groups, valid_PG=groups.valid_PG & ~rollout.is_truncated_B.view(groups.valid_PG.shape))

        return mutated

    prove(
        "the end of sequence is a loss token; truncated ones leave the loss and its denominators, not the baseline",
        "DAPO, section 3.4, overlong filtering",
        error,
        replaced(
            "truncated ones kept",
            "objective.mask.TruncatedCompletions.__call__",
            lambda self, is_truncated_B: torch.ones_like(is_truncated_B),
        ),
        Mutant("truncated ones left out of the baseline", "module.scored_groups", not_compared_with),
        Mutant("the end of sequence masked", "batching.minibatches._loss_mask", lambda f: lambda c: f(c) & ~last(f(c))),
        Mutant(
            "denominators of all completions",
            "module.global_counts",
            lambda f: lambda *a: [c._replace(sequences=16) for c in f(*a)],
        ),
    )


def last(mask_T):
    return torch.arange(len(mask_T)) == len(mask_T) - 1


def test_tokens_that_a_tool_wrote_are_not_learned_from(prove):
    objective = replace(FILTERED, masks=())

    def error():
        *_, (iteration,) = run(objective=objective, iterations=1, has_tools=True)
        masks = [c.loss_mask or (True,) * len(c.token_ids) for c in iteration["rollout"].completions]
        (counts,) = iteration["experience"].counts
        samples = list(iteration["experience"].samples())
        assert len(samples) == len(masks) == counts.sequences
        wrong = sum(tuple(s.loss_mask.tolist()) != mask for s, mask in zip(samples, masks, strict=True))
        of_groups = [sum(map(sum, masks[4 * (row // 4) : 4 * (row // 4) + 4])) for row in range(16)]
        return worst(
            wrong,
            abs(counts.tokens - sum(map(sum, masks))),
            *(abs(s.group_tokens - tokens) for s, tokens in zip(samples, of_groups, strict=True)),
        )

    prove(
        "tokens that the policy did not draw have the mask 0, and are in no denominator",
        "multi-turn completions",
        error,
        Mutant(
            "a tool's tokens learned from",
            "batching.minibatches._loss_mask",
            lambda f: lambda c: torch.ones(len(c.token_ids), dtype=torch.bool),
        ),
        Mutant("a tool's tokens counted", "batching.minibatches.num_loss_tokens", lambda f: lambda c: len(c.token_ids)),
        Mutant("shifted by one", "batching.minibatches._loss_mask", lambda f: lambda c: f(c).roll(1)),
    )


def test_no_prompt_is_drawn_twice_in_an_iteration(prove):
    settings = {"iterations": 6, "max_rounds": 3, "num_solved_in_seven": 1}

    def error():
        *_, iterations = run(**settings)
        drawn = [[outcome.prompt_index for outcome in iteration["outcomes"]] for iteration in iterations]
        assert max(map(len, drawn)) == 12, "all prompts in some iteration"
        return float(sum(len(indices) - len(set(indices)) for indices in drawn))

    def the_next_ones(take_others):
        return lambda self, n, *, than: self.take(n)

    prove(
        "refill never draws a prompt twice in one iteration, also where an epoch ends",
        "DAPO, algorithm 1",
        error,
        Mutant(
            "the first round as it comes", "data.stream.PromptStream.take_distinct", lambda f: lambda s, n: s.take(n)
        ),
        Mutant("further rounds as they come", "data.stream.PromptStream.take_others", the_next_ones),
        tolerance=0.0,
    )


def test_a_retired_prompt_is_never_drawn(prove):
    def error():
        *_, iterations = run(
            iterations=8, num_solved_in_seven=4, callbacks=[PromptRetirement(pass_rate=0.6)], max_rounds=2
        )
        learned, again = set(), 0
        for iteration in iterations:
            again += sum(outcome.prompt_index in learned for outcome in iteration["outcomes"])
            passed = {o.prompt_index for o in iteration["outcomes"] if o.num_solved >= 0.6 * o.num_scored}
            # As many prompts as an iteration has are never retired.
            learned |= set(sorted(passed)[: max(0, 8 - len(learned))]) if len(learned | passed) > 8 else passed
        assert len(learned) > 3
        return float(again)

    prove(
        "a prompt whose pass rate has reached the bound is never drawn again",
        "ScaleRL (arXiv 2510.13786), no positive resampling",
        error,
        replaced("not retired", "data.stream.PromptStream.retire", lambda self, index: None),
        tolerance=0.0,
    )


class Unreliable(RewardCallback):
    """By the first token modulo 5: an exception, NaN, not applicable, and the sum of the tokens for the rest."""

    def __init__(self):
        super().__init__("unreliable")

    def score(self, prompts, completions):
        if any(c.token_ids[0] % 5 == 0 for c in completions):
            raise KeyError("a defect of the reward")
        kinds = [c.token_ids[0] % 5 for c in completions]
        values = {1: float("nan"), 2: None}
        return [values[k] if k in values else sum(c.token_ids) / 50 for k, c in zip(kinds, completions, strict=True)]


def test_what_could_not_be_scored_is_left_out_and_counted(prove):
    def error():
        watch = Watch()
        module, data, trainer, record = replay.make(callbacks=[watch], dtype="float64", iterations=1)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, replay.TokenSum)] + [Unreliable()]
        module.objective = replace(FILTERED, masks=())
        trainer.fit(module, data)
        (iteration,) = watch.iterations
        kinds = [c.token_ids[0] % 5 for c in iteration["rollout"].completions]
        assert {0, 1, 2} <= set(kinds)
        errors, advantages_PG = [], iteration["advantages_B"].view(4, 4)
        for row, group in enumerate(torch.tensor(kinds).view(4, 4)):
            scored = group > 2
            errors.append(advantages_PG[row][~scored].abs().sum().item())
            if not scored.any():
                continue
            values = iteration["rewards"].values_BK.view(4, 4)[row][scored]
            want = (values - values.mean()) / values.std() if len(values) > 1 else 0 * values
            errors.append(far(advantages_PG[row][scored], want.flatten()))
        failed = sum(kind in (0, 1) for kind in kinds) / 16
        learned = sum(kind > 2 for kind in kinds)
        return worst(
            *errors,
            abs(record.metrics[0]["reward/failure_ratio"] - failed),  # sixteenths: exact in fp32 too
            abs(iteration["experience"].counts[0].sequences - learned),
        )

    def uncounted(metrics):
        return lambda *args, **settings: {**metrics(*args, **settings), "reward/failure_ratio": 0.0}

    def all_of_them(valid_B):
        return property(lambda self: torch.ones(len(self.values_BK), dtype=torch.bool))

    prove(
        "exception, NaN or not applicable: out of the group's statistics, advantage 0, and failures are counted",
        "a failure is never a reward of 0",
        error,
        Mutant("failures not counted", "module.rollout_metrics", uncounted),
        Mutant("a failure counted as a reward", "types.Rewards.valid_B", all_of_them),
        tolerance=1e-10,
    )


def test_the_reference_is_never_trained(prove):
    def error():
        module, data, trainer, _ = replay.make(iterations=3, num_epochs=2)
        trainer.fit(module, data)
        start = replay.TinyPolicy(torch.float32).load_model(seed=3)
        stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        reference = list(module.reference.parameters())
        return worst(
            sum(id(p) in stepped or p.requires_grad or p.grad is not None for p in reference),
            *(far(p, q) for p, q in zip(reference, start.parameters(), strict=True)),
        )

    def of_everything(configure):
        def mutated(self):
            make = self.make_optimizer
            self.make_optimizer = lambda parameters: make(list(self.parameters()))
            return configure(self)

        return mutated

    prove(
        "the reference has no gradient, is in no optimizer, and stays what it was",
        "DeepSeekMath, equation 3",
        error,
        Mutant("all weights in the optimizer", "module.GRPOModule.configure_optimizers", of_everything),
        Mutant(
            "not frozen",
            "models.frozen_copy",
            lambda f: lambda *a: f(*a).requires_grad_(True),
        ),
        Mutant(
            "the policy itself",
            "models.frozen_copy",
            lambda f: lambda policy: policy,
        ),
        tolerance=0.0,
    )
