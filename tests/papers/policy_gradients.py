"""Objectives that clip nothing: weighted or plain log-likelihood, and a soft gate. See `grpo` for the arguments."""

from papers.arithmetic import (
    Number,
    centred,
    exp,
    flat,
    is_mixed,
    leave_one_out,
    mean,
    normalised,
    rewards,
    sg,
    std,
)
from papers.batches import Groups


def cispo(minibatch: Groups, iteration: Groups) -> Number:
    """MiniMax-M1, equations 4 and 5: sg[min(rho, 5)] A log pi, mean over the tokens of each group."""
    prompts = [group for group in minibatch if group]
    total = 0.0
    for group in prompts:
        inner = 0.0
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                inner += min(exp(sg(token.now) - token.old), 5.0) * advantage * token.now
        total += inner / sum(len(answer.tokens) for answer in group)
    return total / len(prompts)


def scalerl(minibatch: Groups, iteration: Groups) -> Number:
    """ScaleRL: CISPO with rho = pi / mu, the deviation of the batch's advantages, no groups without a signal."""
    deviation = std([a for group in iteration if is_mixed(group) for a in centred(group)])
    prompts = [group for group in minibatch if is_mixed(group)]
    total = 0.0
    for group in prompts:
        inner = 0.0
        for answer, advantage in zip(group, centred(group), strict=True):
            for token in answer.tokens:
                weight = min(exp(sg(token.now) - token.sampler), 5.0)
                inner += weight * advantage / (deviation + 1e-6) * token.now
        total += inner / sum(len(answer.tokens) for answer in group)
    return total / len(prompts)


def sapo(minibatch: Groups, iteration: Groups) -> Number:
    """SAPO: (4 / tau) sigmoid(tau (rho - 1)) A, tau 1 where A > 0 and 1.05 elsewhere."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            tau = 1.0 if advantage > 0 else 1.05
            for token in answer.tokens:
                ratio = exp(token.now - token.old)
                total += 4 / tau / (1 + exp(-tau * (ratio - 1))) * advantage / len(answer.tokens)
    return total / len(flat(minibatch))


def rloo(minibatch: Groups, iteration: Groups) -> Number:
    """Back to Basics: R = r - beta log(pi_old / pi_ref) of the whole completion, less the mean of the others'."""
    total = 0.0
    for group in minibatch:
        penalised = [
            answer.total - 0.03 * sum(token.old - token.reference for token in answer.tokens) for answer in group
        ]
        for answer, advantage in zip(group, leave_one_out(penalised), strict=True):
            total += advantage * sum(token.now for token in answer.tokens)
    return total / len(flat(minibatch))


def opo(minibatch: Groups, iteration: Groups) -> Number:
    """OPO: the baseline is the mean of the rewards, weighted by length; nothing is divided."""
    total = 0.0
    for group in minibatch:
        length = sum(len(answer.tokens) for answer in group)
        baseline = sum(len(answer.tokens) * answer.total / length for answer in group)
        for answer in group:
            total += (answer.total - baseline) * sum(token.now for token in answer.tokens)
    return total / len(flat(minibatch))


def gpg(minibatch: Groups, iteration: Groups) -> Number:
    """GPG, equations 5 to 8: alpha (r - mean), alpha = B / (B - M), M of the batch's B in groups of equal rewards."""
    size = len(flat(iteration))
    alpha = size / (size - sum(len(group) for group in iteration if not is_mixed(group)))
    prompts = [group for group in minibatch if group]
    total = 0.0
    for group in prompts:
        inner = 0.0
        for answer, advantage in zip(group, centred(group), strict=True):
            for token in answer.tokens:
                inner += alpha * advantage * token.now
        total += inner / sum(len(answer.tokens) for answer in group)
    return total / len(prompts)


def maxrl(minibatch: Groups, iteration: Groups) -> Number:
    """Maximum Likelihood RL: (r - mean) / mean, 0 where nothing succeeds."""
    total = 0.0
    for group in minibatch:
        for answer in group:
            success = mean(rewards(group))
            advantage = (answer.total - success) / success if success else 0.0
            total += advantage * sum(token.now for token in answer.tokens)
    return total / len(flat(minibatch))
