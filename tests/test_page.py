"""study/page.html: it computes what model.py computes, works in a real browser, and shows the runs that were recorded.

PYTHONPATH=. python tests/test_page.py study/results/NAME "a note" puts another study's runs into the page.
"""

import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from model import GPT, QUERIES, GPTConfig
from study import redundancy

PAGE = ROOT / "study" / "page.html"
SWITCHES = ("skips", "norms", "tied", "shared")
CASES = [dict(zip(SWITCHES, on)) for on in product([False, True], repeat=4)]
BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge"
KEYS = {"Home": 36, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


class Browser:
    """A headless Chromium with one page, told what to do through a pipe."""

    def __init__(self, program, profile):
        (its_input, ours), (answers, its_output) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-gpu"]
        flags += ["--no-first-run", "--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        command = ["bash", "-c", f'exec "$@" 3<&{its_input} 4>&{its_output}', "bash", program, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(its_input, its_output), **quiet)
        os.close(its_input)
        os.close(its_output)
        self.ours, self.answers, self.read, self.number, self.session, self.events = ours, answers, b"", 0, {}, []

    def start(self):
        """Open a page that tells all that happens in it."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """Send a command -> its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.ours, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "result" in answer, answer
        return answer["result"]

    def receive(self):
        while b"\0" not in self.read:
            if not select.select([self.answers], [], [], 30)[0]:
                raise OSError("the browser is silent")
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise OSError("the browser has ended")
            self.read += more
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def js(self, expression):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, width, scheme="light", path=PAGE):
        self.events.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=path.as_uri())
        self.js("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.settle()

    def settle(self):
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def click(self, selector):
        box = f"document.querySelector({json.dumps(selector)})"
        self.js(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.js(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, selector, key, times=1):
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
        code, text = ("Space", {"text": " "}) if key == " " else (key, {})
        event = {"key": key, "code": code, "windowsVirtualKeyCode": KEYS[key]}
        for _ in range(times):
            self("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self("Input.dispatchKeyEvent", type="keyUp", **event)

    def end(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.ours)
        os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS.split())), None)
    if not program or not shutil.which("bash"):
        pytest.skip("needs a Chromium or Chrome on PATH (for the arithmetic alone, node is enough)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        found.start()
    except OSError as e:
        found.end()
        pytest.skip(f"{program} does not start: {e}")
    yield found
    found.end()


@pytest.fixture(scope="module")
def page(request):
    """A function that evaluates an expression with the page's arithmetic: in node, or else in the browser."""
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    node = shutil.which("node", path=here)
    if not node:
        browser = request.getfixturevalue("browser")
        browser.open(1280)
        return browser.js
    (script,) = re.findall(r'<script id="model">\n(.*?)</script>', read(), re.S)

    def evaluate(expression):
        text = f"{script}\nconsole.log(JSON.stringify({expression}));"
        done = subprocess.run([node, "-"], input=text, capture_output=True, encoding="utf-8", timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return evaluate


def read():
    return PAGE.read_text(encoding="utf-8")


def matrix(rows):
    return torch.as_tensor(rows, dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(matrix(a), b, rtol=0, atol=1e-12)


def test_the_page_is_one_small_file():
    text = read()
    assert len(text.encode()) < 60_000 and "default-src 'none'" in text  # with which a browser loads nothing more
    assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"\b(src|href|import|fetch)\b\s*[=(]", text)


# What it computes.


@torch.no_grad()
def test_the_queries_are_those_of_the_model(page):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 2 * x, -x, 1e-3 * x, 30 * x])
    points = torch.linspace(-7, 7, 281, dtype=torch.float64)
    settings = list(product([1, 2, 4, 8], ["gelu", "none"]))
    outputs = f"Object.values(QUERIES).map((query) => query({x.tolist()}, w))"
    cases = f"{json.dumps(settings)}.map((s) => query_weights(...s)).map((w) => [w, {outputs}])"
    found = page(f"[{points.tolist()}.map(erf), Object.keys(QUERIES), {cases}]")
    torch.testing.assert_close(matrix(found[0]), torch.erf(points), rtol=1e-15, atol=5e-16)
    assert found[1] == list(QUERIES)
    for (rank, activation), (weights, results) in zip(settings, found[2], strict=True):
        for mode, result in zip(QUERIES, results, strict=True):
            own = {"query_rank": rank, "query_activation": activation} if mode == "nonlinear" else {}
            query = QUERIES[mode](GPTConfig(n_embd=4, n_head=2, vocab_size=5, query_mode=mode, **own)).double()
            for name, parameter in query.named_parameters():
                if name.startswith("w_"):  # the gains stay 1
                    parameter.copy_(matrix(weights[name.split(".")[0].replace("w_q", "w_Q").replace("w", "W")]).T)
            same(result, query(x))


