"""Objectives whose ratio is of the whole completion. Each function is the objective of one minibatch, see `grpo`."""

from math import prod

from papers.arithmetic import Number, clip, exp, flat, min_clip, normalised, sg, tokens_of
from papers.batches import Answer, Groups


def gspo(minibatch: Groups, iteration: Groups) -> Number:
    """GSPO, equations 5 to 7: the clipped geometric mean of the ratios, bounds 3e-4 and 4e-4."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            total += min_clip(_geometric_mean(answer), advantage, 3e-4, 4e-4)
    return total / len(flat(minibatch))


def gspo_token(minibatch: Groups, iteration: Groups) -> Number:
    """GSPO, equations 13 and 14: s_it = sg[s_i] pi(o_t) / sg[pi(o_t)]."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                ratio = sg(_geometric_mean(answer)) * exp(token.now) / sg(exp(token.now))
                total += min_clip(ratio, advantage, 3e-4, 4e-4) / len(answer.tokens)
    return total / len(flat(minibatch))


def luspo(minibatch: Groups, iteration: Groups) -> Number:
    """LUSPO: the loss of GSPO times |o|, bounds 2e-3 and 2.5e-3."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            total += len(answer.tokens) * min_clip(_geometric_mean(answer), advantage, 2e-3, 2.5e-3)
    return total / len(flat(minibatch))


def gmpo(minibatch: Groups, iteration: Groups) -> Number:
    """GMPO: the geometric mean of ratios that were each clipped to (e^-0.4, e^0.4), pessimistically."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            sign = 1 if advantage > 0 else -1
            signed = [exp(token.now - token.old) ** sign for token in answer.tokens]
            held = [min(ratio, clip(ratio, exp(-0.4), exp(0.4))) ** sign for ratio in signed]
            total += prod(held) ** (1 / len(held)) * advantage
    return total / len(flat(minibatch))


def vespo(minibatch: Groups, iteration: Groups) -> Number:
    """VESPO: sg[W^k e^(lambda (1 - W))] A log pi, W = pi / mu of the whole completion; mean over all tokens."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            k, rate = (2, 3) if advantage >= 0 else (3, 2)
            ratio = prod(exp(sg(token.now) - token.sampler) for token in answer.tokens)
            kernel = ratio**k * exp(rate * (1 - ratio))
            for token in answer.tokens:
                total += kernel * advantage * token.now
    return total / len(list(tokens_of(minibatch)))


def _geometric_mean(answer: Answer) -> Number:
    """(pi(o) / pi_old(o))^(1 / |o|)."""
    return prod(exp(token.now - token.old) for token in answer.tokens) ** (1 / len(answer.tokens))
