"""Rollouts by vLLM servers beside the training process."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from socket import gethostname
from threading import Event
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from grpo_lightning.rollout.agreement import is_first_rank, of_first_rank, together
from grpo_lightning.rollout.broadcast_transfer import BroadcastTransfer
from grpo_lightning.rollout.engine import Draw, DrawsAhead
from grpo_lightning.rollout.file_transfer import FileTransfer
from grpo_lightning.rollout.local_servers import LaunchedServers, LocalServers
from grpo_lightning.rollout.server import Server, ServerError, patiently
from grpo_lightning.rollout.vllm import completion_seeds, finish_reason, vllm_sampling
from grpo_lightning.rollout.weight_sync import Precision, WeightCopyEngine, WeightSyncError
from grpo_lightning.rollout.weight_transfer import WeightTransfer
from grpo_lightning.types import Completion, ConfigurationError, Coordinates, GenerationRequest, SamplingParams

Transfer = Literal["auto", "files", "broadcast"]
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_MAX_REPETITIONS = 3
T = TypeVar("T")


class VLLMServerEngine(WeightCopyEngine, DrawsAhead):
    """vLLM servers that the user has started, see docs/engines.md for how, or that the run starts on its own machine.

    Weights go to them through files or over the network, a part at a time. A rollout in which a server was lost is
    thrown away and drawn again, by all ranks, once all servers answer and hold the policy's weights: no completion of
    weights that are not known is ever used. What was drawn ahead is then drawn from the weights of the moment, since
    those that it came from are no more.

    Args:
        urls: Of the servers, ``http://host:port``; completions are dealt out to them in turn.
        local: Servers to be started in their place.
        dtype: In which precision the servers compute; "auto" for the policy's (fp32 for an fp64 policy).
        transfer: How weights get to the servers: through "files", or by "broadcast" over the network, from GPU to GPU
            where the policy is on one. "auto" takes files with an `exchange_folder`, and for a policy on the CPU whose
            servers are on its machine; else it broadcasts.
        exchange_folder: Where the files lie while they are read; None for the machine's folder of temporary files.
        max_requests: Most completions that each rank asks the servers for at once.
        request_timeout_seconds: Longest wait for one completion of a server that gives signs of life.
        patience_seconds: Longest silence of a server.

    Raises:
        ConfigurationError: A setting is out of its range, or there are neither `urls` nor `local`, or both.
    """

    def __init__(
        self,
        urls: list[str] | None = None,
        local: LocalServers | None = None,
        dtype: Precision = "auto",
        transfer: Transfer = "auto",
        exchange_folder: str | None = None,
        max_requests: int = 64,
        request_timeout_seconds: float = 600.0,
        patience_seconds: float = 50.0,
    ) -> None:
        super().__init__(dtype)
        if (urls is None) == (local is None):
            raise ConfigurationError("model.engine needs either urls, of running servers, or local, to start some.")
        if urls is not None and not (urls and all(url.startswith(("http://", "https://")) for url in urls)):
            raise ConfigurationError(f"model.engine.urls must be one or several of http://host:port, got {urls}.")
        if max_requests < 1:
            raise ConfigurationError(f"model.engine.max_requests must be >= 1, got {max_requests}.")
        for name, seconds in (("request_timeout", request_timeout_seconds), ("patience", patience_seconds)):
            if not 0 < seconds < math.inf:
                raise ConfigurationError(f"model.engine.{name}_seconds must be > 0 and finite, got {seconds}.")
        if exchange_folder is not None and not Path(exchange_folder).is_dir():
            raise ConfigurationError(f"model.engine.exchange_folder: there is no folder {exchange_folder!r}.")
        if exchange_folder is not None and transfer == "broadcast":
            raise ConfigurationError("model.engine.exchange_folder is for model.engine.transfer: files, got broadcast.")
        self._servers = [Server(url) for url in urls or ()]
        self._local = local
        self._launched: LaunchedServers | None = None
        self._way = transfer
        self._transfer: WeightTransfer | None = None
        self._exchange_folder, self._max_requests = exchange_folder, max_requests
        self._timeout, self._patience = request_timeout_seconds, patience_seconds
        self._instances: list[str] = []
        self._awaited: list[str] = []
        """The names of the workers that answered before the weights were sent."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions of every request; all of them again where a server was lost on the way. A collective.

        Raises:
            ConfigurationError: A prompt and `max_new_tokens` exceed the positions, a prompt is empty, or a server
                refuses what it is asked for.
            ServerError: A server does not answer for `patience_seconds`, or was lost time and again.
            WeightSyncError: The copy is not the policy, or its log-probs are not the policy's.
        """
        return self._until_kept(partial(super().generate, requests, sampling, coordinates))

    def begin(self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates) -> Draw:
        """Send and verify the weights, and return what draws from them. A collective; drawing is none.

        Raises:
            ConfigurationError: See `generate`.
            ServerError: See `generate`; of what is drawn in the background nothing is repeated.
            WeightSyncError: See `generate`.
        """
        wanted = self._until_kept(partial(self.hand_over, requests, sampling, coordinates))

        def draw() -> list[Completion]:
            with self._watched():
                return self.draw(wanted, sampling, coordinates)

        return draw

    def _until_kept(self, attempt: Callable[[], T]) -> T:
        """What an attempt gives that no server was lost in. A collective."""
        for server in self._servers:
            server.take_up()  # nobody asked it while the policy was updated
        for repetition in range(_MAX_REPETITIONS + 1):
            if self._await_servers():
                self.forget()
            try:
                with self._watched():
                    return attempt()
            except ServerError as error:
                lost = error
            self._instances = []
            if repetition < _MAX_REPETITIONS:
                rank_zero_info(f"A rollout is thrown away and drawn again from weights that are sent again: {lost}")
        raise ServerError(f"model.engine.urls: {_MAX_REPETITIONS + 1} rollouts in turn were lost, the last: {lost}")

    def synchronise(self) -> None:
        """As every engine with a copy, and note which servers they are that hold the weights.

        Raises:
            ServerError: One was started again meanwhile, and holds nothing.
            WeightSyncError: See the base class.
        """
        try:
            super().synchronise()
        except WeightSyncError as error:
            with together():
                if is_first_rank() and _starts(self._running()) != _starts(self._awaited):
                    raise ServerError("a server was started again while it was sent the weights") from error
            raise
        with together():
            self._instances = self._running() if is_first_rank() else []
        self._instances = of_first_rank(self._instances)

    def send(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the tensors on the way that `transfer` says, and have the servers drop their caches of prefixes."""
        self._transfer = self._transfer or self._make_transfer()
        self._transfer.send(self._servers, named_tensors, version)
        for server in self._servers:
            if server.post("/reset_prefix_cache", {}, timeout=self._timeout).get("success") is not True:
                raise ServerError(f"{server.url} did not drop the keys and values that the old weights computed")

    def _make_transfer(self) -> WeightTransfer:
        way, device = self._way, self._model.device
        if way == "auto":
            is_near = all(urlsplit(server.url).hostname in _THIS_MACHINE for server in self._servers)
            is_readable = self._exchange_folder is not None or (device.type == "cpu" and is_near)
            way = "files" if is_readable else "broadcast"
        if way == "files":
            return FileTransfer(self._exchange_folder, seconds=self._timeout)
        return BroadcastTransfer(device, seconds=self._patience / 2)

    def keep(self, names: Sequence[str], version: int) -> None:
        """Have tensors that are the same as before be of a version, on each server."""
        for server in self._servers:
            server.ask_workers("keep_weights", list(names), version, timeout=self._timeout)

    def held(self) -> list[Mapping[str, Any]]:
        """The reports of the servers' workers."""
        return [r for server in self._servers for r in server.ask_workers("report_weights", timeout=self._timeout)]

    def draw(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, coordinates: Coordinates
    ) -> list[Completion]:
        """Draw the completions, each by a request of its own, from servers that are the same before and after it."""
        if not requests:
            return []
        instances = self._instances
        settings = {**vllm_sampling(sampling, self._eos_token_ids), "return_token_ids": True}
        del settings["detokenize"]
        prompts = [list(request.token_ids) for request in requests for _ in range(request.num_completions)]
        bodies = [
            {**settings, "prompt": prompt, "seed": seed}
            for prompt, seed in zip(prompts, completion_seeds(requests, coordinates), strict=True)
        ]
        servers = [self._servers[i % len(self._servers)] for i in range(len(bodies))]
        is_over = Event()

        def complete(pair: tuple[Server, dict[str, Any]]) -> Completion:
            if is_over.is_set():
                raise ServerError(f"{pair[0].url} is not asked any more")
            return self._complete(*pair)

        with ThreadPool(min(self._max_requests, len(bodies))) as pool:  # of daemons, which no process waits for
            try:
                completions = list(pool.imap(complete, zip(servers, bodies, strict=True)))
            except BaseException:
                is_over.set()
                self._hang_up("another request failed")
                raise
        self._check_same(instances)
        return completions

    def _complete(self, server: Server, body: dict[str, Any]) -> Completion:
        drawn = server.complete(body, timeout=self._timeout)
        return Completion(
            token_ids=drawn.token_ids,
            sampler_logprobs=drawn.logprobs,
            text=str(self._tokenizer.decode(list(drawn.token_ids), skip_special_tokens=True)),
            finish_reason=finish_reason(drawn.token_ids, self._eos_token_ids, has_stopped=drawn.has_stopped),
            weight_version=self.held_version,
        )

    def close(self) -> None:
        """End what is being drawn, and the servers that the run has started."""
        self._hang_up("the run has ended")
        if self._launched is not None:
            self._launched.stop()
            self._launched = None
            self._servers = []

    def _hang_up(self, why: str) -> None:
        for server in self._servers:
            server.hang_up(why)

    def _await_servers(self) -> bool:
        """Wait until all of them answer; returns whether one is not what it was. A collective."""
        with together():
            self._launch()
            self._awaited = running = self._patiently() if is_first_rank() else []
        is_other, urls, host = of_first_rank(
            (running != self._instances, [server.url for server in self._servers], gethostname())
        )
        with together():
            if self._local is not None and host != gethostname():
                raise ConfigurationError(
                    "model.engine.local starts servers for one machine, and this run is on several. Start them "
                    "yourself, as docs/engines.md says, and set model.engine.urls."
                )
        self._servers = self._servers or [Server(url) for url in urls]
        return is_other

    def _launch(self) -> None:
        if self._local is not None and self._launched is None and is_first_rank():
            rank_zero_info(f"vLLM is started on this machine: {len(self._local.devices)} server(s).")
            self._launched = LaunchedServers(self._local, self._model, self._tokenizer, self.dtype)
            self._servers = [Server(member.url) for member in self._launched.members]

    def _patiently(self) -> list[str]:
        """The names of the servers' workers, as soon as all answer."""
        launched = self._launched

        def ask() -> list[str]:
            if launched is not None and launched.keep_running():
                rank_zero_info("A vLLM server has ended; it is started again.")
            return self._running()

        running = patiently(ask, self._servers, patience=self._patience, grace=launched.grace if launched else None)
        if launched is not None:
            launched.has_answered()
        return running

    def _running(self) -> list[str]:
        """Of each worker which start of it this is, and how often it was sent weights."""
        return [name for server in self._servers for name in server.instances(timeout=self._patience / 2)]

    def _check_same(self, instances: list[str]) -> None:
        if self._running() != instances:
            raise ServerError("a server was started again, or sent other weights, during the rollout")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for server in self._servers:
                stack.enter_context(server.watched(patience=self._patience))
            yield


def _starts(instances: Iterable[str]) -> list[str]:
    """Which start of each worker it is, however often it was sent weights."""
    return [name.partition(" after ")[0] for name in instances]
