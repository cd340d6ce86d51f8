"""The systems that are compared: flags that exist, one budget for each, and a start that their first stage can take."""

from __future__ import annotations

import itertools
import sys

import compare_systems
import pytest
import typer

from dprandp.cli import app

GROUP = typer.main.get_command(app)


def parsed(command: list[str]) -> dict:
    return GROUP.commands[command[0]].make_context(command[0], list(command[1:])).params


@pytest.mark.parametrize("name", compare_systems.SYSTEMS)
def test_the_flags_of_a_system_exist(name):
    for command in compare_systems.SYSTEMS[name]:
        assert parsed(command)
    with pytest.raises(Exception, match="No such option"):
        parsed([*command, "--no-such-flag"])


@pytest.mark.parametrize("name", compare_systems.GROUPS["continual"])
def test_a_continued_system_has_a_tenth_that_is_public_and_spends_what_no_other_stage_will(name):
    first, *later = map(parsed, compare_systems.SYSTEMS[name])
    assert (first["public"], first["steps"]) == ("fraction:0.1", 200)
    assert first["share"] == (None if later else 1)


@pytest.mark.parametrize(
    ("system", "stages", "few"),
    [
        ("scratch, K = 1", ["finetune"], None),
        ("all phases", ["generate", "pretrain", "probe", "finetune"], False),
        ("continual, from scratch", ["generate", "pretrain", "continue"], True),
        ("continual, then probe", ["generate", "pretrain", "continue", "probe"], False),
    ],
)
def test_a_cell_runs_its_stages_on_one_run_and_names_data_and_budget_once(
    tmp_path, monkeypatch, system, stages, few
):
    asked = []

    def pretended(stage: str, *flags: object) -> dict:
        given = dict(itertools.pairwise(flags))
        asked.append((stage, given, parsed([stage, *map(str, flags)])))
        given["--run"].mkdir(parents=True, exist_ok=True)
        return {"seconds": 1.0, "accuracy": 0.5, "auc": 0.8, "epsilon": 0.9}

    monkeypatch.setattr(compare_systems, "dprandp", pretended)
    monkeypatch.setattr(sys, "argv", ["x", "digits", "--systems", system, "--epsilons", "2", "--seeds", "1",
                                      "--out", str(tmp_path)])  # fmt: skip
    compare_systems.main()
    assert [stage for stage, *_ in asked] == stages
    private = [given for stage, given, _ in asked if stage not in ("generate", "pretrain")]
    assert [given.get("--eps") for given in private] == [2.0, *[None] * (len(private) - 1)]
    assert {given["--run"] for given in private} == {tmp_path / "run"}
    assert {given["--run"] for stage, given, _ in asked if stage in ("generate", "pretrain")} <= set(tmp_path.iterdir())
    if few is not None:
        generated, pretrained = asked[0][2], asked[1][2]
        assert generated["count"] == (100 if few else None)
        assert bool(pretrained["random_init"]) == ("continue" in stages)
