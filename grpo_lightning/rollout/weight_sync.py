"""Engines that draw from a copy of the policy's weights: kept in step, and never trusted to be."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.functional.checksums import checksum
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.lengths import check_lengths
from grpo_lightning.rollout.sampling import sampling_logprobs
from grpo_lightning.types import Completion, Coordinates, GenerationRequest, SamplingParams

Precision = Literal["auto", "float32", "bfloat16", "float16"]

LOGPROB_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest mean |log mu - log pi| over the tokens of a completion, by the precision in which the engine computes.

In fp32 two orders of summation leave about 1e-5. Half precision leaves about 1e-3 (fp16) and 1e-2 (bf16) in language
models; a wrong temperature or adapter, or the weights of another run, leave more than 0.1.
"""


class WeightSyncError(RuntimeError):
    """The engine does not hold the policy's weights, or does not draw from the distribution that was asked for."""


class WeightCopyEngine(RolloutEngine):
    """An engine whose weights are a copy.

    New weights are sent when the next completions are asked for, tensor by tensor. Before every rollout each tensor of
    the copy must have the policy's version and checksum, whether or not anything was sent; after it, the log-probs of
    its first completion must be the policy's own. Whatever does not agree stops the run.

    Args:
        dtype: In which precision the engine computes; "auto" for the policy's (fp32 for an fp64 policy).
    """

    def __init__(self, dtype: Precision = "auto") -> None:
        self._precision = dtype
        self.version = 0
        self._weights: Iterable[tuple[str, Tensor]] | None = None
        self._is_behind = True

    def setup(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        """Attach the policy. What takes long waits until completions are asked for."""
        self._model, self._tokenizer, self._eos_token_ids = model, tokenizer, eos_token_ids
        dtype = model.dtype if self._precision == "auto" else getattr(torch, self._precision)
        self.dtype: torch.dtype = torch.float32 if dtype == torch.float64 else dtype
        self._is_behind = True

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note that the weights have changed, and where they can be had."""
        self._weights, self.version, self._is_behind = named_tensors, version, True

    @torch.no_grad()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request.

        Raises:
            ConfigurationError: A prompt and `max_new_tokens` exceed the model's positions, or a prompt is empty.
            WeightSyncError: The copy is not the policy, or its log-probs are not the policy's.
        """
        check_lengths(requests, sampling, self._model.config)
        self.synchronise()
        wanted = [request for request in requests if request.num_completions]
        completions = self.draw(wanted, sampling, coordinates) if wanted else []
        if completions:
            self._check_logprobs(wanted[0], completions[0], sampling)
        return completions

    def synchronise(self) -> None:
        """Send the weights where they have changed, and compare what the engine then holds.

        Raises:
            WeightSyncError: It does not hold the policy's weights.
        """
        assert self._weights is not None, "update_weights comes before generate"
        expected: dict[str, int] = {}
        weights = self._noting(self._weights, expected)
        if self._is_behind:
            self.send(weights, self.version)
        for _ in weights:  # also what the engine did not ask for is expected of it
            pass
        for report in self.held():
            complaint = disagreement(expected, self.version, report)
            if complaint:
                raise WeightSyncError(f"{type(self).__name__} does not hold the policy's weights: {complaint}")
        self._is_behind = False

    def _noting(
        self, named_tensors: Iterable[tuple[str, Tensor]], checksums: dict[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the engine's precision; `checksums` gets theirs."""
        for name, tensor in named_tensors:
            cast = tensor.to(self.dtype)
            checksums[name] = checksum(cast)
            yield name, cast

    def _check_logprobs(self, request: GenerationRequest, completion: Completion, sampling: SamplingParams) -> None:
        """Compare a completion's log-probs with the policy's."""
        expected_T = policy_logprobs(self._model, request.token_ids, completion, sampling, self._eos_token_ids)
        actual_T = torch.tensor(completion.sampler_logprobs, dtype=torch.float64)
        deviation = float((actual_T - expected_T.double().cpu()).abs().mean())
        tolerance = LOGPROB_TOLERANCE[self.dtype]
        if not deviation <= tolerance:
            raise WeightSyncError(
                f"{type(self).__name__}: the log-probs of a completion differ from the policy's by {deviation:.3g} on "
                f"average, expected at most {tolerance:g} in {str(self.dtype).removeprefix('torch.')}.\nThe weights "
                f"agree (version {self.version}), so it is what is computed from them: the temperature ({sampling}), "
                "the model's config, or the precision (model.engine.dtype)."
            )

    @abstractmethod
    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand every tensor over, and forget what was computed from the old ones."""

    @abstractmethod
    def held(self) -> list[Mapping[str, Any]]:
        """The report of each worker, see `WeightReceiver.report_weights`."""

    @abstractmethod
    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions; every request asks for at least one."""


def disagreement(expected: Mapping[str, int], version: int, report: Mapping[str, Any]) -> str | None:
    """In what a worker's weights differ from the policy's; None where they are the same.

    Args:
        expected: The checksum of each of the policy's tensors.
        version: Of the policy's weights.
        report: See `WeightReceiver.report_weights`.
    """
    held = report["tensors"]
    faults = {
        "did not arrive": [name for name in expected if name not in held],
        f"are not of version {version}": [n for n in expected if n in held and held[n][0] != version],
        "have other values": [n for n in expected if n in held and held[n][1] != expected[n]],
        "are parameters of the engine that no tensor came for": report["untouched"],
    }
    said = [f"{len(names)} {what} ({_some(names)})" for what, names in faults.items() if names]
    return f"of {len(expected)} tensors, " + "; ".join(said) + "." if said else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def policy_logprobs(
    model: PreTrainedModel,
    prompt: Sequence[int],
    completion: Completion,
    sampling: SamplingParams,
    eos_token_ids: frozenset[int],
) -> Tensor:
    """The log-probs of a completion's tokens under the distribution that `sampling` makes of the policy.

    Returns:
        Of shape [T].
    """
    input_ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
    logits_TV = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logits_TV[: sampling.min_new_tokens, sorted(eos_token_ids)] = -torch.inf
    targets_T1 = input_ids[0, len(prompt) :, None]
    return sampling_logprobs(logits_TV, sampling).gather(1, targets_T1).squeeze(1)
