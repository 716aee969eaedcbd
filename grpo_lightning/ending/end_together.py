"""The callback that every run has: its ranks end together."""

import os
import signal
import socket
import threading
import warnings
from functools import partial
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from grpo_lightning.ending.link import Address, Member, connect, listen
from grpo_lightning.ending.saving import save_and_say
from grpo_lightning.ending.stopping import StoppedRun, Stopping
from grpo_lightning.ending.waiting import explained
from grpo_lightning.ending.watch import Watch

FAILED = 1
"""The exit status of a rank that ends because another has."""
GRACE_SECONDS = 3.0
"""How long a rank may take to end by itself when another has failed: the same may have happened to it."""
TAKEN_OVER = ("_sigterm_notifier_fn", "_slurm_sigusr_handler_fn")
"""What Lightning does at a signal: it communicates, or saves, wherever the ranks happen to be at that moment."""


class EndTogether(Callback):
    """Ends every rank when one has died or failed, and stops all of them when one is asked to.

    A rank that dies without a word (killed, out of memory, its machine lost) would leave the others in a rollout, or
    waiting for it in a collective for half an hour. Each says here which one it was, and ends with status 1.

    On SIGTERM and SIGINT all ranks stop together as soon as they can, save the run's state and end with status 128 +
    the signal's number, see `Stopping` and `save_and_say`. A second SIGINT interrupts at once.

    Args:
        stopping: The module's.
    """

    def __init__(self, stopping: Stopping) -> None:
        self.stopping = stopping
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Connect the ranks."""
        if trainer.world_size > 1 and self._watch is None:
            self._watch = self._connected(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have Lightning, which is about to handle signals, hand them to us."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.stopping.begin(None if trainer.world_size == 1 else pl_module.device, self._tell_stop)
        for name in TAKEN_OVER:
            setattr(trainer._signal_connector, name, self.stopping.on_signal)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Take Ctrl-C, which Lightning leaves to Python, and gives back at the end."""
        self._take_interrupts()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Where there was no sanity check."""
        self._take_interrupts()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Nothing is left to stop."""
        self._stop_no_more(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Save what was stopped; tell the others of a failure."""
        self._stop_no_more(trainer)
        if isinstance(exception, StoppedRun):
            if not trainer.sanity_checking:
                save_and_say(trainer, exception.signum)
                trainer.strategy.barrier()  # whoever ends first may take the others down, and requeueing with them
            if _is_child(trainer):
                exception.code = 0  # Lightning kills its first rank when another ends with anything else
            self._leave()
        elif self._watch is not None:
            self._watch.tell_failure(explained(exception, trainer.strategy))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Let the ranks go."""
        self._leave()

    def _take_interrupts(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.stopping.on_signal)

    def _stop_no_more(self, trainer: Trainer) -> None:
        """The signals are Lightning's again."""
        self.stopping.end()
        for name in TAKEN_OVER:
            vars(trainer._signal_connector).pop(name, None)

    def _tell_stop(self, signum: int) -> None:
        if self._watch is not None:
            self._watch.tell_stop(signum)

    def _connected(self, trainer: Trainer) -> Watch | None:
        me = Member(trainer.global_rank, socket.gethostname(), os.getpid())
        strategy: Any = trainer.strategy
        server, own = None, None
        if me.rank == 0:
            server, own = listen(strategy.cluster_environment.main_address if trainer.num_nodes > 1 else None, me)
        address: Address = strategy.broadcast(own)
        try:
            link = None if me.rank == 0 else connect(address, me)
        except OSError as error:
            warnings.warn(
                f"Rank {me.rank} is not noticed when it dies: it cannot reach rank 0 ({error}).", stacklevel=2
            )
            return None
        watch = Watch(
            me,
            link,
            server=server,
            token=address.token,
            on_death=partial(_end, me),
            on_failure=partial(_end_soon, me),
            on_stop=self.stopping.on_news,
        )
        watch.start()
        return watch

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.leave()
            self._watch = None


def _is_child(trainer: Trainer) -> bool:
    """Whether this process was started by another rank."""
    return (
        isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment) and trainer.local_rank > 0
    )


def _end(me: Member, reason: str) -> None:
    """End this process, whatever its main thread is doing: it may wait for a rank that is gone."""
    _say(me, reason)
    os._exit(FAILED)


def _end_soon(me: Member, reason: str) -> None:
    _say(me, reason)
    timer = threading.Timer(GRACE_SECONDS, os._exit, [FAILED])
    timer.daemon = True
    timer.start()


def _say(me: Member, reason: str) -> None:
    os.write(2, f"\nerror: {reason}; rank {me.rank} ends too.\n".encode())  # the main thread may be printing
