"""GRPO and its relatives with the clipped ratio of a token. Each function is the objective of one minibatch.

`minibatch` has the groups of an update, `iteration` those of the whole iteration, which statistics over the batch are
of. A completion whose reward failed is in neither.
"""

from math import comb, sqrt

from papers.arithmetic import (
    Number,
    centred,
    clip,
    exp,
    flat,
    is_mixed,
    k3,
    leave_one_out,
    mean,
    min_clip,
    normalised,
    rewards,
    sg,
    std,
    tokens_of,
)
from papers.batches import WEIGHTS, Answer, Groups


def deepseekmath(minibatch: Groups, iteration: Groups) -> Number:
    """DeepSeekMath, equation 3: mean over completions of the mean over tokens, k3 in the loss, beta 0.04."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                ratio = exp(token.now - token.old)
                total += (min_clip(ratio, advantage, 0.2, 0.2) - 0.04 * k3(token)) / len(answer.tokens)
    return total / len(flat(minibatch))


def deepseekmath_process(minibatch: Groups, iteration: Groups) -> Number:
    """DeepSeekMath, section 4.1.3: step scores normalised over the group's, and the sum of those that follow."""
    total = 0.0
    for group in minibatch:
        pool = [score for answer in group for score in answer.steps.values()]
        for answer in group:
            normal = {end: (score - mean(pool)) / (std(pool) + 1e-6) for end, score in answer.steps.items()}
            for token in answer.tokens:
                advantage = sum(score for end, score in normal.items() if end >= token.position)
                ratio = exp(token.now - token.old)
                total += (min_clip(ratio, advantage, 0.2, 0.2) - 0.04 * k3(token)) / len(answer.tokens)
    return total / len(flat(minibatch))


def r1_zero(minibatch: Groups, iteration: Groups) -> Number:
    """DeepSeek-R1, equation 1, token by token: clip(rho, -9, 11), beta 0.001."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                ratio = exp(token.now - token.old)
                surrogate = min(ratio * advantage, clip(ratio, -9, 11) * advantage)
                total += (surrogate - 0.001 * k3(token)) / len(answer.tokens)
    return total / len(flat(minibatch))


def dr_grpo(minibatch: Groups, iteration: Groups) -> Number:
    """Understanding R1-Zero-Like Training: no deviation, a constant budget of 3000 tokens instead of |o|."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, centred(group), strict=True):
            for token in answer.tokens:
                total += min_clip(exp(token.now - token.old), advantage, 0.2, 0.2) / 3000
    return total / len(flat(minibatch))


def dapo(minibatch: Groups, iteration: Groups) -> Number:
    """DAPO, equation 8: an expectation over prompts with 0 < correct < G of the mean over the group's tokens."""
    prompts = [group for group in minibatch if is_mixed(group)]
    total = 0.0
    for group in prompts:
        inner = 0.0
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                inner += min_clip(exp(token.now - token.old), advantage, 0.2, 0.28)
        total += inner / sum(len(answer.tokens) for answer in group)
    return total / len(prompts)


def lite_ppo(minibatch: Groups, iteration: Groups) -> Number:
    """Part I: Tricks or Traps?: mean of the group, deviation of all rewards of the batch, mean over all tokens."""
    deviation = std(rewards(flat(iteration)))
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, centred(group), strict=True):
            for token in answer.tokens:
                total += min_clip(exp(token.now - token.old), advantage / (deviation + 1e-6), 0.2, 0.2)
    return total / len(list(tokens_of(minibatch)))


def default(minibatch: Groups, iteration: Groups) -> Number:
    """Deviation of the batch's advantages, clip-higher, weights min(pi_old / mu, 2), no groups without a signal."""
    deviation = std([a for group in iteration if is_mixed(group) for a in centred(group)])
    total, count = 0.0, 0
    for group in minibatch:
        if is_mixed(group):
            for answer, advantage in zip(group, centred(group), strict=True):
                for token in answer.tokens:
                    weight = min(exp(token.old - token.sampler), 2.0)
                    surrogate = min_clip(exp(token.now - token.old), advantage / (deviation + 1e-6), 0.2, 0.28)
                    total += weight * surrogate
                    count += 1
    return total / count


def two_sided(minibatch: Groups, iteration: Groups) -> Number:
    """INTELLECT-2: min[min(rho, delta) A, clip(rho) A], delta 4, beta 0.001."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, normalised(group), strict=True):
            for token in answer.tokens:
                ratio = exp(token.now - token.old)
                bounded, clipped = min(ratio, 4.0), clip(ratio, 1 - 0.2, 1 + 0.2)
                total += min(bounded * advantage, clipped * advantage) - 0.001 * k3(token)
    return total / len(list(tokens_of(minibatch)))


def deepseek_v32(minibatch: Groups, iteration: Groups) -> Number:
    """DeepSeek-V3.2, scaling GRPO: rho = pi / mu weighs k3, and a bad completion that was left behind is masked."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, centred(group), strict=True):
            drift = mean([token.sampler - sg(token.now) for token in answer.tokens])
            kept = not (advantage < 0 and drift > 0.5)
            for token in answer.tokens:
                ratio = exp(token.now - token.sampler)
                surrogate = kept * min_clip(ratio, advantage, 0.2, 0.2)
                total += (surrogate - 0.001 * ratio * k3(token)) / len(answer.tokens)
    return total / len(flat(minibatch))


