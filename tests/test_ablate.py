"""study/: a tiny grid for real, the search for rates on losses that are known, and the statistics computed anew."""

import json
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, files, prepare_tiny, start

import train
from model import GPT, GPTConfig
from study import ablate, plan, redundancy
from study.plan import Run, Study
from utils.settings import UserError

GRID = ["tiny.py", "--arm=linear,nonlinear", "--learning_rate=1e-2,1e30", "--seed=1,2", "--devices=cpu,cpu", "--out=r"]
TINY = """
dataset, device, dtype = 'tiny', 'cpu', 'float32'
n_layer, n_head, n_embd, block_size = 1, 2, 16, 16
batch_size, gradient_accumulation_steps, max_iters, warmup_iters = 2, 1, 12, 2
eval_interval, eval_tokens, log_interval = 4, 200, 3
"""


def start_grid(*arguments, **options):
    """study.ablate as a process in the current folder."""
    return start("-m", "study.ablate", *arguments, environment={"PYTHONPATH": str(ROOT)}, **options)


def write_tiny(seed=0):
    """A data set of letters and tiny.py, which trains on it in a second."""
    prepare_tiny("".join(np.random.default_rng(seed).choice(list("abc \n"), 4000)))
    Path("tiny.py").write_text(TINY)


def records(folder="r"):
    """{name of the run: its line in runs.jsonl}"""
    lines = [json.loads(line) for line in (Path(folder) / "runs.jsonl").read_text().splitlines()]
    return {str(Run(line["arm"], line["learning_rate"], line["seed"])): line for line in lines}


def losses():
    return {name: line["summary"]["final_val_loss"] for name, line in records().items() if line["summary"]}


LEFT = {Path("r", name) for name in ("runs.jsonl", "study.json", "report.md", "rates.svg")}


@pytest.fixture(scope="module")
def report():
    return pytest.importorskip("study.report", reason="needs scipy and matplotlib")


@pytest.fixture(scope="module")
def finished(report, tmp_path_factory):
    """A folder in which a grid of two arms, two rates, of which one diverges, and two seeds was run."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny()
    process = start_grid(*GRID, cwd=folder)
    output, errors = process.communicate(timeout=170)
    assert process.returncode == 0 and not errors and len(output.splitlines()) >= 9 and "; 0 to go" in output, output
    return folder


@pytest.fixture
def grid(finished):
    """A copy of it in the current folder."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)


def test_a_grid_is_complete_and_its_report_tells_it(grid):
    assert len(records()) == 8 and files("r").keys() <= LEFT
    for name, line in records().items():
        settings, model = line["config"]["settings"], line["config"]["model"]
        assert name == f"{model['query_mode']}-lr{settings['learning_rate']:g}-seed{settings['seed']}"
        if settings["learning_rate"] == 1e30:
            assert line["summary"] is None
        else:
            assert [step for step, _, _ in line["curve"]] == [1, 3, 6, 9, 12] and line["summary"]["steps"] == 12
            assert all(1 < loss < 2 and norm > 0 for _, loss, norm in line["curve"])
    text = Path("r/report.md").read_text()
    assert f"python -m study.ablate {' '.join(GRID)}\n" in text
    assert "8 runs. Each: 12 steps, 384 tokens of tiny.txt; 1 layers, d 16, 2 heads; float32." in text
    for arm in ("linear", "nonlinear"):  # the best rate is the lowest; at the high one both seeds diverged
        x = np.array([losses()[f"{arm}-lr0.01-seed{seed}"] for seed in (1, 2)])
        words = f" | 0.01, not bracketed | {x.mean():.4f} ± {x.std(ddof=1):.4f} (n = 2) | "
        assert re.search(rf"\| {arm} \|.*{re.escape(words)}.* \| 2 of 4 \|\n", text)
        assert f"| {arm} | **{x.mean():.4f} (2)** | 2 diverged (2) |\n" in text


