"""ablate.py and report.py: a tiny grid for real, and the statistics against independent computations."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ablate
import report
import train
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


def write_tiny(seed=0):
    """A data set of letters and tiny.py, which trains on it in a second."""
    letters = "".join(np.random.default_rng(seed).choice(list("abc \n"), 4000))
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
    assert "8 runs. Each: 12 steps, 384 tokens of tiny.txt; 1 layers, d 16, 2 heads; float32." in text
    linear, nonlinear = [line for line in text.splitlines() if line.startswith(("| linear |", "| nonlinear |"))][:2]
    assert "0.01, not bracketed" in linear and "0.01, not bracketed" in nonlinear  # the best is the lowest
    assert "(n = 2)" in linear and linear.endswith("| 2 of 4 |") and nonlinear.endswith("| 2 of 4 |")
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
    assert "val loss" not in capsys.readouterr().out


def test_the_cells_of_a_dry_run(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    before = records(grid[0])
    assert ablate.main([*GRID[:3], "--seed=1,2,3", *GRID[4:], "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("to run" in line for line in lines) == 4 and sum("diverged" in line for line in lines) == 4
    # d = 16, r = 8: 2 * 16 * 8 weights and two gains of 16 against 16 * 16 weights
    assert all(f"{256 if line.startswith('linear') else 288:11,}" in line for line in lines[1:13])
    assert lines[-1].startswith("4 to go, ") and lines[-1].endswith("each, 2 at a time") and records(grid[0]) == before


@pytest.mark.slow
def test_a_dry_run_measures_where_nothing_is_known(grid, monkeypatch, capsys):
    monkeypatch.chdir(grid[0])
    assert ablate.main([*GRID[:-1], "--out=never", "--dry-run"]) == 0
    assert "8 to go, " in capsys.readouterr().out and not Path("never").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("max_iters = 13", "max_iters was 12, now is 13"),
        ("weight_decay = 0.5", "weight_decay was 0.1, now is 0.5"),
        ("mlp_hidden = 99", "mlp_hidden was 64, now is 99"),
        ("eval_tokens = 300", "eval_tokens was 200, now is 300"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_cells_of_other_settings_are_refused(line, words, dry, grid, monkeypatch):
    monkeypatch.chdir(grid[0])
    before, original = records(grid[0]), Path("tiny.py").read_text()
    try:
        Path("tiny.py").write_text(f"{original}{line}\n")
        with pytest.raises(UserError, match=words):
            ablate.main([*GRID, *["--dry-run"] * dry])
    finally:
        Path("tiny.py").write_text(original)
    assert records(grid[0]) == before


def test_cells_on_other_data_are_refused(grid):
    shutil.copytree(grid[0] / "r", "r")
    write_tiny(seed=1)
    with pytest.raises(UserError, match="data set was"):
        ablate.main(GRID)


@pytest.mark.slow
def test_a_grid_that_was_killed_anywhere_ends_as_if_it_had_not_been(grid):
    shutil.copytree(grid[0], ".", dirs_exist_ok=True)
    undisturbed = losses()
    Path("r/linear-lr0.01-seed1/ckpt.pt").write_bytes(b"x")  # killed before it was cleaned
    Path("r/linear-lr1e+30-seed1/log.txt").touch()
    Path("r/linear-lr0.01-seed2/summary.json").unlink()  # killed before the first checkpoint
    shutil.rmtree("r/nonlinear-lr0.01-seed1")  # killed in the middle, with a checkpoint of step 8
    train.main("tiny.py --seed=1 --learning_rate=1e-2 --out_dir=r/nonlinear-lr0.01-seed1 --max_iters=8".split())
    Path("r/nonlinear-lr0.01-seed1/summary.json").unlink()
    config = Path("r/nonlinear-lr0.01-seed1/config.json")
    config.write_text(
        config.read_text()
        .replace('"lr_decay_iters": 8', '"lr_decay_iters": 12')
        .replace('"max_iters": 8', '"max_iters": 12')
    )
    ended = run("ablate.py", *GRID)
    assert ended.returncode == 0 and ended.stdout.count("val loss") == 2, ended.stdout + ended.stderr
    assert losses().keys() == undisturbed.keys() and not list(Path("r").glob("*/*.pt")) + list(
        Path("r").glob("*/log.txt")
    )
    assert losses()["linear-lr0.01-seed2"] == undisturbed["linear-lr0.01-seed2"]
    assert json.loads(config.read_text())["resumed"][0]["at_step"] == 8


def losses():
    return {
        path.parent.name: json.loads(path.read_text())["final_val_loss"] for path in Path("r").glob("*/summary.json")
    }


def test_a_run_that_fails_stops_the_grid_with_its_last_words(grid):
    shutil.copytree(grid[0], ".", dirs_exist_ok=True)
    for cell in ("linear-lr0.01-seed1", "linear-lr0.01-seed2"):
        Path(f"r/{cell}/summary.json").unlink()
        Path(f"r/{cell}/ckpt.pt").write_bytes(b"garbage")
    ended = run("ablate.py", *GRID)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and re.match(
        r"ablate.py: (linear-lr0.01-seed[12]): .*r/\1/ckpt.pt cannot be read", line
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_goes_on_where_it_was(number):
    write_tiny()
    command = [*GRID, "--max_iters=400", "--lr_decay_iters=400", "--eval_interval=50"]
    process = subprocess.Popen([sys.executable, ROOT / "ablate.py", *command], stdout=subprocess.DEVNULL)
    second = Path("r/linear-lr0.01-seed2/ckpt.pt")  # seed 1 beside it
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    kept = {path: path.stat().st_mtime_ns for path in Path("r").glob("*/summary.json")}
    assert len(kept) < 4
    assert run("ablate.py", *command).returncode == 0
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items()) and len(losses()) == 4
    resumed = json.loads(Path("r/linear-lr0.01-seed2/config.json").read_text())["resumed"]
    assert resumed[0]["at_step"] >= 50
    train.main(
        [*"tiny.py --query_mode=linear --seed=2 --out_dir=out/whole --learning_rate=1e-2".split(), *command[-3:]]
    )
    whole = json.loads(Path("out/whole/summary.json").read_text())["final_val_loss"]
    assert losses()["linear-lr0.01-seed2"] == pytest.approx(whole, rel=1e-6)  # rounding depends on the threads


# ---------------------------------------------------------------------------------------------------
# --tune, on a loss that is known.


def tuned(loss, first=(4e-3, 8e-3), tuning=(1, 2), seeds=(3, 4), arms="ab"):
    """Run the search where the loss of a cell is known -> Study, outcomes."""
    study = Study("c.py", dict.fromkeys(arms, {}), list(first), list(tuning), list(seeds), Path("r"))
    outcomes = {}
    while todo := [cell for cell in study.cells(outcomes) if cell not in outcomes]:
        assert study.to_go(outcomes) >= len(todo)
        outcomes[todo[0]] = loss(todo[0])
    assert study.to_go(outcomes) == 0 and set(study.cells(outcomes)) == set(outcomes)
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


def test_tuning_brackets_each_arm_and_measures_at_its_best():
    _, outcomes = tuned(bowl({"a": 1e-3, "b": 3e-2}))
    assert seeds_by_rate(outcomes, "a") == {5e-4: [1], 1e-3: [1, 2, 3, 4], 2e-3: [1], 4e-3: [1], 8e-3: [1]}
    assert seeds_by_rate(outcomes, "b") == {4e-3: [1], 8e-3: [1], 1.6e-2: [1], 3.2e-2: [1, 2, 3, 4], 6.4e-2: [1]}


def test_a_rate_that_was_lucky_is_overtaken():
    """The best with the first seed fails with the second; the next best gets a lower neighbour, and the seeds."""

    def loss(cell):
        return 9.0 if (cell.learning_rate, cell.seed) == (8e-3, 2) else bowl({"a": 7e-3})(cell)

    _, outcomes = tuned(loss, arms="a")
    assert seeds_by_rate(outcomes, "a") == {2e-3: [1], 4e-3: [1, 2, 3, 4], 8e-3: [1, 2], 1.6e-2: [1]}


def test_a_rate_that_was_tried_is_never_forgotten():
    """8e-3 fails with the second seed; 1.6e-2, tried as its neighbour, is then better than 4e-3."""
    known = {(4e-3, 1): 1.60, (8e-3, 1): 1.56, (8e-3, 2): 9.0, (1.6e-2, 1): 1.57, (1.6e-2, 2): 1.58}
    _, outcomes = tuned(lambda cell: known.get((cell.learning_rate, cell.seed), 1.59 + cell.learning_rate), arms="a")
    assert seeds_by_rate(outcomes, "a")[1.6e-2] == [1, 2, 3, 4]


def test_tuning_finds_its_way_down_from_rates_that_all_diverge():
    _, outcomes = tuned(bowl({"a": 1e-4, "b": 1e-3}), first=(8e-3, 1.6e-2))
    assert seeds_by_rate(outcomes, "a")[1.25e-4] == [1, 2, 3, 4]


def test_tuning_gives_up_where_the_loss_never_turns():
    _, outcomes = tuned(lambda cell: -cell.learning_rate, first=[1.0], tuning=[1], seeds=[2], arms="a")
    assert len(outcomes) == ablate.MOST_RATES + 1


def test_finished_cells_on_the_disk_are_found_again():
    study, outcomes = tuned(bowl({"a": 1e-3, "b": 3e-2}))
    for cell, loss in outcomes.items():
        study.run_folder(cell).path.mkdir(parents=True)
        if loss < math.inf:
            summary = {"final_val_loss": loss, "seconds": 1, "tokens_per_second": 1}
            study.run_folder(cell).write_json("summary.json", summary)
        else:
            study.run_folder(cell).log({"step": 3, "diverged": True})
    assert study.outcomes() == outcomes


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu", "cpu"]])
def test_workers_wait_for_what_only_others_can_tell(devices, monkeypatch):
    """The whole of a tuned grid by several workers, where a cell takes no time."""
    loss = bowl({"a": 1e-3, "b": 3e-2})

    def train_cell(grid, cell, device):
        time.sleep(0.001)
        with grid.changed:
            grid.outcomes[cell] = loss(cell)

    monkeypatch.setattr(ablate.Grid, "train", train_cell)
    study, outcomes = tuned(loss)
    grid = ablate.Grid(study, devices)
    assert grid.go() == 0 and grid.failure is None and grid.outcomes == outcomes


def test_an_unforeseen_error_in_a_worker_is_raised(monkeypatch):
    study, _ = tuned(bowl({"a": 1e-3, "b": 3e-2}))
    monkeypatch.setattr(ablate.Grid, "train", lambda *_: 1 / 0)
    grid = ablate.Grid(study, ["cpu", "cpu"])
    grid.go()
    assert isinstance(grid.failure, ZeroDivisionError)


@pytest.mark.parametrize("name, text", [("summary.json", "{}"), ("summary.json", "[]"), ("metrics.jsonl", "3\n")])
def test_damaged_records_are_named(name, text, grid, monkeypatch):
    shutil.copytree(grid[0], ".", dirs_exist_ok=True)
    cell = "linear-lr0.01-seed1" if name == "summary.json" else "linear-lr1e+30-seed1"
    Path(f"r/{cell}/{name}").write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(cell)}/{name} is damaged"):
        ablate.main(GRID)


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


def write_study(losses, tuning=(), seeds=(1, 2, 3)):
    """Records of runs that never were: losses {(arm, rate, seed): loss} -> Study, outcomes."""
    arms = {arm: {} for arm, _, _ in losses}
    study = Study("c.py", arms, sorted({rate for _, rate, _ in losses}), list(tuning), list(seeds), Path("r"))
    outcomes = {Cell(*key): loss for key, loss in losses.items()}
    settings = {"max_iters": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "dtype": "float32"}
    model = {"block_size": 8, "n_layer": 1, "n_embd": 8, "n_head": 1}
    for number, (cell, loss) in enumerate(outcomes.items()):
        folder = study.run_folder(cell)
        folder.path.mkdir(parents=True)
        about = {"settings": settings, "model": model, "data": {"source": "nowhere"}, "device": "cpu", "commit": None}
        about |= {"versions": {"torch": "2"}, "parameters": {"total": 3, "non_embedding": 2, "query_path": 1}}
        folder.write_json("config.json", about)
        if loss < math.inf:
            folder.write_json("summary.json", {"tokens_per_second": 100 + number, "final_val_loss": loss})
            folder.log({"step": 1, "train_loss": loss + 1})
            folder.log({"step": 2, "train_loss": loss})
    Path("r/study.json").write_text('{"command": "python ablate.py c.py"}')
    return study, outcomes


def test_tuning_seeds_choose_and_the_others_measure():
    found = {("a", 0.1, 1): 2.0, ("a", 0.2, 1): 1.7, ("a", 0.4, 1): math.inf}
    found |= {("b", 0.1, 1): 1.9, ("b", 0.2, 1): 1.6, ("b", 0.4, 1): 1.5, ("b", 0.4, 2): math.inf}
    found |= {("a", 0.2, 2): 1.8, ("a", 0.2, 3): 1.9, ("b", 0.2, 2): 1.8, ("b", 0.2, 3): 1.65}
    found |= {("a", 0.2, 4): 2.2, ("b", 0.2, 4): math.inf}
    a, b = report.summarise(*write_study(found, tuning=[1, 2], seeds=[3, 4]))
    assert a.bracketed and a.best_rate == 0.2 and a.losses == {3: 1.9, 4: 2.2} and (a.diverged, a.runs) == (1, 6)
    assert b.bracketed and b.best_rate == 0.2 and b.losses == {3: 1.65} and (b.diverged, b.runs) == (2, 7)
    assert a.speeds == [100, 101, 107, 108, 111]
    assert report.paired_difference(b.losses, a.losses).mean == pytest.approx(-0.25)
    assert "| b | 1.9000 (1) | **1.7000 (2)** | 1 diverged (2) |" in report.rate_table([a, b])
    assert "| a | 1.9000 | 2.2000 |" in report.seed_table([a, b]) and "| b | 1.6500 |  |" in report.seed_table([a, b])


def test_a_full_grid_chooses_by_the_mean_over_all_seeds():
    rates = {0.1: (1, 3, 2), 0.2: (2, 1.5, 2.2), 0.4: (1, 1)}  # the last is not finished
    found = {("a", rate, seed): loss for rate, row in rates.items() for seed, loss in enumerate(row, 1)}
    (a,) = report.summarise(*write_study(found))
    assert a.best_rate == 0.2 and not a.bracketed and a.losses == {1: 2, 2: 1.5, 3: 2.2}


def test_an_arm_that_diverged_at_every_rate_has_no_loss():
    found = {("a", 0.1, 1): 1.0, ("a", 0.1, 2): 1.0, ("b", 0.1, 1): 0.5, ("b", 0.1, 2): math.inf}
    a, b = report.summarise(*write_study(found, seeds=[1, 2]))
    assert b.best_rate is None and not b.losses and not b.bracketed
    assert report.main_table([a, b]).splitlines()[-1].endswith("| 1 |  |  |  |  | 1.01 | 1 of 2 |")


def test_the_best_rates_are_in_the_picture_whatever_the_others_are():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    (a,) = report.summarise(*write_study({("a", 0.1, 1): 2.2, ("a", 0.2, 1): 2.1, ("a", 0.4, 1): 9.0}, seeds=[1]))
    limits, close = [], pyplot.close
    pyplot.close = lambda figure: (limits.append(figure.axes[0].get_ylim()), close(figure))
    try:
        report.draw_rates(pyplot, [a], Path("rates.svg"))
    finally:
        pyplot.close = close
    assert limits[0][0] < 2.1 and 2.2 < limits[0][1] < 3


def test_pictures_are_drawn_and_the_same_each_time():
    pytest.importorskip("matplotlib")
    losses = {(arm, rate, seed): 2 + 0.1 * seed - rate for arm in "ab" for rate in (0.1, 0.2) for seed in (1, 2, 3)}
    study, outcomes = write_study(losses | {("b", 0.2, 3): math.inf})
    report.write(study, outcomes)
    first = [Path(f"r/{name}.svg").read_bytes() for name in ("rates", "curves")]
    report.write(study, outcomes)
    assert first == [Path(f"r/{name}.svg").read_bytes() for name in ("rates", "curves")]
    assert all(text.startswith(b"<?xml") for text in first) and "![rates](rates.svg)" in Path("r/report.md").read_text()


def test_without_matplotlib_there_is_a_report_and_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(*write_study({("a", 0.1, 1): 2.0}, seeds=[1]))
    assert capsys.readouterr().out.splitlines()[0].endswith("(pip install matplotlib)")
    assert "rates.svg" not in Path("r/report.md").read_text() and not Path("r/rates.svg").exists()
