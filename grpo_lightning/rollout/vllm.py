"""Rollouts by vLLM in the training process."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.functional.random import seeds
from grpo_lightning.rollout.lengths import max_positions
from grpo_lightning.rollout.model_folder import save_without_weights
from grpo_lightning.rollout.weight_receiver import RECEIVER
from grpo_lightning.rollout.weight_sync import Precision, WeightCopyEngine, WeightSyncError
from grpo_lightning.types import (
    Completion,
    ConfigurationError,
    Coordinates,
    FinishReason,
    GenerationRequest,
    SamplingParams,
)


class VLLMEngine(WeightCopyEngine):
    """vLLM in the training process (colocated), with a copy of the weights and a cache beside the trainer's.

    A completion is a request of its own, with a seed made from its coordinates; its group shares the prompt through
    vLLM's prefix cache. What vLLM reports are the log-probs of the distribution after temperature, top-k and top-p.

    Args:
        dtype: In which precision vLLM computes; "auto" for the policy's (fp32 for an fp64 policy).
        max_num_seqs: Most completions decoded at once.
        max_model_len: Longest sequence, prompt and completion; None for the policy's positions.
        kv_cache_gib: Memory for keys and values; None lets vLLM take what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Share of a GPU's memory for vLLM, weights included.
        enforce_eager: Decode without CUDA graphs.

    Raises:
        ConfigurationError: vLLM is not installed, or a setting is out of its range.
    """

    def __init__(
        self,
        dtype: Precision = "auto",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.3,
        enforce_eager: bool = False,
    ) -> None:
        super().__init__(dtype)
        if max_num_seqs < 1:
            raise ConfigurationError(f"model.engine.max_num_seqs must be >= 1, got {max_num_seqs}.")
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigurationError(
                f"model.engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}."
            )
        self._max_model_len = max_model_len
        self._settings = {
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        }
        self._llm: Any = None
        require_vllm()

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy each tensor into vLLM's, and drop the cache of prefixes."""
        self._started.collective_rpc("receive_weights", args=(named_tensors, version))
        if not self._started.reset_prefix_cache():
            raise WeightSyncError("VLLMEngine: vLLM did not drop the keys and values that the old weights computed.")

    def held(self) -> list[Mapping[str, Any]]:
        """The report of vLLM's worker."""
        reports: list[Mapping[str, Any]] = self._started.collective_rpc("report_weights")
        return reports

    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions, all of them waiting in vLLM's own queue."""
        from vllm import SamplingParams as VLLMSamplingParams

        prompts = [{"prompt_token_ids": list(r.token_ids)} for r in requests for _ in range(r.num_completions)]
        settings = vllm_sampling(sampling, self._eos_token_ids)
        params = [VLLMSamplingParams(**settings, seed=seed) for seed in completion_seeds(requests, coordinates)]
        outputs = [output.outputs[0] for output in self._started.generate(prompts, params, use_tqdm=False)]
        return [
            self._completion(
                tuple(output.token_ids),
                tuple(step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)),
                has_stopped=output.finish_reason == "stop",
            )
            for output in outputs
        ]

    def _completion(self, token_ids: tuple[int, ...], logprobs: tuple[float, ...], *, has_stopped: bool) -> Completion:
        return Completion(
            token_ids=token_ids,
            sampler_logprobs=logprobs,
            text=str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            finish_reason=finish_reason(token_ids, self._eos_token_ids, has_stopped=has_stopped),
            weight_version=self.held_version,
        )

    def close(self) -> None:
        """End vLLM and give back its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    @property
    def _started(self) -> Any:
        if self._llm is None:
            self._llm = self.start()
        return self._llm

    def start(self) -> Any:
        """Start vLLM, with whatever weights: the policy's are sent when it is there.

        Raises:
            ConfigurationError: There are several training processes.
        """
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigurationError(
                "model.engine: VLLMEngine runs in a single training process; with several use "
                "InProcessEngine or VLLMServerEngine."
            )
        limit = self._max_model_len or max_positions(self._model.config)
        return start_llm(self._model, self._tokenizer, dtype=self.dtype, max_model_len=limit, **self._settings)


def require_vllm() -> None:
    """VLLM can be imported.

    Raises:
        ConfigurationError: It cannot.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise ConfigurationError(
            "model.engine needs vLLM, which is not installed: pip install 'grpo_lightning[vllm]'\n"
            "(on a machine without GPU: see docs/engines.md), or choose InProcessEngine."
        )


def start_llm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, **settings: Any
) -> Any:
    """VLLM for a model of this architecture, in this process and with whatever weights: the policy's are sent later.

    Args:
        model: The policy's.
        tokenizer: The policy's.
        dtype: In which precision vLLM computes.
        settings: Further arguments of ``vllm.LLM``.
    """
    # In this process, so that tensors can be handed over without a copy.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    with TemporaryDirectory(prefix="grpo_lightning_") as folder:
        save_without_weights(model, tokenizer, Path(folder))
        return LLM(
            model=folder,
            dtype=str(dtype).removeprefix("torch."),
            load_format="dummy",
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            worker_extension_cls=RECEIVER,
            **settings,
        )


def completion_seeds(requests: Sequence[GenerationRequest], coordinates: Coordinates) -> list[int]:
    """The seed of each completion, request-major."""
    pairs = [(r.slot, sample) for r in requests for sample in range(r.num_completions)]
    slots, samples = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    words = seeds(
        seed=coordinates.seed,
        stream=coordinates.stream,
        iteration=coordinates.iteration,
        slots=slots,
        samples=samples,
    )
    return [int(word) for word in words]


def vllm_sampling(sampling: SamplingParams, eos_token_ids: frozenset[int]) -> dict[str, Any]:
    """How completions are drawn, in the words of vLLM.

    Only the policy's own end-of-sequence tokens end a completion: what vLLM reads out of configs does not.

    Raises:
        ConfigurationError: vLLM refuses the temperature.
    """
    if sampling.temperature > 2:
        raise ConfigurationError(f"model.sampling.temperature must be at most 2 with vLLM, got {sampling.temperature}.")
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(eos_token_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
    }


def finish_reason(token_ids: Sequence[int], eos_token_ids: frozenset[int], *, has_stopped: bool) -> FinishReason:
    """Why a completion ended; an end-of-sequence token at the length limit is no truncation."""
    if token_ids[-1] in eos_token_ids:
        return FinishReason.EOS
    return FinishReason.STOP if has_stopped else FinishReason.LENGTH
