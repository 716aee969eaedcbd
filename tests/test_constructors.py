from dataclasses import dataclass

import pytest

from grpo_lightning.constructors import class_of, hint_of, known_classes, owner_of, settings_of


@dataclass
class Inner:
    depth: int = 1


class Parent:
    def __init__(self, seed: int = 0, **kwargs: object) -> None: ...


class Child(Parent):
    def __init__(self, inner: Inner, other: Inner | None = None, **kwargs: object) -> None: ...


class Puzzling:
    def __init__(self, known: int, value: "OnlyForTypeCheckers") -> None: ...  # noqa: F821


def test_settings_are_the_parameters_of_a_class_and_of_its_parents():
    assert settings_of(Child) == ["inner", "other", "seed"]
    assert settings_of(Inner) == ["depth"]


def test_the_type_of_a_setting_is_found_where_it_is_declared():
    assert hint_of(Child, "inner") is Inner
    assert hint_of(Child, "seed") is int
    assert hint_of(Child, "absent") is None
    assert hint_of(Puzzling, "known") is None, "types that cannot be read are unknown, and no defect"


@pytest.mark.parametrize(
    ("names", "owner", "unknown"),
    [
        (["depht"], Child, "depht"),
        (["inner", "depht"], Inner, "depht"),
        (["other", "depht"], Inner, "depht"),  # the class among the alternatives
        (["absent", "depht"], Child, "absent"),
    ],
)
def test_the_owner_of_a_name_is_the_last_class_on_the_way_to_it(names, owner, unknown):
    assert owner_of(f"{__name__}.Child", names) == (owner, unknown)


def test_a_class_path_may_name_a_nested_class_or_a_function():
    assert class_of("grpo_lightning.types.Prompt").__name__ == "Prompt"
    assert class_of("collections.OrderedDict.fromkeys").__name__ == "builtin_function_or_method"


def test_short_names_of_the_package_and_of_lightning_are_known():
    assert {"CharacterPolicy", "ModelCheckpoint"} <= known_classes()
    assert not {"_TunerExitException", "Thread"} & known_classes()
