"""ablate.py and report.py: a tiny grid for real, and the statistics against independent computations."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ablate
import report
from ablate import Cell, Study
from command import UserError
from conftest import ROOT, run

GRID = ["tiny.py", "--arm=linear,nonlinear", "--learning_rate=1e-2,1e30", "--seed=1,2", "--devices=cpu,cpu", "--out=r"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A folder in which a grid of two arms, two rates, of which one diverges, and two seeds was run."""
    folder, here = tmp_path_factory.mktemp("grid"), os.getcwd()
    os.chdir(folder)
    try:
        write_tiny()
    finally:
        os.chdir(here)
    ended = run("ablate.py", *GRID, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, ended


def write_tiny():
    """A data set of letters and tiny.py, which trains on it in a second."""
    letters = "".join(np.random.default_rng(0).choice(list("abc \n"), 4000))
    Path("tiny.txt").write_text(letters)
    import prepare_data

    prepare_data.main(["text", "--name=tiny", "--input", "tiny.txt", "--tokenizer=char"])
    Path("tiny.py").write_text(
        "dataset, device, dtype = 'tiny', 'cpu', 'float32'\n"
        "n_layer, n_head, n_embd, block_size = 1, 2, 16, 16\n"
        "batch_size, gradient_accumulation_steps, max_iters, warmup_iters = 2, 1, 12, 2\n"
        "eval_interval, eval_tokens, log_interval = 4, 200, 3\n"
    )


def records(folder):
    """Every record of the cells: {path: bytes}"""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("r/*/*"))}


def test_a_grid_is_complete(grid):
    folder, ended = grid
    cells = {
        f"{arm}-lr{rate}-seed{seed}" for arm in ("linear", "nonlinear") for rate in ("0.01", "1e+30") for seed in (1, 2)
    }
    assert {path.name for path in (folder / "r").iterdir() if path.is_dir()} == cells
    for cell in cells:
        files = {path.name for path in (folder / "r" / cell).iterdir()}
        config = json.loads((folder / "r" / cell / "config.json").read_text())
        arm, rate, seed = cell.split("-")
        assert config["model"]["query_mode"] == arm
        assert config["settings"]["learning_rate"] == float(rate[2:]) and config["settings"]["seed"] == int(seed[4:])
        last = json.loads((folder / "r" / cell / "metrics.jsonl").read_text().splitlines()[-1])
        if rate == "lr0.01":
            summary = json.loads((folder / "r" / cell / "summary.json").read_text())
            assert files == {"config.json", "metrics.jsonl", "summary.json"}
            assert summary["steps"] == 12 and last["val_loss"] == summary["final_val_loss"]
        else:
            assert files == {"config.json", "metrics.jsonl"} and last["diverged"] is True
    assert len(ended.stdout.splitlines()) >= 9 and "; 0 to go" in ended.stdout


def test_the_report_of_a_grid(grid):
    text = (grid[0] / "r/report.md").read_text()
    assert "8 runs, each of 12 steps, 384 tokens" in text
    linear, nonlinear = [line for line in text.splitlines() if line.startswith(("| linear |", "| nonlinear |"))][:2]
    assert "0.01, not bracketed" in linear and "0.01, not bracketed" in nonlinear  # the best is the lowest
    assert "(n = 2)" in linear and linear.endswith("| 2 |") and nonlinear.endswith("| 2 |")
    losses = {
        arm: [
            json.loads((grid[0] / f"r/{arm}-lr0.01-seed{seed}/summary.json").read_text())["final_val_loss"]
            for seed in (1, 2)
        ]
        for arm in ("linear", "nonlinear")
    }
    assert f"{np.mean(losses['linear']):.4f} ± {np.std(losses['linear'], ddof=1):.4f}" in linear
    gain = np.exp(np.mean(losses["nonlinear"]) - np.mean(losses["linear"])) - 1
    assert f"{100 * gain:+.2f} %" in nonlinear
    assert text.count("| 2 diverged (2) |") == 2  # both arms at the high rate


