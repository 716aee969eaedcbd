"""Rollouts by vLLM in the training process."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.functional.random import seeds
from grpo_lightning.rollout.agreement import num_ranks
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

CPU_EXECUTOR = "grpo_lightning.rollout.cpu_executor.CPUExecutor"


class VLLMEngine(WeightCopyEngine):
    """vLLM in the training process (colocated), with a copy of the weights and a cache beside the trainer's.

    Each rank has an engine of its own, for its own prompts; or `tensor_parallel_size` ranks in a row share one, which
    draws the completions of all of them, each holding a part of every weight.

    A completion is a request of its own, with a seed made from its coordinates; its group shares the prompt through
    vLLM's prefix cache. What vLLM reports are the log-probs of the distribution after temperature, top-k and top-p.

    Args:
        dtype: In which precision vLLM computes; "auto" for the policy's (fp32 for an fp64 policy).
        max_num_seqs: Most completions decoded at once.
        max_model_len: Longest sequence, prompt and completion; None for the policy's positions.
        kv_cache_gib: Memory for keys and values; None lets vLLM take what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: Share of a GPU's memory for vLLM, weights included.
        enforce_eager: Decode without CUDA graphs.
        tensor_parallel_size: How many ranks share an engine.
        sleep_level: What vLLM gives back of the GPU's memory between rollouts: 0, nothing; 1, keys and values, and the
            weights, which wait in the host's memory; 2, both, and the weights are all sent again.

    Raises:
        ConfigurationError: vLLM is not installed, cannot sleep on this platform, or a setting is out of its range.
    """

    def __init__(
        self,
        dtype: Precision = "auto",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.3,
        enforce_eager: bool = False,
        tensor_parallel_size: int = 1,
        sleep_level: int = 0,
    ) -> None:
        super().__init__(dtype)
        if max_num_seqs < 1:
            raise ConfigurationError(f"model.engine.max_num_seqs must be >= 1, got {max_num_seqs}.")
        if max_model_len is not None and max_model_len < 1:
            raise ConfigurationError(f"model.engine.max_model_len must be >= 1 or null, got {max_model_len}.")
        if kv_cache_gib is not None and not 0 < kv_cache_gib < math.inf:
            raise ConfigurationError(f"model.engine.kv_cache_gib must be > 0 and finite, or null, got {kv_cache_gib}.")
        if not 0 < gpu_memory_utilization <= 1:
            raise ConfigurationError(
                f"model.engine.gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization}."
            )
        if tensor_parallel_size < 1:
            raise ConfigurationError(f"model.engine.tensor_parallel_size must be >= 1, got {tensor_parallel_size}.")
        if sleep_level not in (0, 1, 2):
            raise ConfigurationError(f"model.engine.sleep_level must be 0, 1 or 2, got {sleep_level}.")
        self._sleep_level = sleep_level
        self._max_model_len, self._ranks_per_engine = max_model_len, tensor_parallel_size
        self._settings = {
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": enforce_eager,
            "tensor_parallel_size": tensor_parallel_size,
            "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            "enable_sleep_mode": sleep_level > 0,
        }
        self._llm: Any = None
        self._is_asleep = False
        require_vllm()
        if sleep_level:
            require_sleep()

    has_copy_on_each_rank = True

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Wake vLLM, draw the completions as every engine with a copy does, and let it sleep again. A collective."""
        self.wake_up()
        completions = super().generate(requests, sampling, coordinates)
        if self._sleep_level:
            self._started.sleep(level=self._sleep_level)
            self._is_asleep = True
        return completions

    def wake_up(self) -> None:
        """Have vLLM take its memory again, where it sleeps."""
        if self._is_asleep:
            self._started.wake_up()
            self._is_asleep = False
            if self._sleep_level == 2:
                self.forget()  # the weights are gone

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy each tensor into vLLM's, and drop the cache of prefixes."""
        self._started.collective_rpc("receive_weights", args=(named_tensors, version))
        if not self._started.reset_prefix_cache():
            raise WeightSyncError("VLLMEngine: vLLM did not drop the keys and values that the old weights computed.")

    def keep(self, names: Sequence[str], version: int) -> None:
        """Have tensors that are the same as before be of a version."""
        self._started.collective_rpc("keep_weights", args=(list(names), version))

    def held(self) -> list[Mapping[str, Any]]:
        """The report of vLLM's worker."""
        reports: list[Mapping[str, Any]] = self._started.collective_rpc("report_weights")
        return reports

    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions, all of them waiting in vLLM's own queue."""
        from vllm import SamplingParams as VLLMSamplingParams

        llm = self._started
        of_ranks, own = of_engine(requests) if self._ranks_per_engine > 1 else ([requests], 0)
        wanted = [request for requests_of_rank in of_ranks for request in requests_of_rank]
        if not wanted:
            return []
        prompts = [{"prompt_token_ids": list(r.token_ids)} for r in wanted for _ in range(r.num_completions)]
        settings = vllm_sampling(sampling, self._eos_token_ids)
        params = [VLLMSamplingParams(**settings, seed=seed) for seed in completion_seeds(wanted, coordinates)]
        drawn = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        first = sum(num_completions(other) for other in of_ranks[:own])
        outputs = drawn[first : first + num_completions(requests)]
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
            stop_llm(self._llm, is_group_kept=self._is_in_group)
            self._llm = None

    @property
    def _started(self) -> Any:
        if self._llm is None:
            self._llm = self.start()
        return self._llm

    def start(self) -> Any:
        """Start vLLM, with whatever weights: the policy's are sent when it is there. A collective.

        Raises:
            ConfigurationError: The ranks do not come out even.
        """
        if num_ranks() % self._ranks_per_engine:
            raise ConfigurationError(
                f"model.engine.tensor_parallel_size: {num_ranks()} ranks do not come out even in engines of "
                f"{self._ranks_per_engine}."
            )
        self._is_in_group = torch.distributed.is_initialized()
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