def test_the_same_command_runs_nothing_again_and_a_dry_run_measures_only(grid, capsys):
    before = files("r")
    assert ablate.main(GRID) == 0 and files("r") == before and "val loss" not in capsys.readouterr().out
    assert ablate.main([*GRID[:3], "--seed=1,2,3", *GRID[4:], "--dry-run"]) == 0 and files("r") == before
    lines = capsys.readouterr().out.splitlines()
    assert sum("to run" in line for line in lines) == 4 and sum("diverged" in line for line in lines) == 4
    # d = 16, r = 8: 2 * 16 * 8 weights and two gains of 16 against 16 * 16 weights
    assert all(f"{256 if line.startswith('linear') else 288:11,}" in line for line in lines[1:13])
    assert re.fullmatch(r"4 to go, \d+:\d\d, \d+:\d\d each, 2 at a time", lines[-1])


def test_what_the_report_needs_is_asked_for_before_the_first_run(monkeypatch):
    write_tiny()
    monkeypatch.delattr("study.report", raising=False)
    monkeypatch.setitem(sys.modules, "study.report", None)
    with pytest.raises(UserError, match="pip install scipy matplotlib"):
        ablate.main(GRID)
    assert not Path("r").exists()


CHANGES = ["max_iters was 12, now is 13", "weight_decay was 0.1, now is 0.5", "mlp_hidden was 64, now is 99"]


