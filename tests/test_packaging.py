"""What is installed: every folder with code, under the names that configs use."""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import grpo_lightning
import grpo_lightning.callbacks

ROOT = Path(__file__).parents[1]
NEEDS = {"grpo_lightning.rollout.cpu_executor": "vllm"}
"""Of modules that are imported by an extra alone, which."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    inside = [folder.parent.relative_to(ROOT) for folder in ROOT.glob("grpo_lightning/**/__init__.py")]
    extensions = [folder.parent.relative_to(ROOT) for folder in ROOT.glob("callbacks/**/__init__.py")]
    names = [".".join(folder.parts) for folder in inside]
    return {*names, *("grpo_lightning." + ".".join(folder.parts) for folder in extensions)}


def module_names() -> list[str]:
    names = {"grpo_lightning"}
    for package in (grpo_lightning, grpo_lightning.callbacks):
        names |= {module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")}
    return sorted(names)


def test_the_list_of_packages_is_the_folders():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


@pytest.mark.parametrize("name", module_names())
def test_every_module_is_importable(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    importlib.import_module(name)


def test_every_module_of_a_folder_has_a_package():
    folders = {file.parent for file in [*ROOT.glob("grpo_lightning/**/*.py"), *ROOT.glob("callbacks/**/*.py")]}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_callbacks_are_the_folder_at_top_level():
    assert Path(grpo_lightning.callbacks.__file__) == ROOT / "callbacks" / "__init__.py"


def test_importing_the_package_makes_no_callbacks_package_of_its_own_name():
    assert "callbacks" not in sys.modules


def test_the_version_is_read_without_importing_the_package():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "grpo_lightning.version.__version__"
    assert grpo_lightning.__version__ == importlib.metadata.version("grpo_lightning")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, from a copy: building leaves folders behind."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_module_and_the_types_marker(wheel):
    expected = {str(file.relative_to(ROOT)) for file in ROOT.glob("grpo_lightning/**/*.py")}
    expected |= {f"grpo_lightning/{file.relative_to(ROOT)}" for file in ROOT.glob("callbacks/**/*.py")}
    assert expected | {"grpo_lightning/py.typed"} == {n for n in wheel.namelist() if ".dist-info/" not in n}


def test_the_wheel_has_the_command_and_the_license(wheel):
    content = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "grpo-lightning = grpo_lightning.cli:main" in wheel.read(content["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in content


def pins() -> dict[str, Version]:
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    stated = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in stated}


def test_constraints_are_exact_public_versions():
    assert all(version.local is None for version in pins().values())


def test_constraints_lie_within_the_ranges_of_the_project():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["dev"],
        *extras["datasets"],
        *extras["math"],
        *extras["reasoning"],
        *extras["figures"],
    ]
    for requirement in map(Requirement, wanted):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "grpo-lightning":
            assert pins()[name] in requirement.specifier