def gdpo(minibatch: Groups, iteration: Groups) -> Number:
    """GDPO: each reward normalised in its group, the weighted sum whitened over the batch."""
    sums = [[sum(parts) for parts in zip(*_columns(group), strict=True)] for group in iteration]
    everyone = [value for group in sums for value in group]
    total = 0.0
    for group in minibatch:
        place = next(i for i, other in enumerate(iteration) if other is group)
        for answer, value in zip(group, sums[place], strict=True):
            advantage = (value - mean(everyone)) / (std(everyone) + 1e-6)
            for token in answer.tokens:
                total += min_clip(exp(token.now - token.old), advantage, 0.2, 0.2) / len(answer.tokens)
    return total / len(flat(minibatch))


def _columns(group: list[Answer]) -> list[list[float]]:
    """Per reward, w (r - mean) / std of each completion; 0 where the reward does not apply."""
    result = []
    for name, weight in WEIGHTS.items():
        known = [answer.reward(name) for answer in group if answer.reward(name) is not None]
        normal = [
            0.0 if answer.reward(name) is None else (answer.reward(name) - mean(known)) / (std(known) + 1e-6)
            for answer in group
        ]
        result.append([weight * value for value in normal])
    return result


def pass_at_k(minibatch: Groups, iteration: Groups) -> Number:
    """Pass@k Training, analytical derivation, k = 4, with the surrogate of DAPO and the mean over all tokens."""
    total = 0.0
    for group in minibatch:
        right = [answer.total >= 1.0 for answer in group]
        size, wrong = len(group), right.count(False)
        for answer, is_right in zip(group, right, strict=True):
            advantage = 0.0
            if size >= 4 and 0 < wrong < size:
                mean_reward = 1 - comb(wrong, 4) / comb(size, 4)
                deviation = sqrt(mean_reward * (1 - mean_reward))
                fails = 0.0 if is_right else comb(wrong - 1, 3) / comb(size - 1, 3)
                advantage = (1 - mean_reward - fails) / (deviation + 1e-6)
            for token in answer.tokens:
                total += min_clip(exp(token.now - token.old), advantage, 0.2, 0.28)
    return total / len(list(tokens_of(minibatch)))


def ppo_kl_in_reward(minibatch: Groups, iteration: Groups) -> Number:
    """DeepSeekMath, equations 1 and 2, gamma = lambda = 1; the mean of the others stands for the critic."""
    total = 0.0
    for group in minibatch:
        for answer, advantage in zip(group, leave_one_out(rewards(group)), strict=True):
            for token in answer.tokens:
                credit = advantage - 0.04 * _penalty_to_go(answer, token.position)
                total += min_clip(exp(token.now - token.old), credit, 0.2, 0.2) / len(answer.tokens)
    return total / len(flat(minibatch))


def reinforce_pp(minibatch: Groups, iteration: Groups) -> Number:
    """REINFORCE++, equations 8 to 10: returns less the divergence to go, whitened over all tokens of the batch."""

    def credit(answer: Answer, position: int) -> float:
        return answer.total - 0.01 * _penalty_to_go(answer, position)

    everyone = [credit(answer, token.position) for answer in flat(iteration) for token in answer.tokens]
    total = 0.0
    for answer in flat(minibatch):
        for token in answer.tokens:
            advantage = (credit(answer, token.position) - mean(everyone)) / (std(everyone) + 1e-8)
            total += min_clip(exp(token.now - token.old), advantage, 0.2, 0.2)
    return total / len(list(tokens_of(minibatch)))


def reinforce_pp_baseline(minibatch: Groups, iteration: Groups) -> Number:
    """REINFORCE++ with baseline: less the group's mean, whitened over all tokens of the batch; k2 in the loss."""
    pairs = [pair for group in iteration if group for pair in zip(group, centred(group), strict=True)]
    everyone = [advantage for answer, advantage in pairs for _ in answer.tokens]
    total = 0.0
    for group in minibatch:
        for answer, value in zip(group, centred(group), strict=True):
            advantage = (value - mean(everyone)) / (std(everyone) + 1e-8)
            for token in answer.tokens:
                k2 = (token.now - token.reference) ** 2 / 2
                total += min_clip(exp(token.now - token.old), advantage, 0.2, 0.2) - 0.001 * k2
    return total / len(list(tokens_of(minibatch)))


def _penalty_to_go(answer: Answer, position: int) -> float:
    """The sum of k1 = log pi_old - log pi_ref over the token at a position and those that follow."""
    return sum(token.old - token.reference for token in answer.tokens if token.position >= position)
