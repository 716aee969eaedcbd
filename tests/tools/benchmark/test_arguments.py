import sys
from argparse import ArgumentTypeError

import pytest

from tools.benchmark import __main__ as command
from tools.benchmark.arguments import folder, positive, python_with_trl


def test_a_number_is_at_least_one():
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(ArgumentTypeError, match="at least 1"):
            positive(text)


def test_a_folder_is_made(tmp_path):
    assert folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentTypeError, match=r"file cannot be made: File exists"):
        folder(str(tmp_path / "file"))


def test_an_interpreter_has_trl(tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"nowhere/python does not run: No such file"):
        python_with_trl("nowhere/python")
    with pytest.raises(ArgumentTypeError, match=r"has no TRL; `make \.venv-peers/installed`"):
        python_with_trl(_python(tmp_path, status=1))
    assert python_with_trl(_python(tmp_path, status=0)) == str(tmp_path / "python")


def test_the_cold_start_is_looked_for_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "POLICY_FOLDER", tmp_path / "policy")
    arguments = ["--trl-python", _python(tmp_path, status=0), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert "quickstart_cold_start.yaml" in capsys.readouterr().err


def _python(tmp_path, *, status):
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\nraise SystemExit({status})\n")
    path.chmod(0o755)
    return str(path)
