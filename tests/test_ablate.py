"""study/: a tiny study, its report, and the published one, whose numbers are recomputed."""

import json
import math
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, files, parameter_report, prepare_tiny, run, start

import train
from model import QUERIES, GPTConfig
from utils.checkpoint import RunFolder
from utils.settings import UserError, read_command

pytest.importorskip("scipy", reason="a study needs scipy")
pytest.importorskip("matplotlib", reason="a study needs matplotlib")

from study import ablate, report, runs  # noqa: E402
from study.plan import Run  # noqa: E402
from study.queries import CANDIDATES  # noqa: E402

# Four arms with two seeds at one rate; two of the arms diverge.
GRID = ["tiny.py", "--query_mode=linear,nonlinear", "--weight_decay=0.1,1e30"]
GRID += ["--learning_rate=1e-2", "--tune=", "--seed=1,2", "--devices=cpu,cpu", "--out=r"]
LINEAR = "query_mode=linear+weight_decay=0.1"
NONLINEAR = "query_mode=nonlinear+weight_decay=0.1"
TINY = """
dataset, device, dtype = 'tiny', 'cpu', 'float32'
n_layer, n_head, n_embd, block_size = 1, 2, 16, 16
batch_size, gradient_accumulation_steps, max_iters, warmup_iters = 2, 1, 12, 2
eval_interval, eval_tokens, log_interval = 4, 200, 3
"""
NAMES = ("runs.jsonl", "study.json", "ngrams.json", "report.md", "rates.svg", "arms.svg", ".lock")
LEFT = {Path("r", name) for name in NAMES}


def write_tiny(seed=0):
    """A data set of letters, and tiny.py, which trains on it in a second."""
    letters = np.random.default_rng(seed).choice(list("abcdefghijklmnopqrs \n"), 4000)
    prepare_tiny("".join(letters))
    Path("tiny.py").write_text(TINY)


