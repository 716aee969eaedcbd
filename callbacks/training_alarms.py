"""Observer: says in words when a metric passes the bound beyond which runs go wrong."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.types import ConfigurationError

MEDIAN_OF = 100
"""Updates that the median of the gradient's length is of."""
LEAST_FOR_MEDIAN = 10
NEVER = float("inf")


class TrainingAlarms(Callback):
    """Warns, once per run and alarm, of what passed its bound; the metrics are defined in `docs/metrics.md`.

    ======================  ==================================================================
    alarm                   when
    ======================  ==================================================================
    truncation              ``completion/truncation_ratio`` > ``max_truncation_ratio``
    no signal               1 - ``reward/groups_with_signal`` > ``max_groups_without_signal``
    entropy gone            ``policy/entropy`` < ``min_entropy``
    entropy doubled         it is at least twice what it was within the last 20 updates
    sampler mismatch        ``sampler/kl`` > ``max_sampler_kl``
    few effective samples   ``sampler/effective_sample_size`` < ``min_effective_sample_size``
    gradient                ``policy/gradient_norm`` > ``max_gradient_factor`` x its median
    ======================  ==================================================================

    Nothing is changed or stopped. The gradient's length is known where `GradientNorm` is among the callbacks.

    Args:
        max_truncation_ratio: In [0, 1]; 1 for no alarm.
        max_groups_without_signal: In [0, 1]; 1 for no alarm.
        min_entropy: In nats, >= 0; 0 for no alarm.
        max_sampler_kl: > 0; infinity for no alarm.
        min_effective_sample_size: In [0, 1]; 0 for no alarm.
        max_gradient_factor: > 1; infinity for no alarm. The median is of the last 100 updates, at least 10.

    Raises:
        ConfigurationError: A bound is out of its range.
    """

    def __init__(
        self,
        max_truncation_ratio: float = 0.1,
        max_groups_without_signal: float = 0.8,
        min_entropy: float = 0.05,
        max_sampler_kl: float = 1e-2,
        min_effective_sample_size: float = 0.3,
        max_gradient_factor: float = 10.0,
    ) -> None:
        _check("max_truncation_ratio", max_truncation_ratio, 0, 1)
        _check("max_groups_without_signal", max_groups_without_signal, 0, 1)
        _check("min_entropy", min_entropy, 0, NEVER)
        _check("max_sampler_kl", max_sampler_kl, 0, NEVER)
        _check("min_effective_sample_size", min_effective_sample_size, 0, 1)
        _check("max_gradient_factor", max_gradient_factor, 1, NEVER)
        self.max_truncation_ratio = max_truncation_ratio
        self.max_groups_without_signal = max_groups_without_signal
        self.min_entropy = min_entropy
        self.max_sampler_kl = max_sampler_kl
        self.min_effective_sample_size = min_effective_sample_size
        self.max_gradient_factor = max_gradient_factor
        self._said: set[str] = set()
        self._entropies: deque[float] = deque(maxlen=20)
        self._gradients: deque[float] = deque(maxlen=MEDIAN_OF)

    def state_dict(self) -> dict[str, Any]:
        """A resumed run says nothing twice."""
        return {"said": sorted(self._said), "entropies": [*self._entropies], "gradients": [*self._gradients]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run stopped."""
        self._said = set(state_dict["said"])
        self._entropies.extend(state_dict["entropies"])
        self._gradients.extend(state_dict["gradients"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Look at the metrics of an update that is over."""
        if not batch.ends_update:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for alarm, words in self._alarms(metrics).items():
            if alarm not in self._said:
                self._said.add(alarm)
                rank_zero_warn(f"Step {trainer.global_step}: {words} (TrainingAlarms says this once.)")

    def _alarms(self, metrics: Mapping[str, float]) -> dict[str, str]:
        return {**self._of_rollout(metrics), **self._of_entropy(metrics), **self._of_sampler_and_gradient(metrics)}

    def _of_rollout(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = {}
        truncated = metrics.get("completion/truncation_ratio", 0.0)
        if truncated > self.max_truncation_ratio:
            found["truncation"] = (
                f"{truncated:.0%} of the completions are cut off by model.sampling.max_new_tokens, more than "
                f"{self.max_truncation_ratio:.0%}: their rewards say little. Raise it, or punish length."
            )
        level = 1 - metrics.get("reward/groups_with_signal", 1.0)
        if level > self.max_groups_without_signal:
            found["signal"] = (
                f"in {level:.0%} of the groups all rewards are equal, more than {self.max_groups_without_signal:.0%}: "
                "nothing is learned from them. The prompts are too easy or too hard (reward/groups_all_right, _wrong)."
            )
        return found

    def _of_entropy(self, metrics: Mapping[str, float]) -> dict[str, str]:
        if "policy/entropy" not in metrics:
            return {}
        found, entropy = {}, metrics["policy/entropy"]
        if entropy < self.min_entropy:
            found["entropy"] = (
                f"the policy's entropy is {entropy:.3g} nats, below {self.min_entropy}: it explores no more."
            )
        least = min(self._entropies, default=entropy)
        if least > 0 and entropy >= 2 * least:
            found["doubled"] = (
                f"the policy's entropy went from {least:.3g} to {entropy:.3g} nats within 20 updates: it may fall "
                "apart. Lower the learning rate or the entropy bonus."
            )
        self._entropies.append(entropy)
        return found

    def _of_sampler_and_gradient(self, metrics: Mapping[str, float]) -> dict[str, str]:
        found = {}
        kl, size = metrics.get("sampler/kl", 0.0), metrics.get("sampler/effective_sample_size", 1.0)
        if kl > self.max_sampler_kl:
            found["sampler"] = (
                f"sampler and trainer differ by {kl:.2g} nats per token, more than {self.max_sampler_kl:g}. "
                "Compare their precision and settings, or set model.objective.correction."
            )
        if size < self.min_effective_sample_size:
            found["size"] = (
                f"the effective sample size is {size:.0%} of the tokens, below {self.min_effective_sample_size:.0%}: "
                "a few tokens carry the update."
            )
        norm = metrics.get("policy/gradient_norm")
        if norm is None:
            return found
        usual = median(self._gradients) if len(self._gradients) >= LEAST_FOR_MEDIAN else NEVER
        if norm > self.max_gradient_factor * usual:
            found["gradient"] = (
                f"the gradient's length is {norm:.3g}, more than {self.max_gradient_factor:g} times its median "
                f"{usual:.3g}. Look at the completions of this iteration; clip with trainer.gradient_clip_val."
            )
        self._gradients.append(norm)
        return found


def _check(name: str, value: float, lower: float, upper: float) -> None:
    if not lower <= value <= upper:
        raise ConfigurationError(f"TrainingAlarms.{name} must be in [{lower}, {upper}], got {value}.")
