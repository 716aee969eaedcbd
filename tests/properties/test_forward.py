"""The training forward: the sampler's log-probabilities, whatever else is in the batch."""

from dataclasses import dataclass, replace
from math import exp, log

import pytest
import torch
from enumeration import far, worst
from mutants import Mutant

from grpo_lightning.batching import Experience, Forward, IterationShape, cut_into_minibatches, sampler_logprobs
from grpo_lightning.batching.padded import Padded, padded
from grpo_lightning.policy import CharacterPolicy, Policy
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import (
    Coordinates,
    FinishReason,
    GenerationRequest,
    MinibatchCounts,
    Prompt,
    Rollout,
    SamplingParams,
    Stream,
)

CPU = torch.device("cpu")
TEMPERATURE = 0.7
PROMPTS = ((3, 4, 5), (6, 7), (8, 9, 10, 11, 4), (6, 7))
GROUP_SIZE = 4


def policy_of(dtype):
    """Peaked enough that a wrong temperature, or a token too many, is seen."""
    source = CharacterPolicy(
        "0123456789+=", hidden_size=32, num_layers=2, num_heads=4, max_positions=256, init_std=0.15
    )
    return Policy(source.load_model(seed=0).to(dtype), source.load_tokenizer())


def drawn(policy):
    """Groups of ragged completions, some of which end in the end of sequence."""
    engine = InProcessEngine()
    engine.setup(policy.model, policy.tokenizer, policy.eos_token_ids)
    requests = [GenerationRequest(slot=s, token_ids=ids, num_completions=GROUP_SIZE) for s, ids in enumerate(PROMPTS)]
    sampling = SamplingParams(temperature=TEMPERATURE, max_new_tokens=12)
    completions = engine.generate(requests, sampling, Coordinates(seed=0, stream=Stream.TRAINING, iteration=0))
    engine.close()
    assert {completion.finish_reason for completion in completions} == {FinishReason.EOS, FinishReason.LENGTH}
    prompts = tuple(Prompt(index=s, token_ids=ids, text="") for s, ids in enumerate(PROMPTS))
    return Rollout(iteration=0, slots=(0, 1, 2, 3), prompts=prompts, completions=tuple(completions))


def experience_of(rollout, num_bins=1):
    shape = IterationShape(prompts_per_iteration=len(PROMPTS), group_size=GROUP_SIZE, num_epochs=1, num_minibatches=1)
    learned_B = torch.ones(len(rollout.completions), dtype=torch.bool)
    return Experience.build(
        iteration=0,
        minibatches=cut_into_minibatches(rollout, learned_B, shape),
        counts=[MinibatchCounts(1, 1, 1)],
        metrics={},
        accumulate_grad_batches=num_bins,
        layout=Padded(),
    )


def scored(policy, rollout, *, num_bins=1, max_tokens=None):
    """By place, the log-probabilities of the training forward."""
    forward = Forward(layout=Padded(), temperature=TEMPERATURE, max_tokens=max_tokens, device=CPU)
    return forward.logprobs(policy, experience_of(rollout, num_bins))


def differences(scores, others):
    """Of every token; one that has no score has the log-probability 0."""
    assert scores.keys() == others.keys()
    rows = [torch.nn.utils.rnn.pad_sequence([scores[p].double(), others[p].double()]) for p in others]
    return torch.cat([row[:, 0] - row[:, 1] for row in rows])


def another_temperature(forward):
    return lambda self, batch, temperature, **settings: forward(self, batch, 1.0, **settings)


def begins_twice(lay_out):
    return lambda prompts, completions, device: lay_out([torch.cat((p[:1], p)) for p in prompts], completions, device)


def shifted(lay_out):
    def mutated(*args):
        batch = lay_out(*args)
        return batch._replace(positions_N=(batch.positions_N + 1).clamp(max=batch.input_ids_RL.numel() - 1))

    return mutated


def last_forgotten(sample):
    def mutated(**parts):
        shorter = {name: parts[name][:-1] for name in ("completion_ids", "loss_mask")}
        return sample(**(parts | shorter if len(parts["completion_ids"]) > 1 else parts))

    return mutated


def one_row(forward):
    """All rows of a batch read as one: the positions are those of the flattened batch anyway."""

    def mutated(self, batch, *args, **settings):
        return forward(self, batch._replace(input_ids_RL=batch.input_ids_RL.flatten()[None]), *args, **settings)

    return mutated