def test_the_same_command_runs_nothing_again(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    before = records(grid[0]), (grid[0] / "r/report.md").read_bytes()
    assert ablate.main(GRID) == 0
    assert (records(grid[0]), (grid[0] / "r/report.md").read_bytes()) == before
    assert "to go" not in capsys.readouterr().out


def test_the_cells_of_a_dry_run(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    before = records(grid[0])
    assert ablate.main([*GRID[:3], "--seed=1,2,3", *GRID[4:], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("to run" in line for line in lines) == 4 and sum("diverged" in line for line in lines) == 4
    # d = 16, r = 8: 2 * 16 * 8 weights and two gains of 16 against 16 * 16 weights
    assert all(f"{256 if line.startswith('linear') else 288:11,}" in line for line in lines[1:13])
    assert lines[-1].startswith("at least 4 runs to go") and records(grid[0]) == before


def test_a_dry_run_measures_where_nothing_is_known(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    assert ablate.main([*GRID[:-1], "--out=never", "--dry-run"]) == 0
    assert "at least 8 runs to go, of about" in capsys.readouterr().out and not Path("never").exists()


def test_other_settings_in_the_same_folder_are_refused(grid, monkeypatch):
    monkeypatch.chdir(grid[0])
    before = records(grid[0])
    original = Path("tiny.py").read_text()
    try:
        Path("tiny.py").write_text(
            original.replace("max_iters, warmup_iters = 2, 1, 12, 2", "max_iters, warmup_iters = 2, 1, 13, 2")
        )
        with pytest.raises(UserError, match="max_iters=12, now 13"):
            ablate.main(GRID)
    finally:
        Path("tiny.py").write_text(original)
    with pytest.raises(UserError, match="was begun with linear="):
        ablate.main([*GRID, "--weight_decay=0.5"])
    assert records(grid[0]) == before


def test_a_run_that_fails_stops_the_grid_with_its_last_words():
    write_tiny()
    Path("r/linear-lr0.01-seed1").mkdir(parents=True)
    Path("r/linear-lr0.01-seed1/config.json").write_text("{")
    ended = run("ablate.py", *GRID)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and line.startswith("ablate.py: linear-lr0.01-seed1: ") and "config.json" in line
    assert not Path("r/nonlinear-lr0.01-seed2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_goes_on_where_it_was(number, grid):
    write_tiny()
    undisturbed = [line for line in (grid[0] / "r/report.md").read_text().splitlines() if line.startswith("| ")]
    slow = [*GRID, "--max_iters=12"]
    process = subprocess.Popen([sys.executable, ROOT / "ablate.py", *slow], stdout=subprocess.DEVNULL)
    finished = Path("r/linear-lr0.01-seed1/summary.json")
    while not finished.exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    process.wait(60)
    kept = {path: path.stat().st_mtime_ns for path in Path("r").glob("*/summary.json")}
    assert run("ablate.py", *slow).returncode == 0
    assert kept and all(path.stat().st_mtime_ns == at for path, at in kept.items())
    report_lines = [line for line in Path("r/report.md").read_text().splitlines() if line.startswith("| ")]
    assert [without_speed(line) for line in report_lines] == [without_speed(line) for line in undisturbed]


def without_speed(line):
    cells = line.split("|")
    return cells[:-3] + cells[-2:] if len(cells) == 12 else cells


# ---------------------------------------------------------------------------------------------------
# --tune, on a loss that is known.


def tuned(loss, first=(4e-3, 8e-3), seeds=(1, 2, 3), arms="ab"):
    """Run the search where the loss of a cell is known -> Study, outcomes."""
    study = Study("c.py", dict.fromkeys(arms, {}), list(first), list(seeds), True, Path("r"))
    outcomes = {}
    while todo := [cell for cell in study.cells(outcomes) if cell not in outcomes]:
        assert study.to_go(outcomes) >= len(todo)
        outcomes[todo[0]] = loss(todo[0])
    assert study.to_go(outcomes) == 0
    return study, outcomes


def bowl(best):
    """Loss 1 + log2(rate / best of the arm)^2, diverging above 8 times the best."""

    def loss(cell):
        off = math.log2(cell.learning_rate / best[cell.arm])
        return 1 + off**2 + 0.01 * cell.seed if off <= 3 else math.inf

    return loss


def seeds_by_rate(outcomes, arm):
    rates = sorted({cell.learning_rate for cell in outcomes if cell.arm == arm})
    return {rate: sorted(c.seed for c in outcomes if c.arm == arm and c.learning_rate == rate) for rate in rates}


def test_tuning_brackets_each_arm_and_spends_the_seeds_at_its_best():
    _, outcomes = tuned(bowl({"a": 1e-3, "b": 3e-2}))
    assert seeds_by_rate(outcomes, "a") == {5e-4: [1], 1e-3: [1, 2, 3], 2e-3: [1], 4e-3: [1], 8e-3: [1]}
    assert seeds_by_rate(outcomes, "b") == {4e-3: [1], 8e-3: [1], 1.6e-2: [1], 3.2e-2: [1, 2, 3], 6.4e-2: [1]}


def test_a_rate_that_was_lucky_is_overtaken():
    """The best with the first seed fails with the second; the next best gets a lower neighbour, and the seeds."""

    def loss(cell):
        return 9.0 if (cell.learning_rate, cell.seed) == (8e-3, 2) else bowl({"a": 7e-3})(cell)

    _, outcomes = tuned(loss, arms="a")
    assert seeds_by_rate(outcomes, "a") == {2e-3: [1], 4e-3: [1, 2, 3], 8e-3: [1, 2], 1.6e-2: [1]}


def test_tuning_finds_its_way_down_from_rates_that_all_diverge():
    _, outcomes = tuned(bowl({"a": 1e-4, "b": 1e-3}), first=(8e-3, 1.6e-2))
    assert seeds_by_rate(outcomes, "a")[1.25e-4] == [1, 2, 3]


def test_tuning_gives_up_where_the_loss_never_turns():
    _, outcomes = tuned(lambda cell: -cell.learning_rate, first=[1.0], seeds=[1, 2], arms="a")
    assert len(outcomes) == ablate.MOST_RATES + 1


def test_finished_cells_on_the_disk_are_found_again_in_any_order():
    study, outcomes = tuned(bowl({"a": 1e-3, "b": 3e-2}))
    for cell, loss in outcomes.items():
        study.run(cell).path.mkdir(parents=True)
        if loss < math.inf:
            study.run(cell).write_json("summary.json", {"final_val_loss": loss})
        else:
            study.run(cell).log({"step": 3, "diverged": True})
    assert study.outcomes() == outcomes


# ---------------------------------------------------------------------------------------------------
# The statistics.


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}
    for freedom, quantile in table.items():
        assert report.t_quantile(freedom) == pytest.approx(quantile, abs=6e-5)


def test_the_paired_difference_by_hand():
    # pairs of seeds 1, 3 and 4: differences -0.01, -0.02, -0.03; mean -0.02, deviation 0.01
    difference = report.paired_difference({1: 1.99, 3: 2.08, 4: 2.17, 5: 9.0}, {1: 2.0, 2: 9.0, 3: 2.1, 4: 2.2})
    assert difference.n == 3 and difference.mean == pytest.approx(-0.02)
    assert difference.half == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert difference.log_loss_percent()[0] == pytest.approx(-100 * 0.02 / 2.1)
    assert difference.perplexity_percent() == pytest.approx([-1.980, -4.386, 0.486], abs=1e-3)


def test_the_interval_covers_what_it_should():
    """In 95 % of repeated experiments the true difference lies within the interval, whatever seeds have in common."""
    draw, hits, trials = np.random.default_rng(7), 0, 1000
    half = report.t_quantile(4)
    for _ in range(trials):
        common, noise = draw.normal(2, 0.3, 5), draw.normal(0, 0.01, (2, 5))
        d = report.paired_difference(dict(enumerate(common + 0.05 + noise[0])), dict(enumerate(common + noise[1])))
        hits += abs(d.mean - 0.05) <= d.half
    assert half == pytest.approx(2.7764, abs=1e-4) and 0.93 < hits / trials < 0.97


def test_one_seed_gives_no_interval_and_no_pair_gives_nothing():
    assert math.isnan(report.paired_difference({1: 2.0}, {1: 2.1}).half)
    assert report.paired_difference({1: 2.0}, {2: 2.1}) is None


def write_study(losses, tune, seeds=(1, 2, 3)):
    """Records of runs that never were: losses {(arm, rate, seed): loss} -> Study, outcomes."""
    arms = {arm: {} for arm, _, _ in losses}
    study = Study("c.py", arms, sorted({rate for _, rate, _ in losses}), list(seeds), tune, Path("r"))
    outcomes = {Cell(*key): loss for key, loss in losses.items()}
    settings = {"max_iters": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "dtype": "float32"}
    model = {"block_size": 8, "n_layer": 1, "n_embd": 8, "n_head": 1}
    for number, (cell, loss) in enumerate(outcomes.items()):
        study.run(cell).path.mkdir(parents=True)
        about = {"settings": settings, "model": model, "data": {"source": "nowhere"}, "device": "cpu"}
        about |= {"versions": {"torch": "2"}, "parameters": {"total": 3, "non_embedding": 2, "query_path": 1}}
        study.run(cell).write_json("config.json", about)
        if loss < math.inf:
            study.run(cell).write_json("summary.json", {"tokens_per_second": 100 + number, "final_val_loss": loss})
            study.run(cell).log({"step": 1, "train_loss": loss + 1})
            study.run(cell).log({"step": 2, "train_loss": loss})
    Path("r/study.json").write_text('{"command": "python ablate.py c.py"}')
    return study, outcomes


def test_the_best_rate_has_the_lowest_mean_over_the_seeds_it_has():
    losses = {("a", 0.1, 1): 2.0, ("a", 0.2, 1): 1.7, ("a", 0.4, 1): math.inf}
    losses |= {("b", 0.1, 1): 1.9, ("b", 0.2, 1): 1.6, ("b", 0.4, 1): 1.5, ("b", 0.4, 2): math.inf}
    losses |= {("a", 0.2, 2): 1.8, ("a", 0.2, 3): 1.9, ("b", 0.2, 2): 1.6, ("b", 0.2, 3): 1.7}
    a, b = report.summarise(*write_study(losses, tune=True))
    assert a.bracketed and a.best_rate == 0.2 and a.losses == {1: 1.7, 2: 1.8, 3: 1.9} and a.diverged == 1
    assert b.bracketed and b.best_rate == 0.2 and b.losses == {1: 1.6, 2: 1.6, 3: 1.7} and b.diverged == 1
    assert a.speeds == [100, 101, 107, 108]
    assert report.paired_difference(b.losses, a.losses).mean == pytest.approx(-1 / 6)
    assert "| b | 1.9000 (1) | **1.6333 (3)** | 1 diverged (2) |" in report.rate_table([a, b])


def test_a_full_grid_chooses_by_the_mean_over_seeds():
    losses = {
        ("a", rate, seed): loss
        for rate, row in ((0.1, (1, 3, 2)), (0.2, (2, 1.5, 2.2)))
        for seed, loss in enumerate(row, 1)
    }
    (a,) = report.summarise(*write_study(losses, tune=False))
    assert a.best_rate == 0.2 and not a.bracketed and a.losses == {1: 2, 2: 1.5, 3: 2.2}


def test_pictures_are_drawn_and_the_same_each_time():
    pytest.importorskip("matplotlib")
    losses = {(arm, rate, seed): 2 + 0.1 * seed - rate for arm in "ab" for rate in (0.1, 0.2) for seed in (1, 2, 3)}
    study, outcomes = write_study(losses | {("b", 0.2, 3): math.inf}, tune=False)
    report.write(study, outcomes)
    first = [Path(f"r/{name}.svg").read_bytes() for name in ("rates", "curves")]
    report.write(study, outcomes)
    assert first == [Path(f"r/{name}.svg").read_bytes() for name in ("rates", "curves")]
    assert all(text.startswith(b"<?xml") for text in first) and "![rates](rates.svg)" in Path("r/report.md").read_text()


def test_without_matplotlib_there_is_a_report_and_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(*write_study({("a", 0.1, 1): 2.0}, tune=False, seeds=[1]))
    assert capsys.readouterr().out.splitlines()[0].endswith("(pip install matplotlib)")
    assert "rates.svg" not in Path("r/report.md").read_text() and not Path("r/rates.svg").exists()
