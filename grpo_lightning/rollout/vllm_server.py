"""Rollouts by vLLM servers beside the training process."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor

from grpo_lightning.rollout.vllm import completion_seeds, finish_reason, vllm_sampling
from grpo_lightning.rollout.weight_sync import Precision, WeightCopyEngine
from grpo_lightning.types import Completion, ConfigurationError, Coordinates, GenerationRequest, SamplingParams

_SHARD_BYTES = 1 << 28
_MAX_REPETITIONS = 3
T = TypeVar("T")


class ServerError(ConnectionError):
    """A server does not answer, or not as it should."""


class VLLMServerEngine(WeightCopyEngine):
    """vLLM servers that the user has started; see docs/engines.md for how.

    Weights go through files in a folder that trainer and servers see, a part at a time. A rollout in which a server was
    lost is thrown away and drawn again, once all servers answer and hold the policy's weights: no completion of weights
    that are not known is ever used.

    Args:
        urls: Of the servers, ``http://host:port``; completions are dealt out to them in turn.
        dtype: In which precision the servers compute; "auto" for the policy's (fp32 for an fp64 policy).
        exchange_folder: Where the files lie while they are read; None for the machine's folder of temporary files.
        max_requests: Most completions asked of the servers at once.
        request_timeout_seconds: Longest wait for one answer.
        patience_seconds: Longest wait for a server that does not answer.

    Raises:
        ConfigurationError: A setting is out of its range.
    """

    def __init__(
        self,
        urls: list[str],
        dtype: Precision = "auto",
        exchange_folder: str | None = None,
        max_requests: int = 64,
        request_timeout_seconds: float = 600.0,
        patience_seconds: float = 50.0,
    ) -> None:
        super().__init__(dtype)
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ConfigurationError(f"model.engine.urls must be one or several of http://host:port, got {urls}.")
        if max_requests < 1:
            raise ConfigurationError(f"model.engine.max_requests must be >= 1, got {max_requests}.")
        if exchange_folder is not None and not Path(exchange_folder).is_dir():
            raise ConfigurationError(f"model.engine.exchange_folder: there is no folder {exchange_folder!r}.")
        self.urls = [url.rstrip("/") for url in urls]
        self._exchange_folder, self._max_requests = exchange_folder, max_requests
        self._timeout, self._patience = request_timeout_seconds, patience_seconds
        self._instances: list[str] = []

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request; all of them again where a server was lost on the way.

        Raises:
            ConfigurationError: A prompt and `max_new_tokens` exceed the positions, a prompt is empty, or a server
                refuses what it is asked for.
            ServerError: A server does not answer for `patience_seconds`, or was lost time and again.
            WeightSyncError: The copy is not the policy, or its log-probs are not the policy's.
        """
        for repetition in range(_MAX_REPETITIONS + 1):
            instances = self._patiently(self._running)
            self._is_behind |= instances != self._instances
            try:
                completions = super().generate(requests, sampling, coordinates)
                if self._running() == instances:
                    self._instances = instances
                    return completions
                lost: Exception = ServerError("a server was started again during the rollout")
            except ServerError as error:
                lost = error
            if repetition < _MAX_REPETITIONS:
                rank_zero_info(f"A rollout is thrown away and drawn again from weights that are sent again: {lost}")
            self._instances = []
        raise ServerError(f"model.engine.urls: {_MAX_REPETITIONS + 1} rollouts in turn were lost, the last: {lost}")

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the tensors to files, one part after the other, and have each server read them."""
        with TemporaryDirectory(prefix="grpo_lightning_", dir=self._exchange_folder) as folder:
            for part in _parts(named_tensors):
                path = Path(folder, "weights.safetensors")
                save_file(part, path)
                for url in self.urls:
                    self._worker_call(url, "receive_weights_file", [str(path), version])
        for url in self.urls:
            if self._post(url, "/reset_prefix_cache", {}).get("success") is not True:
                raise ServerError(f"{url} did not drop the keys and values that the old weights computed")

    def held(self) -> list[Mapping[str, Any]]:
        """The reports of the servers' workers."""
        return [report for url in self.urls for report in self._worker_call(url, "report_weights", [])]

    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions, each by a request of its own."""
        settings = {**vllm_sampling(sampling, self._eos_token_ids), "return_token_ids": True}
        del settings["detokenize"]
        prompts = [list(request.token_ids) for request in requests for _ in range(request.num_completions)]
        bodies = [
            {**settings, "prompt": prompt, "seed": seed}
            for prompt, seed in zip(prompts, completion_seeds(requests, coordinates), strict=True)
        ]
        urls = [self.urls[i % len(self.urls)] for i in range(len(bodies))]
        with ThreadPoolExecutor(self._max_requests) as pool:
            return list(pool.map(self._complete, urls, bodies))

    def _complete(self, url: str, body: dict[str, Any]) -> Completion:
        answer = self._post(url, "/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            token_ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(logprob) for logprob in choice["logprobs"]["token_logprobs"])
            has_stopped = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{url} answered with something that is no completion: {str(answer)[:200]}") from error
        if not token_ids or len(token_ids) != len(logprobs):
            raise ServerError(f"{url} answered with {len(token_ids)} tokens and {len(logprobs)} log-probs")
        return Completion(
            token_ids=token_ids,
            sampler_logprobs=logprobs,
            text=str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)),
            finish_reason=finish_reason(token_ids, self._eos_token_ids, has_stopped=has_stopped),
            weight_version=self.version,
        )

    def _running(self) -> list[str]:
        """Of each worker the name that it got when it was started."""
        return [name for url in self.urls for [name] in self._worker_call(url, "report_instance", [])]

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask until there is an answer, at longer and longer intervals."""
        deadline, pause = time.monotonic() + self._patience, 0.25
        while True:
            try:
                return ask()
            except ServerError as error:
                if time.monotonic() + pause > deadline:
                    raise ServerError(f"model.engine.urls: no answer for {self._patience:g} s: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _worker_call(self, url: str, method: str, args: list[Any]) -> list[Any]:
        results = self._post(url, "/collective_rpc", {"method": method, "args": args}).get("results")
        if not isinstance(results, list):
            raise ServerError(f"{url}: no worker answered {method}")
        return results

    def _post(self, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            # Without proxies: servers are neighbours.
            with build_opener(ProxyHandler({})).open(request, timeout=self._timeout) as response:
                answer = json.loads(response.read())
        except HTTPError as error:
            said = f"{url}{path} answered {error.code}: {error.read()[:200]!r}"
            if error.code < 500:
                raise ConfigurationError(
                    f"model.engine.urls: {said}\nIs it started as docs/engines.md says, with VLLM_SERVER_DEV_MODE=1?"
                ) from error
            raise ServerError(said) from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{url}{path}: {error}") from error
        if not isinstance(answer, dict):
            raise ServerError(f"{url}{path} answered with something else than an object: {str(answer)[:200]}")
        return answer


def _parts(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors in parts of about equal size."""
    part: dict[str, Tensor] = {}
    for name, tensor in named_tensors:
        part[name] = tensor.cpu().contiguous()
        if sum(t.nbytes for t in part.values()) >= _SHARD_BYTES:
            yield part
            part = {}
    if part:
        yield part