WRONG_TOKENS = (
    Mutant("another temperature", "policy.policy.Policy.forward", another_temperature),
    Mutant("the first token twice", "batching.padded.padded", begins_twice),
    Mutant("shifted by one", "batching.padded.padded", shifted),
    Mutant("without the end of sequence", "batching.minibatches.Sample", last_forgotten),
)


def test_the_sampler_s_logprobs_are_the_trainer_s(prove):
    policy = policy_of(torch.float32)
    rollout = drawn(policy)

    def error():
        return differences(scored(policy, rollout), sampler_logprobs(rollout)).abs().max().item()

    # fp32, decoding step by step with a cache against one forward: sums in another order.
    prove(
        "log_softmax(logits/T) of the training forward is what the sampler drew from, to 1e-5 in fp32",
        "DeepSeekMath, equation 3: the ratio of the first update is 1",
        error,
        *WRONG_TOKENS,
        tolerance=1e-5,
    )


def test_in_half_precision_they_differ_by_rounding(prove):
    policy = policy_of(torch.bfloat16)
    rollout = drawn(policy)

    def error():
        gaps = differences(scored(policy, rollout), sampler_logprobs(rollout))
        mean, divergence = gaps.abs().mean().item(), (gaps.exp() - gaps - 1).mean().item()
        # In units of each bound: mean |difference|, its exponential, and k3 between sampler and trainer.
        return worst(mean / 0.02, (exp(mean) - 1) / 0.02, divergence / 1e-3)

    prove(
        "in bf16 the two differ by at most 0.02 in the mean, and by a divergence of 1e-3",
        "sampler and trainer (arXiv 2510.26788)",
        error,
        *WRONG_TOKENS,
        tolerance=1.0,
        caught_factor=5,
    )


def test_half_precision_ends_at_the_logits(prove):
    policy = policy_of(torch.bfloat16)
    samples = list(experience_of(drawn(policy)).samples())
    batch = padded([s.prompt_ids for s in samples], [s.completion_ids for s in samples], CPU)

    def error():
        scores = policy(batch, TEMPERATURE)
        if {scores.logprobs_BT.dtype, scores.entropy_BT.dtype} != {torch.float32}:
            return float("inf")
        with torch.no_grad():
            logits_RLV = policy.model(input_ids=batch.input_ids_RL).logits.double() / TEMPERATURE
        logprobs_NV = logits_RLV.flatten(0, 1)[batch.positions_N].log_softmax(dim=-1)
        want_N = logprobs_NV.gather(1, batch.targets_N[:, None]).squeeze(1)
        return far(scores.logprobs_BT[batch.rows_N, batch.columns_N].double(), want_N)

    def in_half_precision(forward):
        return lambda *args, **settings: type(scores := forward(*args, **settings))(*(x.bfloat16() for x in scores))

    def rounded(forward):
        return lambda *args, **settings: type(scores := forward(*args, **settings))(
            *(x.bfloat16().float() for x in scores)
        )

    # The logits are what the bf16 model says; what is made of them is rounded to fp32, not to bf16.
    prove(
        "the log-probabilities of a bf16 policy are fp32, and those of its logits to 1e-5",
        "sampler and trainer (arXiv 2510.26788)",
        error,
        Mutant("in bf16", "policy.policy.Policy.forward", in_half_precision),
        Mutant("rounded to bf16", "policy.policy.Policy.forward", rounded),
        tolerance=1e-5,
        caught_factor=100,
    )


def test_neighbours_and_order_do_not_enter(prove):
    policy = policy_of(torch.float64)
    rollout = drawn(policy)

    def error():
        alone = {}
        for sample in experience_of(rollout).samples():
            batch = padded([sample.prompt_ids], [sample.completion_ids], CPU)
            alone[sample.place] = policy(batch, TEMPERATURE).logprobs_BT[0].detach()
        others = replace(rollout.completions[0], token_ids=(5, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9))
        neighbour = replace(rollout, completions=(others, *rollout.completions[1:]))
        changed = scored(policy, neighbour)
        changed[0, 0] = alone[0, 0]
        together = (
            scored(policy, rollout),
            scored(policy, rollout, num_bins=3),  # sorted by length
            scored(policy, rollout, max_tokens=30),  # in pieces, the longest first
            changed,
        )
        return worst(differences(scores, alone).abs().max().item() for scores in together)

    def swapped(by_place):
        return lambda samples, values_BT: by_place(samples, values_BT.flip(0))

    prove(
        "a completion by itself, among others, sorted by length or in pieces: the same log-probabilities",
        "no attention across completions",
        error,
        Mutant("rows read as one", "policy.policy.Policy.forward", one_row),
        Mutant("scores in another order", "batching.forward._by_place", swapped),
        tolerance=1e-12,
    )


