"""The quickstart's task, for both frameworks: its settings, data, and the judgement on held-out prompts."""

from collections.abc import Iterable
from pathlib import Path

from torch.nn import Parameter
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.callbacks.exact_answer import ExactAnswer
from grpo_lightning.data import Arithmetic
from grpo_lightning.optim import Schedule
from grpo_lightning.rollout import InProcessEngine
from grpo_lightning.types import Coordinates, GenerationRequest, SamplingParams, Stream

NUM_PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS = 64, 8, 48
MAX_STEPS = 120
SCHEDULE = Schedule(decay="linear", warmup_steps=5)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
POLICY_FOLDER = Path("runs/quickstart/cold_start/policy")


def make_optimizer(parameters: Iterable[Parameter], *, is_fused: bool = True) -> AdamW:
    """AdamW as in `configs/quickstart.yaml`."""
    return AdamW(parameters, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=is_fused)


def data() -> Arithmetic:
    """Sums of six numbers, as in `configs/quickstart.yaml`."""
    return Arithmetic(kind="bounded", num_terms=6, first_term=(0, 9), min_term=1, max_term=5, max_value=9)


class HeldOut:
    """Greedy accuracy on the held-out prompts; the same code for both frameworks, and not timed.

    Args:
        tokenizer: Of the policy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        problems = data()
        problems.encode(tokenizer)
        self.prompts, self.tokenizer = problems.validation_prompts, tokenizer
        self.reward = ExactAnswer(marker="#")

    def accuracy(self, model: PreTrainedModel) -> float:
        """The share of right answers."""
        engine = InProcessEngine(max_rows=512)
        engine.setup(model, self.tokenizer, frozenset({self.tokenizer.eos_token_id}))
        requests = [
            GenerationRequest(slot=slot, token_ids=prompt.token_ids, num_completions=1)
            for slot, prompt in enumerate(self.prompts)
        ]
        sampling = SamplingParams(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
        coordinates = Coordinates(seed=0, stream=Stream.VALIDATION, iteration=0)
        completions = engine.generate(requests, sampling, coordinates)
        engine.close()
        scores = self.reward.score(self.prompts, completions)
        return sum(score == 1.0 for score in scores) / len(scores)
