"""The updates of whole runs against the papers: from the weights to the gradient that the optimizer is given."""

import pytest
import replay
import torch
from papers.batches import Answer, Token
from papers.formulas import PAPERS
from torch.nn.utils import parameters_to_vector, vector_to_parameters

SETTINGS = {"dtype": "float64", "iterations": 2, "num_minibatches": 2, "with_steps": True, "group_size": 8}
"""Rewards of 0 and 1, with steps; four prompts in two minibatches, each in three micro-batches."""


def logprobs(module, weights) -> list[torch.Tensor]:
    """Of each completion of the last rollout, the log-probability of its tokens: each by itself, without padding."""
    vector_to_parameters(weights, module.policy.parameters())
    rows = []
    for prompt, completion in zip(module.rollout.completion_prompts, module.rollout.completions, strict=True):
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        logits = module.policy.model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]
        rows.append(logits.log_softmax(dim=-1)[range(len(logits)), list(completion.token_ids)])
    return rows


def answers(module, now, old, reference) -> list[list[Answer]]:
    """The last rollout as a paper sees it."""
    group = []
    for b, completion in enumerate(module.rollout.completions):
        tokens = [
            Token(t, now[b][t], old[b][t].item(), completion.sampler_logprobs[t], reference[b][t].item())
            for t in range(len(completion.token_ids))
        ]
        steps = module.rewards.steps["steps"][b]
        scores = {
            "correct": module.rewards.values_BK[b, 0].item(),
            "format": None,
            "steps": dict(zip(steps.end_positions, steps.scores, strict=True)),
        }
        group.append(Answer(scores, len(tokens) - 1, tokens))
    return [group[i : i + 8] for i in range(0, len(group), 8)]


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_an_update_ascends_the_paper_s_objective(name):
    """Of the second iteration, so that the reference is another policy; at the second update the old one is too."""
    record, module = replay.run(objective=name, **SETTINGS, accumulate=3, num_solved_in_seven=3)
    first = parameters_to_vector(module.source.load_model(seed=module.seed).parameters()).detach()
    reference, old = logprobs(module, first), logprobs(module, record.weights[1])
    for update, part in ((2, 0), (3, 1)):
        now = logprobs(module, record.weights[update - 1])
        groups = answers(module, now, old, reference)
        objective = PAPERS[name](groups[2 * part : 2 * part + 2], groups)
        wanted = torch.autograd.grad(-objective, list(module.policy.parameters()))
        wanted = torch.cat([gradient.flatten() for gradient in wanted])
        assert wanted.norm() > 0
        # The forward is of other shapes, in fp64 but for the reference's norms, which transformers takes in fp32.
        assert (record.gradients[update] - wanted).norm() / wanted.norm() < 1e-8
