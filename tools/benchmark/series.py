"""What is measured while one quantity grows: workloads that differ in it alone."""

from dataclasses import dataclass, replace

from tools.benchmark.workloads import WORKLOADS, ModelShape, Workload

_NARROW = ModelShape(vocabulary=2_000, hidden=128, intermediate=344, layers=2, heads=2)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Workloads along one quantity.

    Args:
        quantity: Its name.
        points: Its values, ascending, with the workload of each.
    """

    quantity: str
    points: dict[int, Workload]

    def reduced(self) -> "Series":
        """The first two points, to try the measurement itself."""
        return replace(self, points=dict(list(self.points.items())[:2]))


def _workload(
    name: str, model: ModelShape, num_prompts: int, prompt_tokens: int, group_size: int, new: int
) -> Workload:
    return Workload(
        name=name,
        model=model,
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
        group_size=group_size,
        max_new_tokens=new,
    )


def _all_series() -> dict[str, Series]:
    small = WORKLOADS["W1"].model
    points = {
        "prompts": {n: _workload(f"prompts={n}", small, n, 16, 8, 64) for n in (1, 2, 4, 8)},
        "prompt_tokens": {n: _workload(f"prompt_tokens={n}", small, 2, n, 8, 16) for n in (32, 128, 512, 1024)},
        "group_size": {n: _workload(f"group_size={n}", small, 2, 128, n, 32) for n in (4, 8, 16, 32)},
        "vocabulary": {
            n: _workload(f"vocabulary={n}", replace(_NARROW, vocabulary=n), 2, 16, 8, 32)
            for n in (2_000, 8_000, 32_000, 128_000)
        },
    }
    return {quantity: Series(quantity=quantity, points=of_it) for quantity, of_it in points.items()}


SERIES = _all_series()
POINTS = {workload.name: workload for series in SERIES.values() for workload in series.points.values()}