def gpt(weights, on, query_mode="linear"):
    """model.py's GPT with the page's weights. It has no MLPs there: here they pass x on, or add nothing to it."""
    shape = {"block_size": 5, "vocab_size": 5, "n_layer": 2, "n_head": 2, "n_embd": 4, "tie_weights": on["tied"]}
    model = GPT(GPTConfig(query_mode=query_mode, **shape)).double()
    for own, name in ((model.wte, "wte"), (model.wpe, "wpe"), (model.lm_head, "lm_head")):
        own.weight.copy_(matrix(weights[name]))
    for block, layer in zip(model.blocks, weights["layers"], strict=True):
        w = {name: matrix(value).T for name, value in layer.items()}
        if query_mode == "linear":
            block.attn.query.w_q.weight.copy_(w["W_Q"])
        else:  # q = x/2, so twice the keys
            torch.testing.assert_close(w["W_Q"], torch.eye(4).double(), rtol=0, atol=1e-12)
            w["W_K"] = 2 * w["W_K"]
        block.attn.key_value.weight.copy_(torch.cat([w["W_K"], w["W_V"]]))
        block.attn.c_proj.weight.copy_(w["W_O"])
        if on["skips"]:
            block.mlp.c_proj.weight.zero_()
        else:
            block.mlp, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
    return model


def run(model, idx, on):
    """-> the logits (T, V) and the attention patterns (layer, head, T, T)"""
    patterns = []

    def look(attention, inputs):
        q, k, _ = attention.heads(inputs[0])
        scores = q @ k.mT / attention.head_size**0.5
        patterns.append(scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)[0])

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    logits = redundancy.logits(model, idx, on["skips"], on["norms"])[0]
    for hook in hooks:
        hook.remove()
    if on["skips"] and on["norms"]:
        assert torch.equal(logits, model(idx)[0][0])
    return logits, torch.stack(patterns)


def is_exact(on):
    return not on["norms"] and (not on["skips"] or (on["shared"] and not on["tied"]))


@torch.no_grad()
def test_the_two_layers_are_those_of_the_model_wherever_the_slider_is(page):
    at = [0, 0.3, 0.75, 1]
    moved = f"{at}.map((t) => absorb(new_model(on), t, on)).map((m) => [m, GPT(m, on)])"
    found = page(f"[IDX, {json.dumps(CASES)}.map((on) => [new_model(on), GPT(new_model(on), on), {moved}])]")
    idx = torch.tensor([found[0]])
    for on, (weights, before, cases) in zip(CASES, found[1], strict=True):
        for layer in weights["layers"]:  # as the slider's path promises: x W_Q xᵀ > 0
            assert torch.linalg.eigvalsh(matrix(layer["W_Q"]) + matrix(layer["W_Q"]).T).min() > 0
        for t, (own, result) in zip(at, cases, strict=True):
            logits, patterns = run(gpt(own, on), idx, on)
            same(result["logits"], logits)
            same(result["patterns"], patterns)
            off = max((matrix(result[key]) - matrix(before[key])).abs().max() for key in ("logits", "patterns"))
            assert off < 1e-12 if is_exact(on) or t == 0 else off > 1e-2, (on, t)
        same(result["logits"], run(gpt(own, on, "identity"), idx, on)[0])  # at the end no query has a weight
    on = {"skips": True, "norms": False, "tied": False, "shared": True}
    weights, before, _ = found[1][CASES.index(on)]
    ones = [{**layer, "W_Q": torch.eye(4)} for layer in weights["layers"]]
    identity = gpt({**weights, "layers": ones}, on, "identity")
    redundancy.absorb(gpt(weights, on), identity)
    same(before["logits"], run(identity, idx, on)[0])


