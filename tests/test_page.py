"""study/page.html computes what model.py computes, works in a browser, and shows recorded runs.

`PYTHONPATH=. python tests/test_page.py study/results/NAME NOTE ARM ...` puts other runs into it.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from model import GPT, QUERIES, GPTConfig

PATH = ROOT / "study" / "page.html"
PAGE = PATH.read_text(encoding="utf-8")
RUNS = re.search(r'type="application/json" id="runs">\n(.*?)</script>', PAGE, re.S)[1]
STUDY = json.loads(RUNS)
SWITCHES = ("skips", "norms", "tied", "shared")
CASES = [dict(zip(SWITCHES, on)) for on in product([False, True], repeat=4)]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-sync
--disable-background-networking --disable-component-update --user-data-dir=profile --dump-dom
--virtual-time-budget=5000 --enable-blink-features=ComputedAccessibilityInfo""".split()
# The page runs in a frame of the screen's width, because a window has at least 500 pixels.
FRAME = """<!doctype html><iframe width="{}" height="800" srcdoc="{}"></iframe><pre></pre>
<script>onmessage = (e) => document.querySelector("pre").textContent = e.data;</script>"""
# A head that notes problems, runs the code of a test, and sends both to the frame's parent.
HEAD = """<head><script>{
const problems = [], note = (...words) => problems.push(words);
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, (event) => note(kind, event.message, event.blockedURI));
Object.assign(console, {log: note, warn: note, error: note});
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((node) => node.textContent);
const points = (path) =>
  path.getAttribute("d").slice(1).split("L").map((point) => point.split(",").map(Number));
const move = (id, value) =>
  Object.assign($(id), {value}).dispatchEvent(new Event("input", {bubbles: true}));
const click = (selector) => { // what a pointer meets in the middle of the node
  all(selector)[0].scrollIntoView({block: "center"});
  const {x, y, width, height} = all(selector)[0].getBoundingClientRect();
  document.elementFromPoint(x + width / 2, y + height / 2).click();
};
addEventListener("load", () => {
  const result = (() => { try { CODE } catch (error) { note(error.stack); } })();
  const {scrollWidth, clientWidth} = document.documentElement;
  if (scrollWidth > clientWidth) note("the page scrolls sideways");
  parent.postMessage(JSON.stringify({problems, result}), "*");
});
}</script>"""

both_screens = pytest.mark.parametrize("width", [360, 1280], ids=["phone", "desktop"])
matrix = partial(torch.tensor, dtype=torch.float64)
assert_equal = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
small_config = partial(GPTConfig, block_size=5, vocab_size=5, n_layer=2, n_head=2, n_embd=4)


def browse(code, width=1280):
    """Run the body of a JavaScript function in the page, in a browser, and return its result.
    The page must raise no error, log and request nothing, and be as narrow as the screen."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("needs chromium or google-chrome (for the arithmetic node is enough)")
    page = PAGE.replace("<head>", HEAD.replace("CODE", code))
    Path("frame.html").write_text(FRAME.format(width, html.escape(page)), encoding="utf-8")
    command = [program, *FLAGS, "frame.html"]
    output = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    answer = re.search("<pre>(.+)</pre>", output.stdout)
    assert answer, output
    sent = json.loads(html.unescape(answer[1]))
    assert sent["problems"] == []
    return sent["result"]


def compute(code):
    """The value of a JavaScript expression of the page's arithmetic, from node or a browser."""
    if not shutil.which("node"):
        return browse(f"return {code};")
    script = re.search(r'<script id="model">(.*?)</script>', PAGE, re.S)[1]
    program = f"{script}\nconsole.log(JSON.stringify({code}));"
    output = subprocess.run(["node", "-"], input=program, capture_output=True, encoding="utf-8")
    assert output.returncode == 0, output.stderr
    return json.loads(output.stdout)


