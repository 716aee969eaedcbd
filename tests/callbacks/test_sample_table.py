"""The table of samples says what happened to each completion shown."""

import io

import pytest
import replay
import rich
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console

from grpo_lightning.callbacks.sample_table import SampleTable
from grpo_lightning.types import Completion, ConfigurationError, FinishReason, Prompt, Rewards, Rollout

NAN = float("nan")


def rollout(*texts, prompts=1, truncated=()):
    completions = [
        Completion(
            token_ids=(0,) * len(text),
            sampler_logprobs=(0.0,) * len(text),
            text=text,
            finish_reason=FinishReason.LENGTH if text in truncated else FinishReason.EOS,
        )
        for text in texts
    ]
    questions = tuple(Prompt(index=p, token_ids=(p,), text=f"question {p}") for p in range(prompts))
    return Rollout(iteration=4, slots=tuple(range(prompts)), prompts=questions, completions=tuple(completions))


def rewards(*columns, names=("right",), failed=None):
    values_BK = torch.tensor(columns, dtype=torch.float64).T
    failed_BK = torch.zeros_like(values_BK, dtype=torch.bool) if failed is None else torch.tensor(failed).T
    weights = (1.0, 0.5)[: len(names)]
    return Rewards(names=names, weights=weights, values_BK=values_BK, failed_BK=failed_BK)


def rows(table):
    """The cells of each line that is drawn."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    drawn = console.file.getvalue().splitlines()
    return [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in drawn if line[0] in "│┃"
    ]


def test_a_group_is_shown_from_the_best_to_the_worst():
    table = SampleTable().table(
        rollout("wrong", "right", "half", truncated=("wrong",)),
        rewards([0.0, 1.0, 0.5]),
        torch.tensor([-1.5, 1.5, 0.0]),
    )
    assert table.title == "Iteration 5"
    assert rows(table) == [
        ["completion", "right", "advantage", "tokens"],
        ["question 0", "", "", ""],
        ["right", "1.00", "+1.50", "5"],
        ["half", "0.50", "+0.00", "4"],
        ["wrong", "0.00", "-1.50", "5 ✂"],
    ]


def test_several_rewards_have_a_total_and_what_is_missing_is_said():
    # Weights 1 and 0.5: the first totals 1.5; on the second the format reward failed, on the third it does not apply.
    table = SampleTable().table(
        rollout("a", "b", "c"),
        rewards(
            [1.0, 1.0, 0.0],
            [1.0, NAN, NAN],
            names=("right", "format"),
            failed=[[False, False, False], [False, True, False]],
        ),
        torch.tensor([1.0, 0.0, -1.0]),
    )
    assert rows(table) == [
        ["completion", "right", "format", "total", "advantage", "tokens"],
        ["question 0", "", "", "", "", ""],
        ["a", "1.00", "1.00", "1.50", "+1.00", "1"],
        ["c", "0.00", "-", "0.00", "-1.00", "1"],
        ["b", "1.00", "failed", "-", "+0.00", "1"],
    ]


@pytest.mark.parametrize(
    ("number", "shown"),
    [(1, ["5"]), (2, ["5", "0"]), (3, ["5", "3", "0"]), (6, ["5", "4", "3", "2", "1", "0"]), (9, list("543210"))],
)
def test_fewer_completions_are_spread_over_the_group(number, shown):
    table = SampleTable(num_completions=number).table(
        rollout("0", "1", "2", "3", "4", "5"), rewards([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), torch.zeros(6)
    )
    assert [row[0] for row in rows(table)[2:]] == shown


def test_only_the_first_prompts_are_shown_with_their_own_completions():
    table = SampleTable(num_prompts=2).table(
        rollout("a", "b", "c", "d", "e", "f", prompts=3), rewards([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]), torch.zeros(6)
    )
    assert [row[0] for row in rows(table)[1:] if row[0]] == ["question 0", "a", "b", "question 1", "c", "d"]


def test_a_long_text_keeps_its_beginning_and_its_end_and_markup_is_text():
    text = "[red]" + "x" * 50 + "[/red] answer"
    table = SampleTable(max_characters=20).table(rollout(text), rewards([1.0]), torch.zeros(1))
    assert rows(table)[2][0] == "[red]xxxxx […] ed] answer"


class Printed(SampleTable):
    def table(self, rollout, rewards, advantages_B):
        assert len(advantages_B) == len(rollout.completions)
        return f"<<{rollout.iteration}>>"


def test_the_first_and_every_nth_iteration_is_shown_once(capsys):
    rich.reconfigure()
    replay.run(iterations=7, num_epochs=2, accumulate=2, callbacks=[Printed(every_n_iterations=3)])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("<<")]
    assert shown == ["<<0>>", "<<3>>", "<<6>>"]


def test_a_module_without_rollouts_and_a_rank_that_prints_nothing(capsys):
    class Rank:
        is_global_zero = False

    SampleTable().on_train_batch_end(Rank, BoringModel(), None, None, 0)
    Rank.is_global_zero = True
    SampleTable().on_train_batch_end(Rank, BoringModel(), None, None, 0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("argument", ["every_n_iterations", "num_prompts", "num_completions", "max_characters"])
def test_an_argument_below_one_is_named(argument):
    with pytest.raises(ConfigurationError, match=rf"SampleTable\.{argument} must be >= 1, got 0"):
        SampleTable(**{argument: 0})