# What a reader sees.


@pytest.fixture(params=[(360, "light"), (1280, "dark")], ids=["phone", "desktop"])
def opened(request, browser):
    """The browser with the page just opened; afterwards, what must hold of it whatever was done."""
    width, scheme = request.param
    browser.open(width, scheme)
    assert browser.js("innerWidth") == width and browser.js(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
    yield browser
    assert browser.js("document.documentElement.scrollWidth") <= width, "wider than the screen"
    told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in told]
    asked = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in asked] == [PAGE.as_uri()]


def texts(browser, selector):
    return browser.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def test_the_slider_and_each_switch_show_the_true_difference(opened):
    def table(name):
        return texts(opened, f"[aria-label='{name}'] tbody td")

    def told():
        return float(texts(opened, "#off")[0]), texts(opened, "#why")[0]

    identity = [f"{float(i == j):.1f}" for i in range(4) for j in range(4)]
    (number, words), output = told(), table("Logits of the next word")
    assert 0 < number < 1e-12 and words.startswith("Exact") and len(output) == 5 * 5
    assert table("W_Q of layer 1") == table("W_Q of layer 2") == identity
    opened.press("#t", "Home")
    assert told() == (0, words) and table("W_Q of layer 1") != identity
    opened.press("#t", "End")
    opened.press("#t", "ArrowLeft", 20)
    assert table("W_Q of layer 1") != identity and table("Logits of the next word") == output
    on = dict.fromkeys(SWITCHES, False)
    for step in range(1, 17):  # all sixteen settings, one switch at a time
        name = SWITCHES[min(3, (step & -step).bit_length() - 1)]
        on[name] = not on[name]
        if step % 4 in (1, 2):
            opened.click(f"label:has(#{name})")
        else:
            opened.press(f"#{name}", " ")
        computed = "[GPT(new_model(on), on), GPT(absorb(new_model(on), 0.8, on), on)]"
        before, now = opened.js(f"((on) => {computed})({json.dumps(on)})")
        off = max((matrix(before[key]) - matrix(now[key])).abs().max().item() for key in before)
        number, words = told()
        assert number == pytest.approx(off, rel=0.06) and (off < 1e-12) == is_exact(on), on
        assert words.startswith("Not exact") != is_exact(on), on
        headings = [heading for heading in texts(opened, "h4") if heading.startswith(("Attention", "Logits"))]
        assert len(headings) == 3 and all(line.endswith("unchanged") for line in headings) == is_exact(on), on
    assert not any(on.values())


def bend(browser, query):
    """How far the images of the plane's straight lines are from straight, in pixels."""
    drawn, worst = browser.js(f"[...document.querySelectorAll('#{query} path')].map((p) => p.getAttribute('d'))"), 0.0
    lines = [matrix([[float(v) for v in point.split(",")] for point in re.split("[ML]", d)[1:]]) for d in drawn]
    lines = [line for line in lines if len(line) > 50]
    assert len(lines) == 17
    for line in lines:
        x, y = (line[-1] - line[0]) / (line[-1] - line[0]).norm()
        worst = max(worst, ((line - line[0]) @ torch.stack([-y, x])).abs().max().item())
    return worst


def test_only_the_nonlinear_query_bends_lines(opened):
    def check(words):
        assert bend(opened, "linear") < 0.2 and bend(opened, "identity") < 0.2 and bend(opened, "nonlinear") > 5
        assert words in texts(opened, "#bent")[0] and "q(2x) is 0 %" not in texts(opened, "#bent")[0]
        return opened.js("document.getElementById('nonlinear').innerHTML + document.getElementById('line').innerHTML")

    drawings = [check("because of the GELU.")]
    opened.press("#angle", "ArrowRight", 3)
    drawings.append(check("because of the GELU."))
    opened.click("#ranks label:nth-of-type(4)")
    drawings.append(check("because of the GELU."))
    opened.press("#gelu", " ")
    drawings.append(check("q(−x) is −q(x), because without the GELU"))
    assert len(set(drawings)) == 4