def test_the_page_is_one_small_file_that_loads_nothing():
    assert len(PAGE.encode()) < 60_000
    assert "width=device-width" in PAGE
    assert "default-src 'none'" in PAGE  # the browser refuses every request
    assert set(re.findall(r"https?://[^\"']*", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href|import|fetch)\b\s*[=(]", PAGE)


@pytest.mark.parametrize("rank, activation", list(product([1, 2, 4, 8], ["gelu", "none"])))
@torch.no_grad()
def test_the_queries_are_those_of_the_model(rank, activation):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 2 * x, -x, 1e-3 * x, 30 * x])
    points = torch.linspace(-7, 7, 281, dtype=torch.float64)
    weights = compute(f"query_weights({rank}, '{activation}')")
    queries = f"Object.values(QUERIES).map((q) => q({x.tolist()}, {json.dumps(weights)}))"
    modes, results, erf = compute(f"[Object.keys(QUERIES), {queries}, {points.tolist()}.map(erf)]")
    np.testing.assert_allclose(erf, torch.erf(points), rtol=1e-15, atol=5e-16)
    assert modes == list(QUERIES)
    names = {"w_q.weight": "W_Q", "w_1.weight": "W_1", "w_2.weight": "W_2"}
    for mode, result in zip(QUERIES, results, strict=True):
        own = {"query_rank": rank, "query_activation": activation} if mode == "nonlinear" else {}
        query = QUERIES[mode](small_config(query_mode=mode, **own)).double()
        state = {name: matrix(weights[key]).T for name, key in names.items()}
        query.load_state_dict(state, strict=False)  # the gains stay 1
        assert_equal(result, query(x))


def run(weights, on, idx):
    """The logits and attention patterns of model.py's GPT without MLPs and without what is off."""
    model = GPT(small_config(query_mode="linear", tie_weights=on["tied"])).double()
    patterns = []

    def record(attention, inputs):
        q, k, _ = attention.heads(inputs[0])
        scores = q @ k.mT / attention.head_size**0.5
        future = torch.ones(5, 5).triu(1).bool()
        patterns.append(scores.masked_fill(future, float("-inf")).softmax(-1)[0])

    for name in ("wte", "wpe", "lm_head"):
        getattr(model, name).weight.copy_(matrix(weights[name]))
    for block, layer in zip(model.blocks, weights["layers"], strict=True):
        w = {name: matrix(value).T for name, value in layer.items()}
        block.attn.query.w_q.weight.copy_(w["W_Q"])
        block.attn.key_value.weight.copy_(torch.cat([w["W_K"], w["W_V"]]))
        block.attn.c_proj.weight.copy_(w["W_O"])
        block.attn.register_forward_pre_hook(record)
        block.mlp.c_proj.weight.zero_()
        if not on["norms"]:
            block.ln_1 = model.ln_f = torch.nn.Identity()
        if not on["skips"]:
            block.forward = lambda x, cache, block=block: block.attn(block.ln_1(x))
    return {"logits": model(idx)[0].numpy(), "patterns": torch.stack(patterns).numpy()}


def difference(a, b):
    """The largest difference of two results, in their logits and attention patterns."""
    return max(np.abs(np.subtract(a[key], b[key])).max() for key in a)


def is_exact(on):
    """Whether theory says that W_Q can be absorbed."""
    return not on["norms"] and (not on["skips"] or (on["shared"] and not on["tied"]))


@pytest.mark.parametrize("on", CASES)
@torch.no_grad()
def test_the_two_layers_are_those_of_the_model_wherever_the_slider_is(on):
    slider = [0, 0.3, 0.75, 1]
    models = f"((m) => [m, ...{slider}.map((t) => absorb(m, t, on))])(new_model(on))"
    code = f"((on) => {models}.map((m) => [m, GPT(m, on)]))({json.dumps(on)})"
    idx, ((_, before), *moved) = compute(f"[IDX, {code}]")
    for t, (weights, result) in zip(slider, moved, strict=True):
        assert difference(result, run(weights, on, torch.tensor([idx]))) < 1e-12
        off = difference(result, before)
        assert off < 1e-12 if t == 0 or is_exact(on) else off > 1e-2, t
    for layer in weights["layers"]:  # at the end of the slider no query has a weight
        assert_equal(layer["W_Q"], torch.eye(4))