@dataclass
class Padding:
    """A batch with more columns on the right, and other tokens where there is padding."""

    filling: int
    columns: int

    def __call__(self, batch, lengths):
        width = batch.input_ids_RL.shape[1]
        wider = torch.nn.functional.pad(batch.input_ids_RL, (0, self.columns), value=self.filling)
        is_padding = torch.arange(width + self.columns) >= torch.tensor(lengths)[:, None]
        row_of_N = batch.positions_N // width
        return batch._replace(
            input_ids_RL=wider.masked_fill(is_padding, self.filling),
            positions_N=batch.positions_N + row_of_N * self.columns,
        )


def test_padding_tokens_do_not_enter_the_weights_gradient(prove):
    policy = policy_of(torch.float64)
    samples = list(experience_of(drawn(policy)).samples())
    prompts, completions = [s.prompt_ids for s in samples], [s.completion_ids for s in samples]
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    weights_BT = torch.randn(
        len(samples), max(map(len, completions)), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def outcome(batch, weights_BT):
        """The loss, its gradient, and how strongly it asks for the states that predict no completion token."""
        states = []
        hook = policy.model.base_model.register_forward_hook(
            lambda module, args, out: states.append(out.last_hidden_state)
        )
        loss = (policy(batch, TEMPERATURE).logprobs_BT * weights_BT).sum()
        hook.remove()
        *slopes, of_states_RLD = torch.autograd.grad(loss, [*policy.parameters(), states[0]])
        others = of_states_RLD.flatten(0, 1).index_fill(0, batch.positions_N, 0.0)
        return loss.detach(), torch.cat([slope.flatten() for slope in slopes]), others.abs().max().item()

    def error():
        together = padded(prompts, completions, CPU)
        alone = [
            outcome(padded([p], [c], CPU), w[None, : len(c)])
            for p, c, w in zip(prompts, completions, weights_BT, strict=True)
        ]
        losses, slopes = (sum(part[i] for part in alone) for i in (0, 1))
        errors = []
        for change in (Padding(0, 0), Padding(7, 0), Padding(1, 5)):
            loss, slope, of_others = outcome(change(together, lengths), weights_BT)
            errors += [far(loss, losses) / 10, far(slope, slopes) / slopes.norm().item(), of_others]
        return worst(errors)

    prove(
        "padding of any length and content: each completion's own loss and gradient; prompts have no loss term",
        "the padded layout",
        error,
        Mutant("rows read as one", "policy.policy.Policy.forward", one_row),
        Mutant("rows begin with padding", "policy.policy.Policy.forward", moved_to_the_right),
        tolerance=1e-12,
    )


def in_bits(forward):
    def mutated(*args, **settings):
        scores = forward(*args, **settings)
        return scores._replace(entropy_BT=scores.entropy_BT / log(2))

    return mutated


def one_position_earlier(forward):
    def mutated(self, batch, *args, **settings):
        return forward(self, batch._replace(positions_N=batch.positions_N - 1), *args, **settings)

    return mutated


def moved_to_the_right(forward):
    def mutated(self, batch, *args, **settings):
        return forward(self, batch._replace(input_ids_RL=batch.input_ids_RL.roll(1, 1)), *args, **settings)

    return mutated


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_entropy_is_that_of_the_logits(prove, temperature):
    policy = policy_of(torch.float64)
    samples = list(experience_of(drawn(policy)).samples())[:3]

    def error():
        errors = []
        for sample in samples:
            batch = padded([sample.prompt_ids], [sample.completion_ids], CPU)
            logits_LV = policy.model(input_ids=batch.input_ids_RL).logits[0, len(sample.prompt_ids) - 1 : -1]
            probabilities_TV = (logits_LV / temperature).softmax(dim=-1)
            want_T = -(probabilities_TV * probabilities_TV.log()).sum(dim=-1)
            errors.append(far(policy(batch, temperature).entropy_BT[0], want_T))
        return worst(errors)

    prove(
        f"H = -sum p log p of the distribution that the token was drawn from (T = {temperature})",
        "Shannon 1948",
        error,
        Mutant("in bits", "policy.policy.Policy.forward", in_bits),
        Mutant("one position earlier", "policy.policy.Policy.forward", one_position_earlier),
    )