def require_sleep() -> None:
    """VLLM can give its memory back between rollouts.

    Raises:
        ConfigurationError: Not on this platform.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_sleep_mode_available():
        raise ConfigurationError(
            f"model.engine.sleep_level: vLLM cannot sleep on {current_platform.device_name}, only on GPUs. Set it to 0."
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
    if num_ranks() > 1:  # vLLM takes the ranks of the run for its own
        os.environ["RANK"] = str(torch.distributed.get_rank())
        executor = "external_launcher" if torch.cuda.is_available() else CPU_EXECUTOR
        settings = {"distributed_executor_backend": executor, **settings}
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


def stop_llm(llm: Any, *, is_group_kept: bool) -> None:
    """End vLLM.

    Args:
        llm: As `start_llm` made it.
        is_group_kept: Whether the process group is the run's, which goes on; vLLM's own `shutdown` ends it.
    """
    core = llm.llm_engine.engine_core
    if not is_group_kept:
        core.shutdown()
        return
    from vllm.distributed import destroy_model_parallel

    if finalizer := getattr(core, "_finalizer", None):  # which would end the group when `llm` is forgotten
        finalizer.detach()
    core.engine_core.model_executor.shutdown()
    core.engine_core.scheduler.shutdown()
    destroy_model_parallel()


def of_engine(requests: Sequence[GenerationRequest]) -> tuple[list[Sequence[GenerationRequest]], int]:
    """What each of the ranks asks for that share this rank's engine, and this one's place among them. A collective."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    of_ranks: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(of_ranks, list(requests), group=group.cpu_group)
    return of_ranks, group.rank_in_group


def num_completions(requests: Iterable[GenerationRequest]) -> int:
    """How many completions are asked for."""
    return sum(request.num_completions for request in requests)


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
