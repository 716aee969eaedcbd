"""`docs/algorithms.md` says of every part and of every overlay what is so."""

import inspect
import re
from abc import ABC
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import replay
import yaml

from grpo_lightning import groups, objective

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/algorithms.md").read_text()
OVERLAYS = {path.stem: path.read_text() for path in sorted((ROOT / "configs/algorithm").glob("*.yaml"))}
AXES = {
    "advantage": objective.Advantage,
    "scale": objective.Scale,
    "ratio": objective.Ratio,
    "surrogate": objective.Surrogate,
    "correction": objective.Correction,
    "masks": objective.Mask,
    "kl": (objective.KLPenalty, objective.KLEstimator),
    "entropy": objective.EntropyBonus,
    "aggregation": objective.Aggregation,
    "groups": groups.GroupFilter,
}


def sections() -> dict[str, str]:
    """The text below each heading that names an axis or an overlay, by the name."""
    parts = re.split(r"^### `(\w+)`.*\n", PAGE, flags=re.MULTILINE)
    texts = (re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts[2::2])
    return dict(zip(parts[1::2], texts, strict=True))


def is_part(thing: object) -> bool:
    """Whether it is a class that YAML can name, and no axis."""
    return (
        inspect.isclass(thing)
        and not inspect.isabstract(thing)
        and ABC not in thing.__bases__
        and (is_dataclass(thing) or issubclass(thing, groups.GroupFilter))
    )


PARTS = {name: part for name, part in {**vars(objective), **vars(groups)}.items() if is_part(part)}


def stated(name: str) -> dict:
    """What an overlay states of the module."""
    return yaml.safe_load(OVERLAYS[name])["model"]["init_args"]


def call(part: object) -> str:
    """A part as it is built; without the parentheses where it has no settings."""
    return "`" + repr(part).replace("()", "") + "`"


def point(name: str) -> str:
    """Where an overlay stands in the grid: its parts with their settings."""
    built, settings = replay.overlay(name), stated(name)
    parts = [(axis, getattr(built, axis)) for axis in settings["objective"]]
    words = [
        f"{axis} {call(one)}"
        for axis, part in parts
        for one in (part if isinstance(part, tuple) else [part])
        if one is not None
    ]
    arguments = ", ".join(f"{key}={value}" for key, value in settings["groups"].get("init_args", {}).items())
    filter_name = settings["groups"]["class_path"] + (f"({arguments})" if arguments else "")
    return "**Grid:** " + " · ".join([*words, f"groups `{filter_name}`"]) + "."


def forwards(name: str) -> str:
    """What an overlay asks for besides the update's own forward."""
    built, settings = replay.overlay(name), stated(name)
    is_one_update = settings.get("num_epochs") == settings.get("num_minibatches") == 1
    asked = []
    if built.needs_old_logprobs(num_updates=1):
        asked.append("old policy")
    elif built.needs_old_logprobs(num_updates=2) and not is_one_update:
        asked.append("old policy where there is more than one update")
    asked += ["reference"] if built.needs_reference else []
    return "**Forwards besides:** " + (", ".join(asked) or "none") + "."


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("axis", AXES)
def test_the_grid_has_every_part_of_an_axis(axis):
    named = set(re.findall(r"`(\w+)`", sections()[axis]))
    assert {name for name in named if name in PARTS and issubclass(PARTS[name], AXES[axis])} == {
        name for name, part in PARTS.items() if issubclass(part, AXES[axis])
    }


def test_every_class_that_is_named_exists():
    callbacks = Path(ROOT / "callbacks").glob("*.py")
    others = {name for path in callbacks for name in re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`([A-Z]\w*[a-z]\w*)", PAGE))
    assert named - set(PARTS) - others == {"StepScores"}


def test_every_overlay_has_its_section_and_no_other_is_there():
    assert set(sections()) == set(AXES) | set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_section_says_what_the_overlay_builds_and_asks_for(name):
    section = one_line(sections()[name])
    assert point(name) in section
    assert forwards(name) in section
    assert "```math" in section
    assert "**When:**" in section


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_section_names_the_paper_that_the_overlay_names(name):
    papers = re.findall(r"arxiv.org/abs/\d+\.\d+", OVERLAYS[name].split("model:")[0])
    assert papers[0] in sections()[name]


def test_formulas_are_whole():
    assert all(line.count("$`") == line.count("`$") for line in PAGE.splitlines())
    for formula in re.findall(r"```math\n(.*?)```|\$`(.*?)`\$", PAGE, re.DOTALL):
        braces = re.sub(r"\\[{}]", "", "".join(formula))
        assert braces.count("{") == braces.count("}")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_page_is_found(name):
    assert "docs/algorithms.md" in (ROOT / name).read_text()
