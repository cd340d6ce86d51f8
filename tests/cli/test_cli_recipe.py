"""run without a probe: Phases II and III in one training, by the recipe of Tang et al. 2023."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import NO_PIXELS, Dprandp, good, refused

SETTINGS = """\
[generate]
count = 60
resolution = 32

[pretrain]
arch = "wrn-10-1"
random_init = true
feature_stages = "projection"
projection_hidden = 32

[finetune]
steps = 3
head_steps = 2
batch_size = 12
views = 2
"""
DATA = ("--data", "npz:tiny.npz", "--eps", 2)
RECIPES = Path(__file__).resolve().parents[2] / "scripts/recipes"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_run_by_the_recipe(dprandp: Dprandp, config: Path, tmp_path: Path) -> None:
    run, command = tmp_path / "run", ("run", "--recipe", "dp-randp", "--config", config, *DATA)
    plan = good(dprandp(*command, "--run", run, "--plan", "--json", before=NO_PIXELS))
    assert [stage["stage"] for stage in plan["stages"]] == ["generate", "pretrain", "finetune"]
    assert not run.exists()
    result = good(dprandp(*command, "--run", run, "--json"))
    assert list(result["results"]) == ["generate", "pretrain", "finetune"]
    assert (result["stage"], result["source"], result["charged_steps"]) == ("finetune", "pretrain", 3)
    assert result["epsilon"] == pytest.approx(plan["epsilon_after"])
    other = "but head_steps = 2, batch_size = 12, views = 2, steps = 3, the network is wrn-10-1"
    assert result["recipe"].endswith(other)
    again = dprandp(*command, "--run", run, "--json")
    assert good(again)["epsilon"] == result["epsilon"]
    for check in (("verify",), ("report",), ("status", "--check"), ("audit", "--trials", 500, "--canaries", 50)):
        done = dprandp(*check, "--run", run)
        assert done.code == 0, (check, done.out, done.err)
    rows = good(dprandp("predict", "--run", run, "--data", "npz:tiny.npz", "--json"))["predictions"]
    assert len(rows) == result["test_examples"]


@pytest.mark.slow
def test_a_fine_tune_by_the_recipe_goes_on_from_no_probe(dprandp: Dprandp, config: Path, tmp_path: Path) -> None:
    """And one after a probe is another: at size paper the run's probe decides."""
    paper = ("--size", "paper", "--config", config)
    for stage in ("generate", "pretrain"):
        assert dprandp(stage, "--run", tmp_path / "run", *paper).code == 0
    plan = ("finetune", *paper, *DATA, "--run", tmp_path / "run", "--plan", "--json")
    assert good(dprandp(*plan))["steps"] == 3
    probe = ("probe", *paper, *DATA, "--run", tmp_path / "run")
    (tmp_path / "recipe.toml").write_text(SETTINGS.replace("head_steps = 2\n", "") + "[probe]\nsteps = 3\n")
    assert dprandp(*probe).code == 0
    result = good(dprandp("finetune", *paper, "--run", tmp_path / "run", "--json"))
    assert (result["source"], result.get("recipe"), result.get("head_steps")) == ("probe", None, None)


def test_what_does_not_go_with_it_is_refused(dprandp: Dprandp, config: Path, tmp_path: Path) -> None:
    command = ("run", "--recipe", "dp-randp", *DATA, "--run", tmp_path / "run")
    for flags, code, *said in (
        (("--config", config, "--share", 0.3), 2, "--share", "trains without one", "--recipe ours"),
        (("--config", config, "--probe-steps", 3), 2, "--probe-steps"),
        (("--batch-size", 12), 2, "a patchnet need the probe's whitening"),
        (("--config", config, "--batch-size", 4096), 2, "exceeds the 120 training examples"),
        (("--config", config, "--eps", 0.5), 2, "not for ε = 0.5", "--recipe ours"),
        (("--arch", "wrn-10-1", "--recipe", "dp-randb"), 2, "dp-randp"),
    ):
        refused(dprandp(*command, *flags, before=NO_PIXELS), code, *said)
    assert not (tmp_path / "run/privacy").exists()
    refused(dprandp("finetune", "--recipe", "dp-randp", *DATA, "--run", tmp_path / "new"), 3, "there is no run")


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_command_of_a_published_recipe_plans_it(dprandp: Dprandp, file: Path, tmp_path: Path) -> None:
    (line,) = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#     dprandp")]
    command = line.removeprefix("#     dprandp ").replace(f"scripts/recipes/{file.name}", str(file)).split()
    command[command.index("--run") + 1] = str(tmp_path / "run")
    plan = good(dprandp(*command, "--plan", "--json", before=NO_PIXELS))
    assert 0.99 < plan["epsilon_after"] <= 1
    assert not (tmp_path / "run").exists()