@pytest.mark.parametrize("change", [*CHANGES, "eval_tokens was 200, now is 300", "data set was"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_runs_of_other_settings_or_data_are_refused(change, dry, grid):
    before, (key, *_, value) = files("r"), change.split()
    if key == "data":
        shutil.rmtree("data")
        write_tiny(seed=1)
    else:
        Path("tiny.py").write_text(f"{TINY}{key} = {value}\n")
    with pytest.raises(UserError, match=change):
        ablate.main([*GRID, *dry])
    assert files("r") == before


def train_run(arm, seed, *flags, folder="r"):
    """A run of the grid by hand -> its folder."""
    out_dir = Path(folder, f"{arm}-lr0.01-seed{seed}")
    flags = [f"--query_mode={arm}", f"--seed={seed}", "--learning_rate=1e-2", f"--out_dir={out_dir}", *flags]
    train.main(["tiny.py", *flags])
    return out_dir


def test_a_run_under_way_with_other_settings_is_refused(grid):
    train_run("linear", 1, "--max_iters=8", folder="new")
    with pytest.raises(UserError, match="new/linear-lr0.01-seed1: .*max_iters was 8, now is 12; choose another --out"):
        ablate.main([*GRID[:-1], "--out=new"])


@pytest.mark.parametrize("text", ["[]", "3", '{"arm": "linear"', '{"arm": "a", "learning_rate": 1, "seed": 1}'])
def test_a_damaged_line_is_named(text, grid):
    with open("r/runs.jsonl", "a") as f:
        f.write(text + "\n")
    with pytest.raises(UserError, match="line 9 of r/runs.jsonl is damaged"):
        ablate.main(GRID)


def leave_only(*names):
    """As if the other runs had never been."""
    lines = [json.dumps(line) + "\n" for name, line in records().items() if name in names]
    Path("r/runs.jsonl").write_text("".join(lines))


@pytest.mark.slow
def test_a_grid_that_was_killed_anywhere_ends_as_if_it_had_not_been(grid):
    undisturbed = losses()
    leave_only("linear-lr0.01-seed1", "linear-lr1e+30-seed1", "linear-lr1e+30-seed2", "nonlinear-lr1e+30-seed2")
    train_run("linear", 1)  # killed after its record was written and before its folder was deleted
    train_run("linear", 2)  # killed before its record was written
    middle = train_run("nonlinear", 1, "--max_iters=8", "--lr_decay_iters=12")  # killed at step 8
    config = (middle / "config.json").read_text().replace('"max_iters": 8', '"max_iters": 12')
    (middle / "config.json").write_text(config)
    (middle / "summary.json").unlink()
    early = Path("r/nonlinear-lr0.01-seed2")  # killed before the first checkpoint
    early.mkdir()
    (early / "config.json").write_text(config.replace('"seed": 1', '"seed": 2'))
    Path("r/.runs.jsonl.tmp").write_text("{")  # killed while it wrote a record
    process = start_grid(*GRID)
    output, errors = process.communicate(timeout=170)
    assert process.returncode == 0 and output.count("val loss") == 3, output + errors
    assert losses() == pytest.approx(undisturbed, rel=1e-6) and len(records()) == 8  # threads change the rounding
    assert files("r").keys() <= LEFT
    assert records()["nonlinear-lr0.01-seed1"]["config"]["resumed"][0]["at_step"] == 8


def test_a_run_that_fails_stops_the_grid_with_its_last_words(grid):
    leave_only("linear-lr1e+30-seed1")
    for seed in (1, 2):
        folder = train_run("linear", seed)
        (folder / "summary.json").unlink()
        (folder / "ckpt.pt").write_bytes(b"garbage")
    process = start_grid(*GRID)
    (line,) = process.communicate(timeout=170)[1].splitlines()
    assert re.match(r"ablate.py: (linear-lr0.01-seed[12]): .*r/\1/ckpt.pt cannot be read.* \(r/\1/log.txt tells", line)
    assert process.returncode == 1 and "cannot be read" in Path("r/linear-lr0.01-seed1/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_goes_on_where_it_was(number):
    write_tiny()
    longer = ["--max_iters=400", "--lr_decay_iters=400", "--eval_interval=50"]
    process, second = start_grid(*GRID, *longer), Path("r/linear-lr0.01-seed2/ckpt.pt")  # seed 1 beside it
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    before = records() if Path("r/runs.jsonl").exists() else {}
    again = start_grid(*GRID, *longer)
    again.communicate(timeout=170)
    assert again.returncode == 0 and len(before) < 4 and len(records()) == 8 and len(losses()) == 4
    assert files("r").keys() <= LEFT and all(records()[name] == before[name] for name in before)
    assert records()["linear-lr0.01-seed2"]["config"]["resumed"][0]["at_step"] >= 50
    whole = json.loads((train_run("linear", 2, *longer, folder="whole") / "summary.json").read_text())
    assert losses()["linear-lr0.01-seed2"] == pytest.approx(whole["final_val_loss"], rel=1e-6)


# --tune, on a loss that is known.


def record(loss):
    return {"config": {}, "curve": [], "summary": {"final_val_loss": loss} if math.isfinite(loss) else None}


def empty_study(arms, rates, tuning, seeds, devices=("cpu",)):
    return Study("c.py", {arm: {} for arm in arms}, list(rates), list(tuning), list(seeds), Path("r"), list(devices))


def tuned(loss, first=(4e-3, 8e-3), tuning=(1, 2), seeds=(3, 4), arms="ab"):
    """Run the search where the loss of a run is known -> Study."""
    study = empty_study(arms, first, tuning, seeds)
    while todo := [run for run in study.runs() if run not in study.records]:
        assert study.to_go() >= len(todo)
        study.records[todo[0]] = record(loss(todo[0]))
    assert study.to_go() == 0 and set(study.runs()) == set(study.records)
    return study


def bowl(**best):
    """Loss 1 + log2(rate / best of the arm)^2, diverging above 8 times the best."""

    def loss(run):
        off = math.log2(run.learning_rate / best[run.arm])
        return 1 + off**2 + 0.01 * run.seed if off <= 3 else math.inf

    return loss


def seeds_by_rate(study, arm):
    found = {}
    for run in sorted(study.records):
        if run.arm == arm:
            found.setdefault(run.learning_rate, []).append(run.seed)
    return found


def test_tuning_brackets_each_arm_and_measures_at_its_best():
    study = tuned(bowl(a=1e-3, b=3e-2))
    assert seeds_by_rate(study, "a") == {5e-4: [1], 1e-3: [1, 2, 3, 4], 2e-3: [1], 4e-3: [1], 8e-3: [1]}
    assert seeds_by_rate(study, "b") == {4e-3: [1], 8e-3: [1], 1.6e-2: [1], 3.2e-2: [1, 2, 3, 4], 6.4e-2: [1]}
    study = tuned(bowl(a=1e-4, b=1e-3), first=(8e-3, 1.6e-2))  # at which all diverge
    assert seeds_by_rate(study, "a")[1.25e-4] == [1, 2, 3, 4]
    study = tuned(lambda run: -run.learning_rate, first=[1.0], tuning=[1], seeds=[2], arms="a")  # never turns
    assert len(study.records) == plan.MOST_RATES + 1


def test_a_rate_that_was_lucky_is_overtaken_and_one_that_was_tried_is_not_forgotten():
    """The best with the first seed fails with the second; the next best gets a lower neighbour, and the seeds."""
    study = tuned(lambda run: 9.0 if run[1:] == (8e-3, 2) else bowl(a=7e-3)(run), arms="a")
    assert seeds_by_rate(study, "a") == {2e-3: [1], 4e-3: [1, 2, 3, 4], 8e-3: [1, 2], 1.6e-2: [1]}
    # 8e-3 fails with the second seed; 1.6e-2, tried as its neighbour, is then better than 4e-3.
    known = {(4e-3, 1): 1.60, (8e-3, 1): 1.56, (8e-3, 2): 9.0, (1.6e-2, 1): 1.57, (1.6e-2, 2): 1.58}
    study = tuned(lambda run: known.get(run[1:], 1.59 + run.learning_rate), arms="a")
    assert seeds_by_rate(study, "a")[1.6e-2] == [1, 2, 3, 4]


def test_finished_runs_are_found_again_and_those_of_others_are_not():
    study, others = tuned(bowl(a=1e-3, b=3e-2)), [Run("a", 4e-3, 9), Run("c", 4e-3, 1)]
    study.folder.mkdir()
    again, expected = empty_study("ab", [4e-3, 8e-3], [1, 2], [3, 4]), dict(study.records)
    for run in [*others, *sorted(expected, reverse=True)]:
        study.add(run, expected.get(run, record(0.5)))
    again.read()
    assert again.records == expected


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu", "cpu"]])
def test_a_device_waits_for_what_only_others_can_tell(devices, monkeypatch):
    """The whole of a tuned grid, where a run takes no time."""
    study, loss = empty_study("ab", [4e-3, 8e-3], [1, 2], [3, 4], devices), bowl(a=1e-3, b=3e-2)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(plan, "start", lambda *_: SimpleNamespace(poll=lambda: 0, returncode=0))
    monkeypatch.setattr(plan, "end", lambda study, run, _: study.records.update({run: record(loss(run))}))
    assert plan.go(study) == 0 and study.records == tuned(loss).records


# The statistics and the report.


def test_the_paired_difference_by_hand(report):
    # pairs of seeds 1, 3 and 4: differences -0.01, -0.02, -0.03; mean -0.02 of 2.1, deviation 0.01, and half the
    # interval is 4.3027 * 0.01 / sqrt(3) = 0.024841
    found = report.differences({1: 1.99, 3: 2.08, 4: 2.17, 5: 9.0}, {1: 2.0, 2: 9.0, 3: 2.1, 4: 2.2})
    assert found == ["-0.95 % [-2.14, +0.23]", "-1.98 % [-4.39, +0.49]"]
    assert report.differences({1: 2.0}, {1: 2.1}) == ["-4.76 %", "-9.52 %"]
    assert report.differences({1: 2.0}, {2: 2.1}) == ["", ""]


def invented(losses, tuning=(), seeds=(1, 2, 3)):
    """Runs that never were: {(arm, rate, seed): loss} -> Study."""
    study = empty_study((arm for arm, _, _ in losses), sorted({rate for _, rate, _ in losses}), tuning, seeds)
    settings = {"max_iters": 2, "batch_size": 1, "gradient_accumulation_steps": 1, "dtype": "float32"}
    config = {"settings": settings, "model": {"block_size": 8, "n_layer": 1, "n_embd": 8, "n_head": 1}}
    config |= {"data": {"source": "nowhere"}, "versions": {"torch": "2"}, "device": "cpu", "commit": None}
    config["parameters"] = {"total": 3, "non_embedding": 2, "query_path": 1}
    for number, (key, loss) in enumerate(losses.items()):
        study.records[Run(*key)] = {**record(loss), "config": config, "curve": [[1, loss + 1, 1.0], [2, loss, 1.0]]}
        if loss < math.inf:
            study.records[Run(*key)]["summary"]["tokens_per_second"] = 100 + number
    return study


def test_tuning_seeds_choose_and_the_others_measure(report):
    found = {("a", 0.1, 1): 2.0, ("a", 0.2, 1): 1.7, ("a", 0.4, 1): math.inf}
    found |= {("b", 0.1, 1): 1.9, ("b", 0.2, 1): 1.6, ("b", 0.4, 1): 1.5, ("b", 0.4, 2): math.inf}
    found |= {("a", 0.2, 2): 1.8, ("a", 0.2, 3): 1.9, ("b", 0.2, 2): 1.8, ("b", 0.2, 3): 1.65}
    found |= {("a", 0.2, 4): 2.2, ("b", 0.2, 4): math.inf}
    study = invented(found, tuning=[1, 2], seeds=[3, 4])
    a, b = report.main_table(study).splitlines()[2:]  # speeds of a: 100, 101, 107, 108, 111; b: 103, 104, 105, 109, 110
    assert a == "| a | 3 | 2 | 1 | 0.2 | 2.0500 ± 0.2121 (n = 2) |  |  | 1.00 | 1 of 6 |"
    assert b == "| b | 3 | 2 | 1 | 0.2 | 1.6500 (n = 1) | -13.16 % | -22.12 % | 0.98 | 2 of 7 |"
    assert "| b | 1.9000 (1) | **1.7000 (2)** | 1 diverged (2) |" in report.rate_table(study)
    assert "| a | 1.9000 | 2.2000 |\n| b | 1.6500 |  |" in report.seed_table(study)


def test_a_full_grid_chooses_by_the_mean_over_all_seeds(report):
    rates = {0.1: (1, 3, 2), 0.2: (2, 1.5, 2.2), 0.4: (1, 1)}  # the last is not finished
    found = {("a", rate, seed): loss for rate, row in rates.items() for seed, loss in enumerate(row, 1)}
    study = invented(found | {("b", 0.1, 1): 0.5, ("b", 0.1, 2): math.inf, ("b", 0.1, 3): 0.5})
    assert study.best_rate("a") == 0.2 and study.final_losses("a") == {1: 2, 2: 1.5, 3: 2.2}
    a, b = report.main_table(study).splitlines()[2:]
    assert "| 0.2, not bracketed |" in a and b.endswith("| 1 |  |  |  |  | 1.05 | 1 of 3 |")  # b has no good rate


def test_the_picture_shows_the_best_rates_and_is_the_same_each_time(report):
    found = {(arm, rate, seed): 2 + 0.1 * seed - rate for arm in "ab" for rate in (0.1, 0.2) for seed in (1, 2, 3)}
    study = invented(found | {("b", 0.2, 3): math.inf, ("b", 0.4, 1): 9.0, ("b", 0.4, 2): 9.0, ("b", 0.4, 3): 9.0})
    study.folder.mkdir()
    report.write(study, "command")
    first = files("r")
    low, high = report.draw(study).axes[0].get_ylim()
    assert files("r") == first and first[Path("r/rates.svg")].startswith(b"<?xml")
    assert low < 2 and 2.1 < high < 3  # the means at the best rates are 2.0 and 2.1, at the worst 9


# What is published.

PUBLISHED = ROOT / "study" / "results" / "stdlib_cpu"


def test_the_published_tables_are_those_of_the_records(report):
    told = json.loads((PUBLISHED / "study.json").read_text())
    del told["command"]
    study = Study(**told, folder=PUBLISHED, devices=["cpu"])
    study.read()
    assert len(study.records) == 50 and study.to_go() == 0
    for text in ((PUBLISHED / "report.md").read_text("utf-8"), (ROOT / "study/README.md").read_text("utf-8")):
        assert all(make(study) in text for make in (report.main_table, report.rate_table, report.seed_table))


def test_every_number_of_the_published_main_table_computed_anew():
    """From nothing but the lines of runs.jsonl, with numpy and scipy."""
    stats, measured, speeds = pytest.importorskip("scipy.stats"), {}, {}
    told, text = json.loads((PUBLISHED / "study.json").read_text()), (PUBLISHED / "report.md").read_text("utf-8")
    for arm in told["arms"]:
        lines = [line for line in records(PUBLISHED).values() if line["arm"] == arm]
        loss = {(line["learning_rate"], line["seed"]): line["summary"]["final_val_loss"] for line in lines}
        rates = sorted({rate for rate, _ in loss})
        means = [np.mean([loss[rate, seed] for seed in told["tuning_seeds"] if (rate, seed) in loss]) for rate in rates]
        best = rates[np.argmin(means)]
        x = measured[arm] = np.array([loss[best, seed] for seed in told["seeds"]])
        speeds[arm] = np.median([line["summary"]["tokens_per_second"] for line in lines])
        row = [arm, *(f"{count:,}" for count in lines[0]["config"]["parameters"].values()), f"{best:g}"]
        row += [f"{x.mean():.4f} ± {x.std(ddof=1):.4f} (n = {len(x)})", "", ""]
        if arm != "linear":
            base = measured["linear"]
            three = np.array([(x - base).mean(), *stats.ttest_rel(x, base).confidence_interval(0.95)])
            percent = 100 * three / base.mean(), 100 * np.expm1(three)
            row[-2:] = ["{:+.2f} % [{:+.2f}, {:+.2f}]".format(*values) for values in percent]
        assert rates[0] < best < rates[-1]
        assert f"\n| {' | '.join(row)} | {speeds[arm] / speeds['linear']:.2f} | 0 of {len(lines)} |\n" in text


# Why a linear query is redundant.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "skips, norms, shared, exact",
    [
        (False, False, False, True),
        (True, False, True, True),
        (True, False, False, False),  # through all layers runs one basis, and the first layer's is not the others'
        (True, True, True, False),  # no change of basis passes through a LayerNorm
    ],
)
@torch.no_grad()
def test_a_linear_query_can_be_absorbed_exactly(skips, norms, shared, exact, causal):
    """Without skips always, with skips where the layers share one W_Q, with LayerNorms not."""
    config = dict(block_size=12, vocab_size=20, n_layer=3, n_head=2, n_embd=16, tie_weights=False, causal=causal)
    linear, identity = (GPT(GPTConfig(query_mode=mode, **config)).double() for mode in ("linear", "identity"))
    generator = torch.Generator().manual_seed(3)
    for p in linear.parameters():
        torch.nn.init.normal_(p, std=1.5 * p.size(-1) ** -0.5, generator=generator)
    for block in linear.blocks:
        block.attn.query = linear.blocks[0].attn.query if shared else block.attn.query
    idx = torch.randint(20, (4, 12), generator=generator)
    logits = lambda model: redundancy.logits(model, idx, skips, norms)  # noqa: E731
    off = lambda: ((logits(linear) - logits(identity)).abs().max() / logits(linear).abs().max()).item()  # noqa: E731
    assert not norms or torch.equal(logits(linear), linear(idx)[0])
    left_over = identity.load_state_dict(linear.state_dict(), strict=False).unexpected_keys
    assert left_over == [f"blocks.{n}.attn.query.w_q.weight" for n in range(3)]
    assert off() > 1e-2  # W_Q does something
    redundancy.absorb(linear, identity)
    assert off() < 1e-10 if exact else off() > 1e-2


def test_the_redundancy_in_numbers(capsys):
    redundancy.main()
    assert [": exact, " in line for line in capsys.readouterr().out.splitlines()] == [True, True, False]


def test_the_pilot_in_the_readme_is_that_of_its_records():
    """Each row of the table, from the runs with its settings; and no run that stayed at what bigrams reach."""
    text = (ROOT / "study/README.md").read_text("utf-8")
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| (?:500|1,500) \|.*", text, re.M)]
    told = {}
    for steps, arm, rate, warmup, beta2, clip, losses in rows:
        clip = 0.0 if clip == "none" else float(clip)
        for seed, loss in enumerate(losses.split(", "), 1):
            if loss != "-":
                key = (int(steps.replace(",", "")), arm, float(rate), int(warmup), float(beta2), clip, seed)
                told[key] = float(loss)
    found = {}
    for line in (ROOT / "study/results/pilot/runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        settings = run["config"]["settings"]
        key = (settings["max_iters"], run["arm"], *(settings[k] for k in ("learning_rate", "warmup_iters", "beta2")))
        found[(*key, settings["grad_clip"], run["seed"])] = round(run["summary"]["final_val_loss"], 4)
        assert min(loss for _, loss, _ in run["curve"]) < 2.2
    assert told == found
