"""study/: a tiny study for real, its report and the published one, computed anew; the redundancy of a linear query."""

import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, files, prepare_tiny, run, start

import train
from utils.checkpoint import RunFolder
from utils.settings import UserError

pytest.importorskip("scipy", reason="a study needs scipy")
pytest.importorskip("matplotlib", reason="a study needs matplotlib")

from study import ablate, ladder, report, runs  # noqa: E402
from study.plan import Run, Study  # noqa: E402

# Four arms, of which two diverge, with two seeds at one rate.
GRID = ["tiny.py", "--query_mode=linear,nonlinear", "--weight_decay=0.1,1e30", "--learning_rate=1e-2", "--tune="]
GRID += ["--seed=1,2", "--devices=cpu,cpu", "--out=r"]
LINEAR, NONLINEAR = (f"query_mode={mode}+weight_decay=0.1" for mode in ("linear", "nonlinear"))
TINY = """
dataset, device, dtype = 'tiny', 'cpu', 'float32'
n_layer, n_head, n_embd, block_size = 1, 2, 16, 16
batch_size, gradient_accumulation_steps, max_iters, warmup_iters = 2, 1, 12, 2
eval_interval, eval_tokens, log_interval = 4, 200, 3
"""


def write_tiny(seed=0):
    """A data set of letters and tiny.py, which trains on it in a second."""
    prepare_tiny("".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrs \n"), 4000)))
    Path("tiny.py").write_text(TINY)


def records(folder="r"):
    """{name of the run: its line in runs.jsonl}"""
    lines = [json.loads(line) for line in (Path(folder) / "runs.jsonl").read_text().splitlines()]
    return {str(Run(line["arm"], line["learning_rate"], line["seed"])): line for line in lines}


def losses():
    return {name: line["summary"]["final_val_loss"] for name, line in records().items() if line["summary"]}


LEFT = {Path("r", name) for name in ("runs.jsonl", "study.json", "ngrams.json", "report.md", "rates.svg", "arms.svg")}


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


def test_a_grid_is_complete_and_its_report_tells_it(grid):
    assert len(records()) == 8 and files("r").keys() <= LEFT
    commands = {run["config"]["command"].split(" --")[0] for run in records().values()}
    assert commands == {f"python -m study.queries {GRID[0]}"}  # train.py does not know all queries of a study
    for name, line in records().items():
        settings, model = line["config"]["settings"], line["config"]["model"]
        arm = f"query_mode={model['query_mode']}+weight_decay={settings['weight_decay']:g}"
        assert name == f"{arm}-lr0.01-seed{settings['seed']}"
        if settings["weight_decay"] == 1e30:
            assert line["summary"] is None
        else:
            assert [step for step, _, _ in line["curve"]] == [1, 3, 6, 9, 12] and line["summary"]["steps"] == 12
            assert all(2 < loss < 4 and norm > 0 for _, loss, norm in line["curve"])
    text = Path("r/report.md").read_text()
    assert f"python -m study.ablate {' '.join(GRID)}\n" in text
    assert "8 runs. Each: 12 steps, 384 tokens of tiny.txt; 1 layers, d 16, 2 heads; float32." in text
    for arm in (LINEAR, NONLINEAR):
        x = np.array([losses()[f"{arm}-lr0.01-seed{seed}"] for seed in (1, 2)])
        assert f"\n| {arm} | 0.01 | none | {x.mean():.4f} ± {x.std(ddof=1):.4f} (2) |" in text
        assert f"\n| {arm} | {x[0]:.4f} | {x[1]:.4f} |\n" in text
    assert text.count(" | inf diverged | inf diverged |\n") == 2 and text.count(" | 2 of 2 | ") == 2


def test_a_study_of_encoders_says_what_its_loss_is_of():
    write_tiny()
    masked = ["--objective=masked", "--mask_share=0.9"]
    assert ablate.main(["tiny.py", "--arm=identity", *masked, "--tune=", "--seed=1", "--out=r"]) == 0
    (loss,), text = losses().values(), Path("r/report.md").read_text()
    assert "| masked-token loss (n) | " in text and "All arms have the rate 0.0006; 1 measure there." in text
    assert f" | {loss:.4f} (1) | " in text and "alidation loss" not in text
    assert "arms.svg" not in text and not Path("r/arms.svg").exists()  # nothing to compare
    assert runs.load(Path("r")).ngrams[1] == pytest.approx(math.log(21), abs=0.1)  # letters at random, of 21
    # Where arms do not see the same, no table of counts judges them, and none that was counted before.
    Path("both").mkdir()
    Path("both/ngrams.json").write_text('{"2": 3.0, "3": 0.1, "5": 0.1}')
    assert ablate.main(["tiny.py", "--objective=next,masked", "--tune=", "--seed=1", "--out=both"]) == 0
    assert runs.load(Path("both")).ngrams == {} and len(records("both")) == 2
    later = runs.load(Path("r"))
    later.arms["decoder"] = {"query_mode": "identity", "objective": "next"}
    runs.count_ngrams(later)
    assert later.ngrams == runs.load(Path("r")).ngrams == {}


def test_the_same_command_runs_nothing_again_and_a_dry_run_measures_only(grid, capsys):
    before = files("r")
    assert ablate.main(GRID) == 0 and files("r") == before and "val loss" not in capsys.readouterr().out
    with pytest.raises(UserError, match="seeds was"):  # as without --dry-run
        ablate.main([*GRID, "--seed=1,2,3", "--dry-run"])
    more = [GRID[0], f"{GRID[1]},identity", *GRID[2:], "--dry-run"]
    assert ablate.main(more) == 0 and files("r") == before
    lines = capsys.readouterr().out.splitlines()
    assert sum("to run" in line for line in lines) == 4 and sum("diverged" in line for line in lines) == 4
    # d = 16, r = 8: 2 * 16 * 8 weights and two gains of 16 against 16 * 16 weights
    path = {"linear": 256, "nonlinear": 288, "identity": 0}
    assert all(f"{path[re.search('mode=([a-z]+)', line)[1]]:11,}" in line for line in lines[1:13])
    assert re.fullmatch(r"at least 4 to go, \d+:\d\d, \d+:\d\d each, 2 at a time", lines[13])
    words = r"2 seeds give intervals of ± \d+.\d\d %, and find a difference of .* in 4 of 5 studies"
    assert re.fullmatch(words, lines[15])


def test_a_plan_is_read_from_a_file_and_stands_once_it_is_measured(grid):
    """Arms and comparisons can be added, and the report tells which."""
    Path("plan.txt").write_text(" ".join(GRID[:-1]) + "  # a comment\n\n# another\n--out=r\n")
    assert ablate.main(["@plan.txt"]) == 0
    compare = f"--compare={NONLINEAR}:{LINEAR}"
    for change in ("--margin=0.3", "--spread=1", "--half-width=1", compare, "--seed=1", "--seed=3,4"):
        with pytest.raises(UserError, match="a plan stands once runs that measure are known"):
            ablate.main(["@plan.txt", change])
    assert "Added when" not in Path("r/report.md").read_text()


def test_an_arm_can_be_added_later(grid):
    study = runs.load(Path("r"))
    pairs = len(study.comparisons)
    assert f"\n| {NONLINEAR} against {LINEAR} | " in Path("r/report.md").read_text()
    study.arms["new"] = {"query_mode": "identity"}
    study.comparisons.append(["new", LINEAR])
    assert {run.arm for run in study.runs() if run not in study.records} == {"new"}
    runs.check_plan(study)
    runs.write_plan(study, "command")
    report.write(study, "command")
    with pytest.raises(UserError, match="r has 2 or more runs to go"):
        ladder.sizes([study])
    text = Path("r/report.md").read_text()
    assert f"Added when runs that measure were known, and so exploratory: new against {LINEAR}." in text
    assert f"\n| {NONLINEAR} against {LINEAR} | " in text and f"\n| new against {LINEAR} | " not in text
    for seed in (1, 2):
        study.records[Run("new", 0.01, seed)] = study.records[Run(NONLINEAR, 0.01, seed)]
    report.write(study, "command")
    of = {row.split(" | ")[0]: row.split(" | ")[1:] for row in Path("r/report.md").read_text().splitlines()}
    planned, later = of[f"| {NONLINEAR} against {LINEAR}"], of[f"| new against {LINEAR}"]
    assert later[:2] == planned[:2] and later[3] == planned[3].replace(" |", ", exploratory |")
    assert json.loads(Path("r/study.json").read_text())["planned"] == pairs
    del study.arms["new"]
    with pytest.raises(UserError, match="arms was"):
        runs.check_plan(study)


def test_the_ladder_puts_studies_in_the_order_of_their_size(grid):
    for factor, name in ((4, "big"), (1, "small")):  # four times the losses: the same differences in percent
        shutil.copytree("r", name)
        lines = list(records("r").values())
        for line in lines:
            line["config"]["parameters"]["non_embedding"] *= factor
            if line["summary"]:
                line["summary"]["final_val_loss"] *= factor
        Path(name, "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        counts = json.loads(Path(name, "ngrams.json").read_text())
        Path(name, "ngrams.json").write_text(json.dumps({n: factor * loss for n, loss in counts.items()}))
    ladder.main(["big", "small", "--out=ladder"])
    rows = [row.split(" | ") for row in Path("ladder/ladder.md").read_text().splitlines() if NONLINEAR in row]
    assert [row[0] for row in rows] == ["| 3,120", "| 12,480"] and rows[0][3] == rows[1][3] and "%" in rows[0][3]
    x = {mode: [losses()[f"{mode}-lr0.01-seed{seed}"] for seed in (1, 2)] for mode in (LINEAR, NONLINEAR)}
    assert f"{100 * (np.mean(x[NONLINEAR]) / np.mean(x[LINEAR]) - 1):+.2f} % [" in rows[0][3]
    with pytest.raises(UserError, match="big: a ladder has two studies or more"):
        ladder.main(["big", "--out=ladder"])
    bars = ladder.draw(ladder.sizes([runs.load(Path("big")), runs.load(Path("small"))]), Path("ladder")).axes[0]
    assert len(bars.containers) == 1  # the arms that diverged have no difference
    lines = [{**line, "summary": None} for line in records("big").values()]
    Path("big/runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="big: every run of query_mode=linear.* diverged"):
        ladder.main(["big", "small", "--out=ladder"])


def test_what_a_study_needs_is_asked_for():
    done = run("-c", "import sys; sys.modules['scipy'] = None; import study.ablate")
    assert done.stderr.count("\n") == 1 and done.returncode == 1


def test_the_speed_of_each_arm_is_measured_apart(grid, monkeypatch, capsys):
    speeds = iter([100, 200, 300, 400, 110, 190, 330, 410, 90, 250, 310, 390])
    monkeypatch.setattr(ablate, "speed_of", lambda *_: next(speeds))
    assert ablate.main([*GRID, "--speed"]) == 0
    assert list(json.loads(Path("r/speed.json").read_text()).values()) == [100, 200, 310, 400]
    assert re.search(rf"\| {re.escape(NONLINEAR)} .* \| 3.10 \|\n", Path("r/report.md").read_text())
    Path("r/speed.json").write_text(json.dumps({NONLINEAR: 310}))
    assert ablate.main(GRID) == 0 and "3.10" not in Path("r/report.md").read_text()


CHANGES = ["max_iters was 12, now is 13", "beta2 was 0.95, now is 0.5", "mlp_hidden was 64, now is 99"]


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
    arm = [f"--{setting}" for setting in arm.split("+")]
    flags = [*arm, f"--seed={seed}", "--learning_rate=1e-2", f"--out_dir={out_dir}", *flags]
    train.main(["tiny.py", *flags])
    return out_dir


def test_a_run_under_way_with_other_settings_is_refused(grid):
    train_run(LINEAR, 1, "--max_iters=8", folder="new")
    words = f"new/{re.escape(LINEAR)}-lr0.01-seed1: .*max_iters was 8, now is 12; choose another --out"
    with pytest.raises(UserError, match=words):
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
    left = [name for name in records() if "1e+30" in name and "linear+weight_decay=1e+30-lr0.01-seed1" not in name]
    leave_only(f"{LINEAR}-lr0.01-seed1", *left)
    train_run(LINEAR, 1)  # killed after its record was written and before its folder was deleted
    train_run(LINEAR, 2)  # killed before its record was written
    middle = train_run(NONLINEAR, 1, "--max_iters=8", "--lr_decay_iters=12")  # killed at step 8
    config = (middle / "config.json").read_text().replace('"max_iters": 8', '"max_iters": 12')
    (middle / "config.json").write_text(config)
    (middle / "summary.json").unlink()
    early = Path(f"r/{NONLINEAR}-lr0.01-seed2")  # killed before the first checkpoint
    early.mkdir()
    (early / "config.json").write_text(config.replace('"seed": 1', '"seed": 2'))
    Path("r/.runs.jsonl.tmp").write_text("{")  # killed while it wrote a record
    done = run("-m", "study.ablate", *GRID)
    assert done.returncode == 0 and done.stdout.count("val loss") == 3, done.stdout + done.stderr
    assert losses() == pytest.approx(undisturbed, rel=1e-6) and len(records()) == 8  # threads change the rounding
    assert files("r").keys() <= LEFT
    assert records()[f"{NONLINEAR}-lr0.01-seed1"]["config"]["resumed"][0]["at_step"] == 8


def test_a_run_that_fails_stops_the_grid_with_its_last_words(grid):
    leave_only("query_mode=linear+weight_decay=1e+30-lr0.01-seed1")
    for seed in (1, 2):
        folder = train_run(LINEAR, seed)
        (folder / "summary.json").unlink()
        (folder / "ckpt.pt").write_bytes(b"garbage")
    done = run("-m", "study.ablate", *GRID)
    (line,) = done.stderr.splitlines()
    words = rf"ablate.py: ({re.escape(LINEAR)}-lr0.01-seed[12]): .*r/\1/ckpt.pt cannot be read.* \(r/\1/log.txt tells"
    assert re.match(words, line)
    assert done.returncode == 1 and "cannot be read" in Path(f"r/{LINEAR}-lr0.01-seed1/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grid_that_is_killed_goes_on_where_it_was(number):
    write_tiny()
    longer = ["--max_iters=400", "--lr_decay_iters=400", "--eval_interval=50"]
    second = Path(f"r/{LINEAR}-lr0.01-seed2/ckpt.pt")  # seed 1 beside it
    process = start("-m", "study.ablate", *GRID, *longer)
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    before = records() if Path("r/runs.jsonl").exists() else {}
    again = run("-m", "study.ablate", *GRID, *longer)
    assert again.returncode == 0 and len(before) < 8 and len(records()) == 8 and len(losses()) == 4
    assert files("r").keys() <= LEFT and all(records()[name] == before[name] for name in before)
    assert records()[f"{LINEAR}-lr0.01-seed2"]["config"]["resumed"][0]["at_step"] >= 50
    whole = json.loads((train_run(LINEAR, 2, *longer, folder="whole") / "summary.json").read_text())
    assert losses()[f"{LINEAR}-lr0.01-seed2"] == pytest.approx(whole["final_val_loss"], rel=1e-6)


@pytest.fixture
def simulated(monkeypatch):
    """A function loss(run) -> a maker of empty studies, whose runs end with that loss, some after others that began later; and
    the list of the runs that were started."""

    def simulate(loss, devices, rates, patience=lambda: 0):
        started = []

        def begin(study, run, device, folder):
            started.append(run)
            folder, waits = RunFolder(folder), iter([None] * patience())
            folder.path.mkdir(parents=True)
            folder.write_json("config.json", {})
            folder.write_json("summary.json", {"final_val_loss": loss(run), "seconds": 1, "tokens_per_second": 1})
            folder.write_text("metrics.jsonl", "")
            return SimpleNamespace(poll=lambda: next(waits, 0), returncode=0)

        def empty():
            rest = dict(comparisons=[["b", "a"]], margin=0.5, half_width=None, spread=0.5, folder=Path("r"))
            return Study("c.py", {"a": {}, "b": {}}, rates, [1, 2], [3, 4], devices=["cpu"] * devices, **rest)

        monkeypatch.setattr(time, "sleep", lambda _: None)
        monkeypatch.setattr(runs, "start", begin)
        monkeypatch.setattr(runs, "check", lambda study: None)
        return empty, started

    return simulate


@pytest.mark.parametrize("devices", [1, 3])
def test_a_device_waits_for_what_only_others_can_tell_and_no_run_is_made_twice(devices, simulated):
    """The whole of a tuned study, where a run takes no time; then without one of its first runs."""
    best = {"a": 1e-3, "b": 3e-2}
    empty, started = simulated(lambda run: 1 + math.log2(run.learning_rate / best[run.arm]) ** 2, devices, [4e-3, 8e-3])
    study = empty()
    assert runs.go(study) == 0 and study.to_go() == 0 and set(study.records) == set(study.runs()) == set(started)
    assert len(started) == len(set(started))
    path, first = Path("r/runs.jsonl"), Run("a", 4e-3, 1)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if [*json.loads(line).values()][:3] != [*first]))
    started.clear()
    again = empty()
    runs.read(again)
    assert len(again.records) < len(study.records) - 1  # what follows from that run is not asked for yet
    assert runs.go(again) == 0 and started == [first] and again.records == study.records


@pytest.mark.parametrize("seed", range(10))
def test_what_a_study_finds_does_not_depend_on_which_run_ended_first(seed, simulated):
    """Where losses are so noisy that a rate is asked for by one run, and not once another one has ended, too."""
    rng = np.random.default_rng(seed)

    def loss(run):
        return 3 + 0.02 * math.log2(run.learning_rate / 4e-3) ** 2 + rng.normal(0, 0.03)

    empty, _ = simulated(loss, 3, [4e-3], lambda: rng.integers(0, 5))
    study, again = empty(), empty()
    runs.go(study)
    runs.read(again)
    assert again.to_go() == 0 and again.records == study.records


# What is published.

PUBLISHED = sorted(path.parent for path in (ROOT / "study/results").glob("*/report.md"))
MAIN, SCREEN, FINAL = (ROOT / "study/results" / name for name in ("stdlib_cpu", "queries_cpu", "queries_final_cpu"))
STUDY_README = (ROOT / "study/README.md").read_text("utf-8")


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_published_tables_are_those_of_the_records(folder):
    study, text = runs.load(folder), (folder / "report.md").read_text("utf-8")
    parts = (report.plan, report.verdict_table, report.arm_table, report.note, report.lines, report.rate_table)
    assert len(study.records) == len(records(folder)) and all(part(study) in text for part in parts)
    told = [report.lines] + [report.verdict_table] * (folder != SCREEN)  # by its plan the screen only gives an order
    told += [report.arm_table, report.note] * (folder == MAIN)
    assert study.to_go() or all(part(study) in STUDY_README for part in told)


def test_the_intervals_in_the_texts_are_those_of_studies_that_are_done():
    pattern = r"[+-]\d+\.\d\d % \[.*?\]"
    done = {
        interval for folder in PUBLISHED for interval in re.findall(pattern, report.verdict_table(runs.load(folder)))
    }
    for text in (STUDY_README, (ROOT / "README.md").read_text("utf-8")):
        told = set(re.findall(pattern, text))
        assert told and told <= done


def test_the_results_in_the_readme_are_those_of_the_studies():
    text = (ROOT / "README.md").read_text("utf-8")
    for name, words in (
        ("stdlib_cpu", "decoder, Python source, eight seeds"),
        ("bytecode_cpu", "decoder, its bytecode, ten seeds"),
        ("encoder_cpu", "encoder, Python source, ten seeds"),
    ):
        found = {(row.arm, row.other): report.interval(*row[2:5]) for row in runs.load(MAIN.parent / name).compare()}
        cells = [found[arm, "linear"] for arm in ("nonlinear", "identity", "linear_matched")]
        assert f"| {' | '.join([words, *cells])} |\n" in text
    assert f"no gain of f was seen: {found['nonlinear', 'identity']} over identity." in text


def test_the_pictures_show_every_run(tmp_path):
    study, lines = runs.load(MAIN), records(MAIN).values()
    study.folder = tmp_path
    dots = [line.get_xydata() for line in report.draw_rates(study).axes[0].lines if line.get_linestyle() == "None"]
    told = sorted(line["summary"]["final_val_loss"] for line in lines)
    assert sorted(y for of_run in dots for _, y in of_run) == told
    axes, seeds = report.draw_arms(study).axes[0], study.measuring_seeds()
    x = {(line["arm"], line["seed"]): line["summary"]["final_val_loss"] for line in lines if line["seed"] in seeds}
    means = {arm: np.mean([x[arm, seed] for seed in seeds]) for arm, _ in x}
    arms = sorted(means.keys() - {"linear"}, key=means.get)
    assert [label.get_text() for label in axes.get_yticklabels()] == arms[::-1]
    for arm, of_seeds, mean in zip(arms[::-1], axes.lines[::2], axes.lines[1::2]):
        percent = [100 * (x[arm, seed] - x["linear", seed]) / means["linear"] for seed in seeds]
        assert sorted(of_seeds.get_xdata()) == pytest.approx(sorted(percent))
        assert mean.get_xdata() == pytest.approx(100 * (means[arm] / means["linear"] - 1))
    lengths = {arms[::-1][round(line[0, 1])]: np.ptp(line[:, 0]) for c in axes.collections for line in c.get_segments()}
    told = {row.arm: row.high - row.low for row in study.compare() if row.other == "linear"}
    assert lengths == pytest.approx(told) and len(lengths) == 5


def test_an_arm_that_is_added_later_uses_all_runs_that_are_there(tmp_path, monkeypatch):
    """Also those of the seeds that the width of intervals asked for: only the new arm is to be run."""
    shutil.copytree(MAIN, tmp_path / "s")
    study, seen = runs.load(MAIN), []
    arms = ",".join([*study.arms, "gated"])
    pairs = ",".join(map(":".join, [*study.comparisons, ["gated", "linear"]]))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs, "check", lambda study: None)  # which needs the data
    monkeypatch.setattr(ablate, "print_runs", seen.append)
    options = [f"--out={tmp_path / 's'}", f"--arm={arms}", f"--compare={pairs}", "--dry-run"]
    assert ablate.main([f"@{MAIN / 'plan.txt'}", *options]) == 0
    assert seen[0].records == study.records and seen[0].to_go() == 2 + 8  # two rates first, and eight seeds


def test_the_published_ladder_is_that_of_its_studies():
    """Its intervals are those of the studies' reports, each computed anew below."""
    folders = (MAIN.parent / name for name in ("ladder_large_cpu", "ladder_small_cpu", "stdlib_cpu"))
    found = ladder.sizes([runs.load(folder) for folder in folders])
    told = (MAIN.parent / "ladder/ladder.md").read_text("utf-8")
    assert ladder.size_table(found) in told
    assert [size for size, *_ in found] == sorted({size for size, *_ in found}) and len(found) == 3


def test_what_other_rates_cost_as_the_text_tells_it():
    study, cost = runs.load(MAIN), {}  # in percent of the best
    for arm in ("linear", "linear_matched"):
        at = {rate: study.mean_loss(runs, [1]) for rate, runs in study.tuning_runs(arm).items()}
        cost[arm] = [100 * (at[rate] / min(at.values()) - 1) for rate in (4e-3, 8e-3)]
    words = "with tuning seed 1 it loses {:.1f} and {:.1f} % at 0.004 and 0.008, where".format(*cost["linear_matched"])
    words += " the usual one loses {:.1f} and {:.1f} %".format(*cost["linear"])
    assert words in " ".join(STUDY_README.split())


def test_what_rates_do_to_encoders_as_the_text_tells_it():
    (study, x), text = measured("encoder_cpu"), " ".join(STUDY_README.split())
    for rate, words in (
        (0.00566, "ends at {:.3f} and linear at {:.3f} at the rate 0.00566"),
        (0.0113, "at {:.3f} and {:.3f} at"),
    ):
        found = [study.mean_loss(study.tuning_runs(arm)[rate], [1]) for arm in ("identity", "linear")]
        assert words.format(*found) in text
    assert [study.search(arm)[1] for arm in study.arms] == [0.00566, 0.00566, 0.016, 0.0113, 0.008]
    below = [100 * (1 - x[arm].mean() / study.ngrams[5]) for arm in ("linear", "identity")]
    assert "Linear ends only {:.1f} % below the 5-grams, identity {:.1f} %.".format(*below) in text
    assert f"a run's noise was {noise(study)}, not" in text


def test_the_screen_and_who_goes_on_by_the_rule_of_its_plan():
    """From nothing but the lines of runs.jsonl: the table, in its order, and the arms of the final's plan."""
    lines, of_main, x, told = records(SCREEN), records(MAIN), {}, {}
    for line in lines.values():
        if line["seed"] > 1:
            x.setdefault(line["arm"], {})[line["seed"]] = line["summary"]["final_val_loss"]
            told[line["arm"]] = f"{line['config']['parameters']['non_embedding']:,}", f"{line['learning_rate']:g}"
    assert all(sorted(found) == [3, 4, 5] for found in x.values()) and len(x) == 17
    mean = {arm: np.mean([*found.values()]) for arm, found in x.items()}
    order = sorted(mean, key=mean.get)
    rows = re.findall(r"^\| (\w+) \| .* \| ([\d,]+) \| ([\d.]+) \| (\d\.\d{4}) \|$", STUDY_README, re.M)
    assert rows == [(arm, *told[arm], f"{mean[arm]:.4f}") for arm in order]
    known = ["linear", "linear_matched", "identity", "identity_mlp", "nonlinear"]
    assert all(line == of_main[name] for name, line in lines.items() if line["arm"] in known)
    limit = json.loads((SCREEN / "ngrams.json").read_text())["5"]  # that none failed is computed below
    first, second = [arm for arm in order if arm not in known and max(x[arm].values()) < limit][:2]
    assert mean[first] < mean["linear_matched"]
    assert f"`{first}` and `{second}` go on" in " ".join(STUDY_README.split())
    final = (FINAL / "plan.txt").read_text()
    arms, seeds, pairs = (
        re.search(rf"^--(?:.* --)?{key}=(\S+)", final, re.M)[1].split(",") for key in ("arm", "seed", "compare")
    )
    # Of keys that are normalised, and of a value that starts larger.
    controls = ["linear_qk_gain", "linear_matched_value"]
    arms, pairs = arms[:8], pairs[:10]  # later ones are exploratory
    assert arms == ["linear", "linear_matched", "identity", "nonlinear", first, second, *controls]
    both = [f"{arm}:{other}" for other in ("linear_matched", "linear", "nonlinear") for arm in (first, second)]
    both += [":".join(pair) for pair in zip((first, second), controls)]
    assert pairs == [*both, "identity:linear_matched", "nonlinear:linear_matched"] and "--margin=0.5\n" in final
    assert not {int(seed) for seed in seeds} & {line["seed"] for line in [*lines.values(), *of_main.values()]}


def test_what_is_recommended_follows_from_the_final_by_the_rule_of_its_plan():
    rows = {(row.arm, row.other): row for row in runs.load(FINAL).compare()}
    controls = {"nonlinear_per_head": "linear_qk_gain", "nonlinear_value": "linear_matched_value"}
    mean = {arm: rows[arm, "linear_matched"].mean for arm in controls}

    def better(arm, other):
        return rows[arm, other].verdict.startswith("better")

    found = [arm for arm, own in controls.items() if better(arm, "linear_matched") and better(arm, own)]
    best = min(found, key=mean.get, default=None)
    words = f"**`{best}` is recommended" if best else "**No query is recommended"
    if best:
        words += (
            ", and better than the paper's" if better(best, "nonlinear") else ", but not called better than the paper's"
        )
    text = " ".join(STUDY_README.split())
    assert f"{words}.**" in text
    ascribed = better("nonlinear_per_head", "linear_per_head")  # what f does; only then is it model.py's, too
    assert ("nonlinear_per_head" in (ROOT / "model.py").read_text("utf-8")) == ascribed
    assert ("**No gain is ascribed to f.**" in text) != ascribed


def test_the_final_has_what_was_tuned_before_and_measures_on_one_processor():
    """The tuning runs that its plan takes from the main study and from the screen are those, to the last digit."""
    lines, of_main, of_screen = records(FINAL), records(MAIN), records(SCREEN)
    arms = {"linear", "linear_matched", "identity", "nonlinear"}
    reused = {name: line for name, line in of_main.items() if line["arm"] in arms and line["seed"] in (1, 2)}
    arms = {"nonlinear_per_head", "nonlinear_value", "linear_qk_gain"}
    reused |= {name: line for name, line in of_screen.items() if line["arm"] in arms and line["seed"] == 1}
    assert len(reused) == 29 and reused == {name: lines[name] for name in reused}
    assert len({line["config"]["device"] for line in lines.values() if line["seed"] >= 13}) == 1


def noise(study):
    return re.search(r"The paired differences show (.*? %)", report.plan(study))[1]


def measured(name):
    """A published study, and the losses of each arm's measuring seeds."""
    study = runs.load(MAIN.parent / name)
    return study, {arm: np.array([*found.values()]) for arm, found in study.losses(study.measured()).items()}


def test_what_the_text_tells_of_bytecode():
    (study, x), text = measured("bytecode_cpu"), " ".join(STUDY_README.split())
    assert study.search("identity")[1] == 8e-3 and study.search("linear")[1] == 5.66e-3
    at = {(run.arm, run.learning_rate, run.seed): r["summary"]["final_val_loss"] for run, r in study.records.items()}
    tuned = {arm: [at[arm, rate, seed] for seed in (1, 2)] for arm, rate in (("identity", 8e-3), ("linear", 5.66e-3))}
    words = "two runs at its rate, {:.3f} and {:.3f}, lie below all ten that measure, {:.3f} to {:.3f} (the first"
    assert words.format(*tuned["identity"], x["identity"].min(), x["identity"].max()) in text
    assert all(np.less(*tuned.values()))
    words = "it ended at {:.3f} and {:.3f} with seed 1, linear at its own at {:.3f}"
    assert words.format(at["identity", 5.66e-3, 1], at["identity", 0.0113, 1], tuned["linear"][0]) in text
    assert f"A run's noise is {noise(study)}" in text
    clipped = [row.split(" | ")[7].split()[0] for row in report.arm_table(study).splitlines()[2:]]
    words = "linear {0} % of the logged steps, linear_matched {1} %, nonlinear {3} %, identity {2} %"
    assert words.format(*clipped) in text
    higher = 100 * (x["nonlinear"] / x["linear"] - 1)
    assert np.argmin(x["linear"]) == np.argmax(x["nonlinear"]) == 2  # seed 5
    assert (higher < 0).sum() == 7 and f"it is {higher[2]:.1f} % higher" in text


def test_what_was_looked_at_afterwards_as_the_text_tells_it():
    stats, text = pytest.importorskip("scipy.stats"), " ".join(STUDY_README.split())

    def paired(x, y):
        """In percent of y's mean: the mean difference, its interval, and p."""
        test = stats.ttest_rel(x, y)
        interval = np.array(test.confidence_interval()) * 100 / np.mean(y)
        return interval.mean(), *interval, test.pvalue

    (source, x), (code, y), (_, z) = map(measured, ("stdlib_cpu", "bytecode_cpu", "encoder_cpu"))
    (_, small), (wide, large) = map(measured, ("ladder_small_cpu", "ladder_large_cpu"))
    mean, _, _, p = paired(x["nonlinear"], x["identity"])
    assert f"by the same records it is {-mean:.1f} % lower, p = {p:.2f}" in text
    rest = np.arange(10) != 2
    words = "without that seed: {:.1f} %, from {:.1f} to {:+.1f}"
    assert words.format(*paired(y["nonlinear"][rest], y["linear"][rest])[:3]) in text
    twelve = {}
    for arm in ("identity", "linear"):
        tuned = code.tuning_runs(arm)[code.search(arm)[1]]
        twelve[arm] = [code.mean_loss(tuned, [1]), code.mean_loss(tuned, [2]), *y[arm]]
    mean, _, _, p = paired(twelve["identity"], twelve["linear"])
    assert f"With all twelve seeds identity is still {mean:.1f} % worse (p = {p:.3f})" in text
    found = [paired(z["identity"], z[arm]) for arm in ("linear_matched", "linear_anchored")]
    assert "by {:.1f} and {:.1f} % (not planned; p < 0.001 each)".format(*(-mean for mean, *_ in found)) in text
    assert all(p < 0.001 for *_, p in found)

    def gains(before, after):
        """What nonlinear gains from one size to the next on linear and on linear_matched: points and p of each."""
        found = []
        for other in ("linear", "linear_matched"):
            points = [100 * (v["nonlinear"] - v[other]) / v[other].mean() for v in (before, after)]
            found += [points[0].mean() - points[1].mean(), stats.ttest_ind(*points, equal_var=False).pvalue]
        return found

    words = "gains {:.1f} points on linear (p about {:.3f}, not planned) and {:.1f} on linear_matched (p about {:.2f})"
    assert words.format(*gains(small, x)) in text
    words = "loses {:.1f} points to linear (p about {:.2f}) and {:.1f} to linear_matched (p about {:.2f})"
    assert words.format(*gains(large, x)) in text  # which gains on the way back
    found = [wide.mean_loss(wide.tuning_runs(arm)[wide.search(arm)[1]]) for arm in ("nonlinear", "linear")]
    assert wide.tuning_seeds == [1] and "nonlinear was ahead, {:.3f} against {:.3f}".format(*found) in text
    assert found[0] < found[1] and (large["nonlinear"] > large["linear"]).sum() == 5

    def clipped(study, arm, rate):
        curve = study.records[Run(arm, rate, 1)]["curve"]
        return 100 * np.mean([norm > 1 for *_, norm in curve])

    arms = ("linear", "nonlinear", "linear_matched")
    (a, b, c), (d, e, f) = ([f"{clipped(source, arm, rate):.0f}" for arm in arms] for rate in (5.66e-3, 8e-3))
    assert a == b and d == e and f"both clip {a} % at 0.00566 and {d} % at 0.008, linear_matched {c} and {f} %" in text
    assert f"identity 7 % ({clipped(code, 'identity', 5.66e-3):.0f} % at" in text


def test_what_the_test_planned_first_would_give_as_the_text_tells_it():
    """Unpaired, with one variance for all arms; of nonlinear against linear_matched, as one of eight secondary comparisons."""
    (study, x), t = measured("stdlib_cpu"), pytest.importorskip("scipy.stats").t
    error = math.sqrt(np.mean([found.var(ddof=1) for found in x.values()]) * 2 / 8)
    tests = [(x[arm].mean() - x[other].mean()) / error for arm, other in study.comparisons[1:]]
    p = sorted(2 * t.sf(abs(z), 7 * len(x)) for z in tests)
    assert p[0] < 2 * t.sf(abs(tests[0]), 7 * len(x)) == p[1] and 8 * p[0] < 7 * p[1] < 0.05 < 6 * p[2]
    assert f"linear_matched, Holm's p {7 * p[1]:.3f} instead of 0.082" in " ".join(STUDY_README.split())


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_every_number_of_the_published_verdicts_computed_anew(folder):
    """From nothing but the lines of runs.jsonl, by scipy's paired t test; also what was clipped, and that no run failed."""
    ttest = pytest.importorskip("scipy.stats").ttest_rel
    told, text = json.loads((folder / "study.json").read_text()), (folder / "report.md").read_text("utf-8")
    counts, x, rates, shares = json.loads((folder / "ngrams.json").read_text()), {}, {}, {}
    for line in records(folder).values():
        assert np.mean([loss for _, loss, _ in line["curve"][-15:]]) < counts["3"]
        assert line["summary"]["final_val_loss"] < counts["3"]
        settings = line["config"]["settings"]
        assert settings["max_iters"] == line["summary"]["steps"] and settings["grad_clip"] == 1
        if line["seed"] in told["seeds"]:
            x.setdefault(line["arm"], {})[line["seed"]] = line["summary"]["final_val_loss"]
            assert rates.setdefault(line["arm"], line["learning_rate"]) == line["learning_rate"]
            above = sum(norm > 1 for _, _, norm in line["curve"])
            shares.setdefault(line["arm"], []).append(100 * above / len(line["curve"]))
    for arm, found in shares.items():
        assert re.search(rf"^\| {arm} \|.* \| {np.mean(found):.0f} %, {max(found):.0f} % \|", text, re.M)
    measured, planned = {arm: len(x.get(arm, ())) for arm in told["arms"]}, told["planned"]
    counted = {measured[arm] for pair in told["comparisons"][:planned] for arm in pair}
    n = min(counted)
    x = {arm: np.array([losses[seed] for seed in sorted(losses)]) for arm, losses in x.items()}
    seeds, half_width = told["seeds"], told["half_width"]
    whole = counted == {n} and (n == len(seeds) or half_width and n >= 6 and n % 2 == 0)
    if whole:
        # Those that were added later follow when they are done.
        pairs = [pair for pair in told["comparisons"] if {measured[arm] for arm in pair} == {n}]
        tests = [ttest(x[arm], x[other]) for arm, other in pairs]
        intervals = np.array([test.confidence_interval(0.95) for test in tests])
        base = np.array([x[other].mean() for _, other in pairs])
        differences = np.array([x[arm] - x[other] for arm, other in pairs])
        noise = 100 * differences.std(1, ddof=1) / math.sqrt(2) / base  # the two runs of a pair are equally noisy
        widest = (100 * np.diff(intervals)[:, 0] / 2 / base)[:planned].max()
        whole = n == len(seeds) or widest <= half_width  # more seeds follow while one is too wide
    assert ("\n\nNone before all planned runs are done.\n" in text) == (not whole)
    if not whole:
        return
    assert f"The paired differences show {min(noise):.1f} to {max(noise):.1f} %." in text
    for i, (arm, other) in enumerate(pairs):
        nats = np.array([intervals[i].mean(), *intervals[i]])
        words = ["{:+.2f} % [{:+.2f}, {:+.2f}]".format(*v) for v in (100 * nats / base[i], 100 * np.expm1(nats))]
        others = sorted(test.pvalue for test in tests[1 : planned if i < planned else None])
        # Holm: the largest of (m - k) p over those that are not larger
        steps = [min(1, (len(others) - k) * q) for k, q in enumerate(others) if q <= tests[i].pvalue]
        p = max(steps) if i else tests[0].pvalue
        told_p = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        (row,) = (row for row in text.splitlines() if row.startswith(f"| {arm} against {other} | "))
        assert f" | {' | '.join(words)} | {told_p} | " in row and row.endswith(", exploratory |") == (i >= planned)


def test_the_pilot_in_the_readme_is_that_of_its_records():
    """Each row of the table, from the runs with its settings; and no run that stayed at what bigrams reach."""
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\| (?:500|1,500) \|.*", STUDY_README, re.M)]
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
