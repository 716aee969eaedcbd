"""Engines that draw from a copy of the policy's weights: kept in step, and never trusted to be."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.functional.checksums import checksum, local_share
from grpo_lightning.rollout.agreement import is_first_rank, together
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.lengths import check_lengths
from grpo_lightning.rollout.sampling import sampling_logprobs
from grpo_lightning.types import Completion, Coordinates, FinishReason, GenerationRequest, SamplingParams

Precision = Literal["auto", "float32", "bfloat16", "float16"]

LOGPROB_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest mean |log mu - log pi| over the tokens of a completion, by the precision in which the engine computes.

In fp32 two orders of summation leave about 1e-5. Half precision leaves about 1e-3 (fp16) and 1e-2 (bf16) in language
models; a wrong temperature or adapter, or the weights of another run, leave more than 0.1.
"""

_TOKENS_COMPARED = 16
"""Of a completion of which the others are drawn when the policy cannot be asked any more."""
_NOTHING = Completion(
    token_ids=(0,), sampler_logprobs=(0.0,), text="", finish_reason=FinishReason.LENGTH, weight_version=0
)


class WeightSyncError(RuntimeError):
    """The engine does not hold the policy's weights, or does not draw from the distribution that was asked for."""


class WeightCopyEngine(RolloutEngine):
    """An engine whose weights are a copy.

    New weights are sent when the next completions are asked for, tensor by tensor, by the first rank, or by each rank
    to a copy of its own (`has_copy_on_each_rank`); those that the copy was seen to hold before are not sent again.
    Before every rollout each tensor of the copy must have the policy's version and checksum, whether or not it was
    sent; after it, the log-probs of each rank's first completion must be the policy's own. Whatever does not agree
    stops the run.

    Args:
        dtype: In which precision the engine computes; "auto" for the policy's (fp32 for an fp64 policy).
    """

    has_copy = True
    has_copy_on_each_rank = False

    def __init__(self, dtype: Precision = "auto") -> None:
        self._precision = dtype
        self.version = self.held_version = 0
        self._weights: Iterable[tuple[str, Tensor]] | None = None
        self._is_behind = True
        self._checksums: dict[str, int] = {}
        """Of each tensor, in the engine's precision, as the copy was last seen to hold it."""
        self._shares: dict[str, int] = {}
        """Of what this rank had of the weights then."""

    def setup(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        """Attach the policy. What takes long waits until completions are asked for."""
        self._model, self._tokenizer, self._eos_token_ids = model, tokenizer, eos_token_ids
        dtype = model.dtype if self._precision == "auto" else getattr(torch, self._precision)
        self.dtype: torch.dtype = torch.float32 if dtype == torch.float64 else dtype
        self.forget()

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Note that the weights have changed, and where they can be had."""
        self._weights, self.version, self._is_behind = named_tensors, version, True

    def forget(self) -> None:
        """Take nothing for granted that the copy held: all tensors are sent again."""
        self._checksums, self._is_behind = {}, True

    @torch.no_grad()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request. A collective, whose ranks may ask for as many as each likes.

        Raises:
            ConfigurationError: A prompt and `max_new_tokens` exceed the model's positions, or a prompt is empty.
            WeightSyncError: The copy is not the policy, or its log-probs are not the policy's.
        """
        wanted = self._checked(requests, sampling)
        self.synchronise()
        with together():
            completions = self.draw(wanted, sampling, coordinates)
        self.check_logprobs(wanted, completions, sampling)
        return completions

    @torch.no_grad()
    def hand_over(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[GenerationRequest]:
        """Do all of a rollout that needs the policy: what is drawn afterwards is drawn from verified weights.

        In the place of a completion's log-probs, those of its beginning are compared. A collective.

        Returns:
            The requests that ask for a completion at least.
        """
        wanted = self._checked(requests, sampling)
        self.synchronise()
        one, short = [replace(request, num_completions=1) for request in wanted[:1]], _beginning_of(sampling)
        with together():
            completions = self.draw(one, short, coordinates)
        self.check_logprobs(one, completions, short)
        return wanted

    def _checked(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[GenerationRequest]:
        with together():
            check_lengths(requests, sampling, self._model.config)
        return [request for request in requests if request.num_completions]

    @torch.no_grad()
    def synchronise(self) -> None:
        """Send the weights where they have changed, and compare what the engine then holds. A collective.

        Raises:
            WeightSyncError: It does not hold the policy's weights.
        """
        shares = {name: checksum(local_share(weight)) for name, weight in self._model.named_parameters()}
        expected, is_behind = self._checksums, self._is_behind
        self.forget()  # until the copy has been looked at
        if is_behind:
            expected = self._send_changed(expected)
            self._shares = shares
        with together():
            changed = [name for name in shares if shares[name] != self._shares[name]]
            if changed:
                raise WeightSyncError(
                    f"{type(self).__name__} does not hold the policy's weights: of {len(shares)} tensors, "
                    f"{len(changed)} have other values ({_some(changed)}) than were sent, and no update was announced."
                )
            for report in self.held() if self._reaches_a_copy() else ():
                complaint = disagreement(expected, self.version, report)
                if complaint:
                    raise WeightSyncError(f"{type(self).__name__} does not hold the policy's weights: {complaint}")
        self._checksums, self._is_behind, self.held_version = expected, False, self.version

    def _reaches_a_copy(self) -> bool:
        return self.has_copy_on_each_rank or is_first_rank()

    def _send_changed(self, held: Mapping[str, int]) -> dict[str, int]:
        """Send what the copy does not hold yet; returns the checksums of all tensors. A collective."""
        assert self._weights is not None, "update_weights comes before generate"
        checksums: dict[str, int] = {}
        weights = self._changed(self._weights, held, checksums)
        with together():
            try:
                if self._reaches_a_copy():
                    self.send(weights, self.version)
            finally:
                for _ in weights:  # each rank has its part in every tensor, whatever becomes of the first's
                    pass
            kept = [name for name, value in checksums.items() if held.get(name) == value]
            if self._reaches_a_copy() and kept:
                self.keep(kept, self.version)
        return checksums

    def _changed(
        self, named_tensors: Iterable[tuple[str, Tensor]], held: Mapping[str, int], checksums: dict[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors, in the engine's precision, that are not as `held` says; `checksums` gets those of all."""
        for name, tensor in named_tensors:
            cast = tensor.to(self.dtype)
            checksums[name] = checksum(cast)
            if held.get(name) != checksums[name]:
                yield name, cast

    @torch.no_grad()
    def check_logprobs(
        self, requests: Sequence[GenerationRequest], completions: Sequence[Completion], sampling: SamplingParams
    ) -> None:
        """Compare the log-probs of the first completion with the policy's. A collective.

        Args:
            requests: Of this rank; each asks for at least one completion.
            completions: What came of them.
            sampling: As they were drawn.

        Raises:
            WeightSyncError: They differ by more than rounding.
        """
        prompt = requests[0].token_ids if requests else (0,)
        completion = completions[0] if completions else _NOTHING  # a rank without any has its part in the others'
        with self.called_together():
            logits_TV = completion_logits(self._model, prompt, completion)
        logprobs_T = policy_logprobs(logits_TV, completion, sampling, self._eos_token_ids)
        with together():
            if completions:
                self._compare(completion, logprobs_T, sampling, precisions={self.dtype, logits_TV.dtype})

    def _compare(
        self, completion: Completion, logprobs_T: Tensor, sampling: SamplingParams, precisions: set[torch.dtype]
    ) -> None:
        actual_T = torch.tensor(completion.sampler_logprobs, dtype=torch.float64)
        deviation = float((actual_T - logprobs_T.double().cpu()).abs().mean())
        tolerance, precision = max((LOGPROB_TOLERANCE.get(dtype, 0.0), str(dtype)) for dtype in precisions)
        if not deviation <= tolerance:
            raise WeightSyncError(
                f"{type(self).__name__}: the log-probs of a completion differ from the policy's by {deviation:.3g} on "
                f"average, expected at most {tolerance:g} in {precision.removeprefix('torch.')}.\nThe weights "
                f"agree (version {self.version}), so it is what is computed from them: the temperature ({sampling}), "
                "the model's config, or the precision (model.engine.dtype)."
            )

    @abstractmethod
    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand over the tensors that have changed, and forget what was computed from the old ones."""

    @abstractmethod
    def keep(self, names: Sequence[str], version: int) -> None:
        """Have the tensors that need not be sent, since they are the same as before, be of a version too."""

    @abstractmethod
    def held(self) -> list[Mapping[str, Any]]:
        """The report of each worker, see `WeightReceiver.report_weights`."""

    @abstractmethod
    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions; every request asks for at least one, and a rank may have no request."""


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


def _beginning_of(sampling: SamplingParams) -> SamplingParams:
    length = min(_TOKENS_COMPARED, sampling.max_new_tokens)
    return replace(sampling, max_new_tokens=length, min_new_tokens=min(sampling.min_new_tokens, length))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def completion_logits(model: PreTrainedModel, prompt: Sequence[int], completion: Completion) -> Tensor:
    """The logits that a model gives a completion's tokens, of shape [T, V]."""
    input_ids = torch.tensor([[*prompt, *completion.token_ids]], device=model.device)
    logits_TV: Tensor = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits_TV


def policy_logprobs(
    logits_TV: Tensor, completion: Completion, sampling: SamplingParams, eos_token_ids: frozenset[int]
) -> Tensor:
    """The log-probs of a completion's tokens under the distribution that `sampling` makes of the logits.

    Returns:
        Of shape [T].
    """
    logits_TV[: sampling.min_new_tokens, sorted(eos_token_ids)] = -torch.inf
    targets_T1 = torch.tensor(completion.token_ids, device=logits_TV.device)[:, None]
    return sampling_logprobs(logits_TV, sampling).gather(1, targets_T1).squeeze(1)