def records(folder="r"):
    """{name of the run: its line in runs.jsonl}"""
    lines = (Path(folder) / "runs.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return {str(Run(line["arm"], line["learning_rate"], line["seed"])): line for line in lines}


def losses():
    lines = records().items()
    return {name: line["summary"]["final_val_loss"] for name, line in lines if line["summary"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which GRID was run."""
    folder = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_tiny()
    done = run("-m", "study.ablate", *GRID, cwd=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) >= 9 and "; 0 to go" in done.stdout
    return folder


@pytest.fixture
def grid(finished):
    """A copy of it in the current folder."""
    shutil.copytree(finished, ".", dirs_exist_ok=True)


def test_a_grid_is_complete_and_so_is_its_report(grid):
    assert len(records()) == 8 and files("r").keys() <= LEFT
    commands = {line["config"]["command"].split(" --")[0] for line in records().values()}
    assert commands == {f"python -m study.queries {GRID[0]}"}  # train.py lacks some queries
    for name, line in records().items():
        settings, model = line["config"]["settings"], line["config"]["model"]
        decay = "1e30" if settings["weight_decay"] == 1e30 else "0.1"
        arm = f"query_mode={model['query_mode']}+weight_decay={decay}"
        assert name == f"{arm}-lr0.01-seed{settings['seed']}"
        if decay == "1e30":
            assert line["summary"] is None
        else:
            assert line["summary"]["steps"] == 12
            assert [step for step, _, _ in line["curve"]] == [1, 3, 6, 9, 12]
            assert all(2 < loss < 4 and norm > 0 for _, loss, norm in line["curve"])
    text = Path("r/report.md").read_text()
    assert f"python -m study.ablate {' '.join(GRID)}\n" in text
    assert "8 runs of tiny.py, 0 to go." in text
    for arm in (LINEAR, NONLINEAR):
        x = np.array([losses()[f"{arm}-lr0.01-seed{seed}"] for seed in (1, 2)])
        row = f"\n| {arm} | 0.01 | {x.mean():.4f} ± {x.std(ddof=1):.4f} (2) | 0 of 2 |"
        assert row in text
    assert text.count(" |  | 2 of 2 | ") == 2
    assert text.count(" |  | no verdict: a failed run") == 2


def test_a_study_of_encoders_and_one_whose_arms_see_different_tokens(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_tiny()
    more = ["--tune=", "--seed=1"]
    masked = ["--arm=identity", "--objective=masked", "--mask_share=0.9"]
    assert ablate.main(["tiny.py", *masked, *more, "--out=r"]) == 0
    (loss,) = losses().values()
    assert f"| identity | 0.0006 | {loss:.4f} (1) |" in Path("r/report.md").read_text()
    study = runs.load(Path("r"))
    assert study.ngrams[1] == pytest.approx(math.log(21), abs=0.1)  # letters at random, of 21
    study.arms["decoder"] = {"query_mode": "identity", "objective": "next"}
    runs.count_ngrams(study)
    assert study.ngrams == runs.load(Path("r")).ngrams == {}


def test_the_same_command_runs_nothing_again_and_a_dry_run_writes_nothing(grid, capsys):
    before = files("r")
    assert ablate.main(GRID) == 0 and files("r") == before
    assert "val loss" not in capsys.readouterr().out
    with pytest.raises(UserError, match="seeds was"):  # as without --dry-run
        ablate.main([*GRID, "--seed=1,2,3", "--dry-run"])
    more = [GRID[0], f"{GRID[1]},identity", *GRID[2:], "--dry-run"]
    assert ablate.main(more) == 0 and files("r") == before
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" to run") for line in lines) == 4
    assert sum(line.endswith(" inf diverged") for line in lines) == 4 and len(lines) == 13
    assert lines[12] == "at least 4 to go"


def test_a_plan_is_read_from_a_file_and_stands_once_it_is_measured(grid):
    lines = f"{' '.join(GRID[:-1])}  # a comment\n\n# another\n--out=r\n"
    Path("plan.txt").write_text(lines)
    assert ablate.main(["@plan.txt"]) == 0
    compare = f"--compare={NONLINEAR}:{LINEAR}"
    fewer = "--query_mode=nonlinear,linear"
    for change in (compare, fewer, "--seed=1", "--seed=3,4", "--learning_rate=2e-2", "--tune=3"):
        with pytest.raises(UserError, match="a plan stands once measuring runs are known"):
            ablate.main(["@plan.txt", change])


def test_arms_and_comparisons_can_be_added_at_the_end(grid):
    study = runs.load(Path("r"))
    study.arms["new"] = {"query_mode": "identity"}
    study.comparisons.append(["new", LINEAR])
    assert {run.arm for run in study.runs() if run not in study.records} == {"new"}
    runs.read(study)
    report.write(study, "command")
    assert f"| {NONLINEAR} against {LINEAR} | " in Path("r/report.md").read_text()
    assert f"| new against {LINEAR} | " not in Path("r/report.md").read_text()
    study.arms = {"new": study.arms.pop("new"), **study.arms}  # not at the end
    with pytest.raises(UserError, match="arms was"):
        runs.read(study)


def test_the_arms_by_name_follow_the_width():
    write_tiny()
    grid = ["tiny.py", "--arm=linear,identity_mlp", "--n_embd=24,36", "--n_head=3"]
    study, _ = ablate.read_options([*grid, "--qk_norm=true"])
    names = [f"{arm}+n_embd={d}" for d in (24, 36) for arm in ("linear", "identity_mlp")]
    assert list(study.arms) == names
    settings, config, _ = runs.settings_of(study, Run(names[-1], 6e-4, 3), "cpu")
    assert (config.n_embd, config.n_head, config.qk_norm, settings.seed) == (36, 3, True, 3)
    assert config.mlp_hidden == 4.5 * 36 and config.query_mode == "identity"


CHANGES = ["max_iters was 12, now is 13", "mlp_hidden was 64, now is 99", "data set was"]


@pytest.mark.parametrize("change", CHANGES)
def test_runs_of_other_settings_or_data_are_refused(change, grid):
    before, (key, *_, value) = files("r"), change.split()
    if key == "data":
        shutil.rmtree("data")
        write_tiny(seed=1)
    else:
        Path("tiny.py").write_text(f"{TINY}{key} = {value}\n")
    with pytest.raises(UserError, match=change):
        ablate.main(GRID)
    assert files("r") == before


def train_run(arm, seed, *flags, folder="r"):
    """Train a run of the grid by hand -> its folder."""
    out_dir = Path(folder, f"{arm}-lr0.01-seed{seed}")
    settings = [f"--{setting}" for setting in arm.split("+")]
    own = [f"--seed={seed}", "--learning_rate=1e-2", f"--out_dir={out_dir}"]
    train.main(["tiny.py", *settings, *own, *flags])
    return out_dir


def leave_only(*names):
    """Remove the records of all other runs."""
    lines = [json.dumps(line) + "\n" for name, line in records().items() if name in names]
    Path("r/runs.jsonl").write_text("".join(lines))


@pytest.mark.slow
def test_a_run_that_fails_stops_the_grid_and_its_last_line_is_shown(grid):
    leave_only("query_mode=linear+weight_decay=1e30-lr0.01-seed1")
    for seed in (1, 2):
        folder = train_run(LINEAR, seed)
        (folder / "ckpt.pt").write_bytes(b"garbage")
    done = run("-m", "study.ablate", *GRID)
    (line,) = done.stderr.splitlines()
    name = rf"({re.escape(LINEAR)}-lr0.01-seed[12])"
    assert re.match(rf"ablate.py: {name}: exit status 1; its output is in r/\1/log.txt", line)
    assert done.returncode == 1
    assert "is damaged" in Path(f"r/{LINEAR}-lr0.01-seed1/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_continues_where_it_was(number):
    write_tiny()
    longer = ["--max_iters=400", "--lr_decay_iters=400", "--eval_interval=50"]
    second = Path(f"r/{LINEAR}-lr0.01-seed2/ckpt.pt")  # while seed 1 trains beside it
    process = start("-m", "study.ablate", *GRID, *longer)
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 128 + 15}[number]
    before = records() if Path("r/runs.jsonl").exists() else {}
    again = run("-m", "study.ablate", *GRID, *longer)
    assert again.returncode == 0 and len(before) < 8
    assert len(records()) == 8 and len(losses()) == 4 and files("r").keys() <= LEFT
    assert all(records()[name] == before[name] for name in before)
    resumed = records()[f"{LINEAR}-lr0.01-seed2"]["config"]["resumed"]
    assert resumed[0]["at_step"] >= 50
    whole = RunFolder(train_run(LINEAR, 2, *longer, folder="whole")).metrics()
    loss = losses()[f"{LINEAR}-lr0.01-seed2"]
    assert loss == pytest.approx(whole[-1]["val_loss"], rel=1e-6)


# The published study.

FINAL = ROOT / "study/results/queries_final_cpu"
STUDY_README = (ROOT / "study/README.md").read_text("utf-8")
TEXT = " ".join(STUDY_README.split())


def test_the_published_report_and_its_pictures_show_every_run(tmp_path):
    study, command = runs.load(FINAL), json.loads((FINAL / "study.json").read_text())["command"]
    study.folder = tmp_path / FINAL.name
    study.folder.mkdir()
    report.write(study, command)
    assert (study.folder / "report.md").read_bytes() == (FINAL / "report.md").read_bytes()
    final = [line["summary"]["final_val_loss"] for line in records(FINAL).values()]
    drawn = [line.get_ydata() for line in report.draw_rates(study).axes[0].lines]
    drawn = [y for of_arm in drawn if len(of_arm) > 2 for y in of_arm]
    assert len(final) == 130 and study.to_go() == 0 and sorted(drawn) == sorted(final)
    # The losses and intervals are checked against the records below.
    base = study.losses("linear")
    rows = study.compare([(arm, "linear") for arm in study.arms if arm != "linear"])
    rows.sort(key=lambda row: -row.mean)
    axes = report.draw_arms(study).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.arm for row in rows]
    marks = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 8]
    bars = [bar.get_segments()[0][:, 0] for bar in axes.collections]
    for row, of_seeds, bar in zip(rows, marks, bars, strict=True):
        assert bar == pytest.approx([row.low, row.high])
        assert of_seeds == pytest.approx(100 * (study.losses(row.arm) - base) / base.mean())


def test_every_number_of_the_published_report_is_recomputed():
    """From nothing but the lines of runs.jsonl, with scipy's paired t test."""
    ttest = pytest.importorskip("scipy.stats").ttest_rel
    saved = json.loads((FINAL / "study.json").read_text())
    counts = json.loads((FINAL / "ngrams.json").read_text())
    lines, rows, x = records(FINAL).values(), [], {}
    for line in lines:
        # No run failed.
        assert np.mean([loss for _, loss, _ in line["curve"][-15:]]) < counts["3"]
        assert line["summary"]["final_val_loss"] < counts["3"]
        settings = line["config"]["settings"]
        assert settings["max_iters"] == line["summary"]["steps"] and settings["grad_clip"] == 1
        if line["seed"] in saved["seeds"]:
            x.setdefault(line["arm"], {})[line["seed"]] = line
    assert all(sorted(of_arm) == saved["seeds"] for of_arm in x.values())
    loss = {}
    for arm, of_arm in x.items():
        loss[arm] = np.array([of_arm[s]["summary"]["final_val_loss"] for s in saved["seeds"]])
    for arm, other in saved["comparisons"]:
        interval = ttest(loss[arm], loss[other]).confidence_interval(0.95)
        low, high = 100 * np.array(interval) / loss[other].mean()
        mean = 100 * (loss[arm].mean() / loss[other].mean() - 1)
        verdict = "lower" if high < 0 else "higher" if low > 0 else "not distinguishable"
        difference = f"{mean:+.2f} % [{low:+.2f}, {high:+.2f}]"
        rows.append(f"| {arm} against {other} | {difference} | {verdict} |")
    for arm in saved["arms"]:
        (rate,) = {line["learning_rate"] for line in x[arm].values()}
        cells = [arm, f"{rate:g}", f"{loss[arm].mean():.4f} ± {loss[arm].std(ddof=1):.4f} (8)"]
        cells += [f"0 of {sum(line['arm'] == arm for line in lines)}"]
        parameters = x[arm][13]["config"]["parameters"]
        cells += [f"{parameters[key]:,}" for key in ("non_embedding", "query_path")]
        rows.append(f"| {' | '.join(cells)} |")
    text = (FINAL / "report.md").read_text("utf-8")
    in_text = [row for row in text.splitlines() if row.startswith("| ")]
    assert [row for row in in_text if row[:5] not in ("| com", "| arm", "| ---")] == rows
    reach = ", ".join(f"{n}-grams {counts[str(n)]:.4f}" for n in range(2, 6))
    assert f"Counting the same tokens reaches: {reach} (" in text
    assert len({line["config"]["device"] for line in lines if line["seed"] >= 13}) == 1


# The text on it.


def test_what_is_recommended_follows_by_the_rule_of_the_plan():
    study = runs.load(FINAL)
    rows = {(row.arm, row.other): row for row in study.compare(study.comparisons)}
    controls = {"nonlinear_per_head": "linear_qk_gain", "nonlinear_value": "linear_matched_value"}

    def lower(arm, other):
        return rows[arm, other].verdict == "lower"

    arms = [a for a, own in controls.items() if lower(a, "linear_matched") and lower(a, own)]
    best = min(arms, key=lambda arm: rows[arm, "linear_matched"].mean, default=None)
    words = f"**`{best}` is recommended" if best else "**No query is recommended.**"
    if best:
        words += ", and its loss is lower than" if lower(best, "nonlinear") else ", but not over"
    assert f"{words} that of the paper's query.**" in TEXT
    # Only if f does something is the query model.py's, too.
    ascribed = lower("nonlinear_per_head", "linear_per_head")
    assert ("nonlinear_per_head" in (ROOT / "model.py").read_text("utf-8")) == ascribed
    assert ("**No gain is ascribed to f.**" in TEXT) != ascribed


def test_the_numbers_in_the_text_are_those_of_the_records():
    """All but those of older studies, which it attributes to the commit of their records."""
    table = report.comparison_table(runs.load(FINAL))
    assert table in STUDY_README and len(TEXT.split()) <= 2000
    known, newest = STUDY_README.split("## How a comparison works")
    newest, lessons = newest.split("## Three lessons")
    assert "at commit 5550578" in " ".join(known.split()) and "5550578" not in newest + lessons
    pattern = r"[+-]\d+\.\d\d % \[.*?\]"
    assert set(re.findall(pattern, " ".join(newest.split()))) == set(re.findall(pattern, table))
    assert not re.findall(pattern, lessons)
    rows = re.findall(r"^\| (\w+) \| .+ \| ([\d,]+) \|$", newest, re.M)
    assert {arm for arm, _ in rows} == {*QUERIES, *CANDIDATES}
    _, config = read_command([f"{ROOT}/config/ablation_cpu.py"], train.Settings, GPTConfig)
    for arm, parameters in rows:
        sizes = parameter_report(replace(config, query_mode=arm, vocab_size=257))
        assert f"{sizes['non_embedding']:,}" == parameters, arm