def test_each_run_is_a_dot_and_each_control_has_a_name(opened):
    def dots(of=""):
        return opened.js(f"document.querySelectorAll(`#rates circle{of}`).length")

    runs = json.loads(block_of(read())[1])["runs"]
    assert dots() == len(texts(opened, "#table tbody tr")) == len(runs)
    assert dots("[fill='var(--card)']") == sum(run[4] for run in runs)
    line = opened.js("document.querySelector('#rates path[stroke-opacity]').getAttribute('d')")
    places = opened.js(
        "[...document.querySelectorAll('#rates circle')].map(({cx, cy}) => [cx, cy].map((v) => v.baseVal.value))"
    )
    of_one_seed = [place for place, run in zip(places, runs) if run[0] == runs[0][0] and run[2] == 1]
    joined = [[float(v) for v in point.split(",")] for point in re.split("[ML]", line)[1:]]
    assert np.allclose(joined, of_one_seed, atol=0.06) and len(joined) > 2
    opened.click("#arms label")
    assert dots() == sum(run[0] != runs[0][0] for run in runs)
    nodes = opened("Accessibility.getFullAXTree")["nodes"]
    nodes = [node for node in nodes if node["role"]["value"] in ("slider", "checkbox", "radio", "table", "image")]
    assert len(nodes) > 30 and all(node["name"]["value"] for node in nodes)


def test_runs_that_failed_are_hollow_and_in_the_picture(browser):
    before, block, after = block_of(read())
    runs = [["linear", 0.004, 1, 1.33, False], ["linear", 0.008, 1, 1.35, False], ["a_new_one", 0.004, 1, 1.32, False]]
    runs += [["a_new_one", 0.016, 1, None, True], ["a_new_one", 0.016, 2, 2.1, True]]
    Path("page.html").write_text(before + json.dumps({**json.loads(block), "runs": runs}) + after, encoding="utf-8")
    browser.open(360, path=Path("page.html").resolve())
    dots = "[...document.querySelectorAll('#rates circle')]"
    hollow = browser.js(f"{dots}.map((dot) => dot.getAttribute('fill') === 'var(--card)')")
    assert hollow == [run[4] for run in runs]
    places = browser.js(f"{dots}.map((dot) => [dot.cx.baseVal.value, dot.cy.baseVal.value])")
    size = "(({clientWidth, clientHeight}) => [clientWidth, clientHeight])(document.getElementById('rates'))"
    width, height = browser.js(size)
    assert len(set(map(tuple, places))) == len(runs)
    assert all(5 < x < width - 5 and 5 < y < height - 5 for x, y in places)
    assert texts(browser, "#told")[0].startswith("2 of the 5 runs never learned; ")
    assert texts(browser, "#table tbody tr")[-2:] == ["a_new_one0.0161diverged", "a_new_one0.01622.1, never learned"]


# The runs that it shows.


def block_of(text):
    """-> what is before the records, the records, what is after them"""
    return re.fullmatch(r'(.*<script type="application/json" id="runs">\n)(.*?)(</script>.*)', text, re.S).groups()


def runs_block(source, note):
    """What the page holds of a study: its runs, and whether they failed."""
    from study import runs  # needs scipy

    study, rows = runs.load(ROOT / source), []
    arms = list(study.arms)
    for run in sorted(study.records, key=lambda run: (arms.index(run.arm), run.learning_rate, run.seed)):
        summary = study.records[run]["summary"]
        rows.append([*run, summary and round(summary["final_val_loss"], 4), bool(study.failure(run))])
    (steps,) = {record["config"]["settings"]["max_iters"] for record in study.records.values()}
    ngrams = {n: round(loss, 4) for n, loss in study.ngrams.items()}
    head = {"source": source, "steps": steps, "note": note, "ngrams": ngrams}
    return json.dumps(head)[:-1] + ', "runs": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"


def test_the_runs_are_those_of_the_records():
    pytest.importorskip("scipy", reason="a study needs scipy")
    text = block_of(read())[1]
    told = json.loads(text)
    assert told["runs"] and text == runs_block(told["source"], told["note"])


if __name__ == "__main__":
    before, _, after = block_of(read())
    PAGE.write_text(before + runs_block(*sys.argv[1:]) + after, encoding="utf-8")