@both_screens
def test_the_slider_and_each_switch_show_the_true_difference(width):
    code = """
    const table = (name) => texts(`[aria-label='${name}'] tbody td`);
    const look = () => ({
      off: Number(texts("#off")[0]), why: texts("#why")[0], headings: texts("h4"),
      logits: table("Logits of the next word"), W_Q: [1, 2].map((n) => table(`W_Q of layer ${n}`)),
    });
    const moved = [100, 0, 80].map((t) => { move("t", t); return look(); });
    const switched = CASES.map((on) => {
      for (const name in on) if ($(name).checked !== on[name]) click(`label:has(#${name})`);
      return [GPT(new_model(on), on), GPT(absorb(new_model(on), 0.8, on), on), look()];
    });
    return [moved, switched];
    """
    (at_1, at_0, between), switched = browse(code.replace("CASES", json.dumps(CASES)), width)
    identity = [f"{float(i == j):.1f}" for i in range(4) for j in range(4)]
    assert at_1["W_Q"] == [identity, identity]
    assert identity not in at_0["W_Q"] + between["W_Q"]
    assert at_1["logits"] == at_0["logits"] == between["logits"]
    assert at_0["off"] == 0 < at_1["off"] < 1e-12
    for on, (before, after, seen) in zip(CASES, switched, strict=True):
        off = difference(before, after)
        assert seen["off"] == pytest.approx(off, rel=0.06) and (off < 1e-12) == is_exact(on), on
        assert seen["why"].startswith("Exact: " if is_exact(on) else "Not exact: "), on
        results = [text for text in seen["headings"] if re.match("Attention|Logits", text)]
        assert all(text.endswith("unchanged") for text in results) == is_exact(on), on


def bend(paths):
    """How far the images of the plane's straight lines are from straight, in pixels."""
    lines = [np.array(path) for path in paths if len(path) > 50]
    assert len(lines) == 17
    chords = [(line - line[0], line[-1] - line[0]) for line in lines]
    return max(np.abs(p @ [-y, x] / np.hypot(x, y)).max() for p, (x, y) in chords)


@both_screens
def test_only_the_nonlinear_query_bends_lines(width):
    code = """
    const paths = (mode) => all(`#${mode} path`).map(points);
    const look = () => [Object.keys(QUERIES).map(paths), texts("#bent")[0], $("line").innerHTML];
    return [
      look(), (move("angle", 130), look()), (click("#ranks label:nth-of-type(4)"), look()),
      (click("label:has(#gelu)"), look()),
    ];
    """
    seen = browse(code, width)
    for (linear, identity, nonlinear), *_ in seen:
        assert bend(linear) < 0.2 and bend(identity) < 0.2 and bend(nonlinear) > 5
    assert ["because without the GELU" in words for _, words, _ in seen] == [False] * 3 + [True]
    assert len({str(planes) for planes, *_ in seen}) == len({line for *_, line in seen}) == 4


@both_screens
def test_each_run_is_a_dot_and_each_control_has_a_name(width):
    code = """
    const dots = all("#rates circle").map(({cx, cy}) => [cx.baseVal.value, cy.baseVal.value]);
    const line = points(all("#rates path[stroke-opacity]")[0]);
    const names = all("input, summary, svg, table.map").map((node) => node.computedName);
    click("#arms label");
    return [dots, line, names, texts("#table tbody tr"), all("#rates circle").length];
    """
    dots, line, names, rows, fewer = browse(code, width)
    runs = STUDY["runs"]
    assert len(np.unique(dots, axis=0)) == len(dots) == len(runs)
    assert rows == ["".join(map(str, run)) for run in runs]
    arm, _, seed, _ = runs[0]
    assert fewer == sum(run[0] != arm for run in runs)
    of_one_seed = [dot for dot, run in zip(dots, runs) if run[0] == arm and run[2] == seed]
    np.testing.assert_allclose(line, of_one_seed, atol=0.06)
    assert len(names) > 30 and all(names)


def runs_block(source, note, arms):
    """The JSON of some arms of a study: arm, learning rate, seed and final loss of each run."""
    from study import runs  # needs scipy

    study = runs.load(ROOT / source)
    shown = [run for run in study.records if run.arm in arms]
    shown.sort(key=lambda run: (arms.index(run.arm), run.learning_rate, run.seed))
    assert not any(map(study.failure, shown)), "the page cannot show a run that failed"
    losses = [study.records[run]["summary"]["final_val_loss"] for run in shown]
    rows = [[*run, round(loss, 4)] for run, loss in zip(shown, losses)]
    ngrams = {n: round(loss, 4) for n, loss in study.ngrams.items()}
    block = {"source": source, "note": note, "arms": arms, "ngrams": ngrams, "runs": rows}
    return json.dumps(block).replace("[[", "[\n[").replace("], [", "],\n[") + "\n"


def test_the_runs_are_those_of_the_records():
    pytest.importorskip("scipy", reason="a study needs scipy")
    assert RUNS == runs_block(STUDY["source"], STUDY["note"], STUDY["arms"])


if __name__ == "__main__":
    _, source, note, *arms = sys.argv
    PATH.write_text(PAGE.replace(RUNS, runs_block(source, note, arms)), encoding="utf-8")
