"""The report in a browser, as users open it: headless Chromium, no network, healthy runs and others."""

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from grpo_ext import cli
from grpo_ext.report.bokeh_plots import DARK_COLOURS, format_number
from grpo_ext.report.page import MAX_PAGE_BYTES, escape_invisible, write_comparison, write_page
from grpo_ext.report.plot_data import PALETTE
from grpo_ext.report.run_files import choose_rows
from tests.tools.waiting import PATIENCE

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")) and os.environ.get("CI") != "true",
    reason="Chromium is missing: apt install chromium chromium-driver",
)

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<!--<script>",
    "{{ 7 * 7 }} ${document.title = 'owned'} &lt;b&gt;",
    "right \u202e tfel \u2066 isolated \u200b nothing \x00\x07 \ud800",
    "<svg onload=\"document.title = 'owned'\">",
    "https://example.org/" + "x" * 300,
    "\u0130\u0130 \U0001f469\u200d\U0001f52c 答案是 \u202b עברית",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def look(browser, path, width=1200, dark=False):
    """Open a page; returns warnings and errors of the console, and all requests except the one for the page itself."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("performance")
    browser.get_log("browser")
    url = path.resolve().as_uri()
    browser.get(url)
    drawn = "return [...document.querySelectorAll('.plot')].every(plot => plot.firstElementChild)"
    WebDriverWait(browser, PATIENCE).until(lambda browser: browser.execute_script(drawn))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    console_entries = [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"]
    return console_entries, [request for request in requests if request != url]


def answer(text, reward, **changes):
    return {
        "text": text,
        "rewards": {"math_answer_reward": reward, "format_reward": 0.5},
        "advantage": reward - 0.5,
        "tokens": len(text),
        "cut": False,
        "found": None,
        "extra": {},
    } | changes


def run_folder(folder, steps, texts, *, groups=2, evaluations=(0,), **settings):
    """Write the files of a run of `steps` steps; `texts` are the completions of every group."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(settings.get("seed", 0))
    metrics, rollouts, heldout = [], [], []
    for step in evaluations:
        right = [int(rng.random() < step / (2 * steps)) for _ in range(64)]
        first = {"prompt": "1+1=?", "gold": "2", "text": texts[step % len(texts)], "found": None, "right": bool(step)}
        heldout.append({"step": step, "right": right, "shares": [], "pass_at": {}, "kinds": {}, "answers": [first]})
        metrics.append({"step": step, "heldout/pass@1": 0.5, "heldout/pass@1/low": 0.4, "heldout/pass@1/high": 0.6})
    for step in range(1, steps + 1):
        shares = {"frac_groups/mixed": 0.5, "frac_groups/all_right": 0.25, "frac_groups/all_wrong": 0.25}
        times = {f"time/{phase}": rng.random() for phase in ("generate", "reward", "reference", "update")}
        row = {"step": step, "loss": rng.random(), "reward": step / steps, "kl_sequence": rng.random(), "entropy": 1.0}
        row |= {"rewards/math_answer_reward/mean": step / steps, "rewards/format_reward/mean": 0.1}
        row |= {"rewards/math_answer_reward/timeouts": 1.0, "completions/mean_length": 20.0 + rng.random()}
        row |= {"completions/min_length": 5.0, "completions/max_length": 48.0, "completions/clipped_ratio": 0.1}
        metrics.append(row | shares | times | {"grad_norm": 1.0, "advantages/mean": 0.0, "advantages/mean_abs": 0.7})
        rows = [
            {
                "prompt": f"Question {step}.{group}: {texts[0]}",
                "gold": "1016",
                "answers": [answer(text, i % 2) for i, text in enumerate(texts)],
            }
            for group in range(groups)
        ]
        rollouts.append({"step": step, "left_out": 0, "groups": rows})
    for name, lines in (("metrics", metrics), ("completions", rollouts), ("heldout", heldout)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = {"seed": 0, "learning_rate": 1e-3, "steps_per_generation": 2, "gradient_accumulation_steps": 4}
    run = {"command": "python recipes/math.py", "base_model": "a/b", "device": "CPU", "processes": 2, "steps": steps}
    run |= {"trainable_parameters": 10, "total_parameters": 100, "settings": arguments | settings, "changed": ["seed"]}
    run |= {"adapter": {"r": 16}, "versions": {"trl": "1.16.0"}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The page of a run with hostile completions."""
    return write_page(run_folder(tmp_path_factory.mktemp("runs") / "<b>run", 5, HOSTILE, evaluations=(0, 2, 5)))


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (380, True)])
def test_a_page_opens_without_errors_or_requests_and_fits_the_screen(browser, hostile, width, dark):
    """Nobody looks twice at a page that needs a network, logs errors, or scrolls sideways on a phone."""
    console_entries, requests = look(browser, hostile, width, dark)
    assert console_entries == []
    assert requests == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    sideways = (
        "[...document.querySelectorAll('main *')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)"
    )
    assert browser.execute_script(f"return {sideways}.map(e => e.outerHTML.slice(0, 200))") == []
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    luminance = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) / 3
    assert luminance < 60 if dark else luminance > 200
    titles = [caption.text for caption in browser.find_elements(By.TAG_NAME, "figcaption")]
    assert titles[:2] == ["Held-out problems solved", "Rewards for being right"]
    assert len(titles) == 13


def test_hostile_completions_are_text(browser, hostile):
    """A completion must neither run, nor end the page's own script, nor reverse the text around it."""
    console_entries, _ = look(browser, hostile)
    assert console_entries == []
    assert browser.title == "<b>run"
    shown = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "#answers pre")]
    assert shown[:4] == HOSTILE[:4]
    assert shown[4] == "right ⟨U+202E⟩ tfel ⟨U+2066⟩ isolated ⟨U+200B⟩ nothing ⟨U+0000⟩⟨U+0007⟩ ⟨U+D800⟩"
    assert browser.find_elements(By.CSS_SELECTOR, "main img, main script, main b > script, #answers svg") == []
    for text in (element.text for element in browser.find_elements(By.CSS_SELECTOR, "pre, option, td, h1")):
        assert not set(text) & set("\u202a\u202b\u202e\u2066\x00")


def test_no_other_script_can_run(browser, hostile):
    """The page's content security policy is a second line of defense: injected markup would do nothing."""
    broken = hostile.with_name("broken.html")
    broken.write_text(hostile.read_text().replace("<main>", "<main><script>document.title = 'owned'</script>"))
    console_entries, _ = look(browser, broken)
    assert browser.title == "<b>run"
    assert any("Content Security Policy" in entry["message"] for entry in console_entries)
    browser.execute_async_script("""
        const done = arguments[0], image = document.createElement("img");
        document.addEventListener("securitypolicyviolation", (event) => done(event.blockedURI));
        image.src = "http://127.0.0.1:9/";
        document.body.append(image);
    """)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    ends = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
    assert [end.get("blockedReason") for end in ends] == ["csp"]


def test_groups_by_keyboard(browser, hostile):
    """Step and prompt can be chosen by keyboard, and the completions shown are the recorded ones."""
    look(browser, hostile)
    step, prompt = browser.find_element(By.ID, "step"), browser.find_element(By.ID, "prompt")

    def there():
        return browser.find_element(By.ID, "step-name").text, browser.find_element(By.ID, "prompt-text").text[:13]

    assert there() == ("step 5", "Question 5.0:")
    step.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert there() == ("step 3", "Question 3.0:")
    prompt.send_keys(Keys.ARROW_DOWN)
    assert there() == ("step 3", "Question 3.1:")
    step.send_keys(Keys.HOME)
    assert there() == ("step 1", "Question 1.1:")
    cards = browser.find_elements(By.TAG_NAME, "article")
    assert len(cards) == len(HOSTILE)
    assert "advantage\n−0.5\nmath_answer_reward 0\nformat_reward 0.5" in cards[0].text
    assert "advantage\n+0.5\nmath_answer_reward 1" in cards[1].text
    assert browser.find_element(By.ID, "gold").text == "gold answer 1016"
    assert Select(prompt).first_selected_option.text.startswith("2: mean 1, … ")

    browser.execute_script("document.activeElement.blur()")  # every control can be reached by Tab
    reached = set()
    for _ in range(60):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert {"step", "prompt", "problem", "moment", "SUMMARY"} <= reached


# Bokeh draws inside shadow roots.
INSIDE = """
    const inside = (root) =>
        [...root.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? inside(e.shadowRoot) : [])]);
"""


def tooltip(browser):
    """The texts of the tooltips on screen."""
    script = """
        const tips = inside(document).filter((e) => e.matches(".bk-Tooltip") && e.getClientRects().length);
        const texts = (tip) => inside(tip.shadowRoot).filter((e) => !e.children.length && !e.matches("style"));
        return tips.map((tip) => texts(tip).map((e) => e.textContent).join(" "));
    """
    return [" ".join(text.split()) for text in browser.execute_script(INSIDE + script)]


def colours(browser, figure):
    """The colours that a figure is drawn with, as `#rrggbb`."""
    script = """
        const found = new Set(), hex = (n) => n.toString(16).padStart(2, "0");
        for (const canvas of inside(arguments[0]).filter((e) => e.tagName === "CANVAS" && e.width)) {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < pixels.length; i += 4)
                if (pixels[i + 3] === 255) found.add(`#${hex(pixels[i])}${hex(pixels[i + 1])}${hex(pixels[i + 2])}`);
        }
        return [...found];
    """
    return {colour.upper() for colour in browser.execute_script(INSIDE + script, figure)}


def figure_of(browser, title):
    return next(f for f in browser.find_elements(By.TAG_NAME, "figure") if f.text.startswith(title))


def test_values_by_keyboard(browser, hostile):
    """A panel shows the last value logged up to the chosen step, with its interval."""
    look(browser, hostile)
    values = figure_of(browser, "Mean raw reward").find_element(By.CLASS_NAME, "values")
    moment = browser.find_element(By.ID, "moment")
    assert (browser.find_element(By.ID, "moment-name").text, values.text) == ("step 5", "1")
    moment.send_keys(Keys.ARROW_LEFT)
    assert values.text == "0.8"
    assert figure_of(browser, "Held-out").find_element(By.CLASS_NAME, "values").text == "0.5 [0.4, 0.6]"  # of step 2
    moment.send_keys(Keys.HOME)
    assert (browser.find_element(By.ID, "moment-name").text, values.text) == ("step 0", "")


@pytest.mark.parametrize("width", [1200, 360])
def test_values_under_the_pointer(browser, hostile, width):
    """A tooltip shows the values of the nearest step, stays inside the screen, and goes when the pointer leaves."""
    look(browser, hostile, width)
    figure = figure_of(browser, "Length of completions")
    plot = figure.find_element(By.CLASS_NAME, "plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    script = "return Bokeh.index.roots.find((view) => arguments[0].contains(view.el)).frame.bbox"
    left, right = (browser.execute_script(f"{script}.{side}", plot) for side in ("left", "right"))
    lengths = browser.execute_script("return data.panels.find((p) => p.title.startsWith('Length')).values[0]")
    for across, step in ((0.02, 1), (0.5, 3), (0.98, 5)):
        x = left + across * (right - left) - plot.size["width"] / 2
        ActionChains(browser).move_to_element_with_offset(plot, round(x), 0).perform()
        length = f"mean, shortest to longest: {lengths[step - 1]}"
        WebDriverWait(browser, PATIENCE).until(
            lambda b, words=f"step: {step} {length} cut off: 0.1": tooltip(b) == [words]
        )
        box = "const tip = inside(document).find((e) => e.matches('.bk-Tooltip')).getBoundingClientRect();"
        low, high = browser.execute_script(f"{INSIDE} {box} return [tip.left, tip.right]")
        assert 0 <= low < high <= width
    ActionChains(browser).move_to_element(figure.find_element(By.TAG_NAME, "figcaption")).perform()
    WebDriverWait(browser, PATIENCE).until_not(tooltip)


def test_curves_in_the_dark(browser, hostile):
    """The lines are the same, in colours for a dark background. A change of the setting redraws the page."""
    look(browser, hostile)
    light = colours(browser, figure_of(browser, "Mean raw reward"))
    assert PALETTE["blue"] in light
    scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    WebDriverWait(browser, PATIENCE).until(
        lambda b: DARK_COLOURS[PALETTE["blue"]].upper() in colours(b, figure_of(b, "Mean raw"))
    )
    assert PALETTE["blue"] not in colours(browser, figure_of(browser, "Mean raw reward"))


def test_the_same_problems_over_time(browser, hostile):
    look(browser, hostile)
    lines = [item.text.split("\n")[0] for item in browser.find_elements(By.CSS_SELECTOR, "#timeline li")]
    assert lines == ["step 0 ✗ wrong", "step 2 ✓ right", "step 5 ✓ right"]
    assert browser.find_element(By.ID, "verdict").text.startswith("It learned: from 0% to ")
    reliability = next(r.text for r in browser.find_elements(By.TAG_NAME, "tr") if "time limit" in r.text)
    assert reliability.endswith(" 20")  # one per step, rollout and process; two rollouts per step, two processes


def test_a_run_of_a_thousand_steps_fits(browser, tmp_path):
    """16 prompts x 8 completions per step are 128,000 completions. The page has all of the newest and every k-th older
    one."""
    rng = random.Random(0)
    texts = ["".join(rng.choice("0123456789+= <'é") for _ in range(250)) for _ in range(8)]
    folder = run_folder(tmp_path / "long", 1000, texts, groups=16, evaluations=range(0, 1001, 10))
    page = write_page(folder)
    assert 1_000_000 < page.stat().st_size < MAX_PAGE_BYTES
    console_entries, _ = look(browser, page)
    assert console_entries == []
    steps = browser.execute_script("return data.rollouts.map(r => r.step)")
    assert steps[0] == 1
    assert steps[-10:] == list(range(991, 1001))
    assert len({b - a for a, b in pairwise(steps[:-10])}) == 1
    assert f"every {steps[1] - steps[0]}th is in this page" in browser.find_element(By.ID, "groups").text
    assert browser.execute_script("return document.querySelectorAll('*').length") < 5000  # so that it scrolls smoothly


def test_a_page_of_the_worst_texts_still_fits(tmp_path):
    """Each `<` becomes six bytes in the page."""
    page = write_page(run_folder(tmp_path / "worst", 40, ["<" * 2000] * 16, groups=16))
    assert page.stat().st_size < MAX_PAGE_BYTES


def test_which_lines_are_kept():
    assert choose_rows([10] * 5, 100) == ([0, 1, 2, 3, 4], 1)
    assert choose_rows([1] * 32, 16) == ([0, 4, 8, 12, 16, 20, *range(22, 32)], 4)
    assert choose_rows([9] * 12, 30)[0] == [9, 10, 11]
    assert choose_rows([100, 100], 5)[0] == [1]
    assert choose_rows([], 5) == ([], 1)


def test_a_run_that_is_unfinished_or_was_killed(browser, tmp_path):
    """With half a line at the end of each file, no settings, and no second evaluation, the page shows what there is."""
    folder = run_folder(tmp_path / "half", 3, ["a", "b"])
    (folder / "run.json").unlink()
    for name in ("metrics", "completions", "heldout"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 4, "grou')
    console_entries, _ = look(browser, write_page(folder))
    assert console_entries == []
    assert "Before training: 0% of 64 held-out problems" in browser.find_element(By.ID, "verdict").text
    assert browser.find_element(By.ID, "step-name").text == "step 3"

    (folder / "heldout.jsonl").unlink()
    (folder / "completions.jsonl").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "loss": null}\n')
    console_entries, _ = look(browser, write_page(folder))
    assert console_entries == []
    assert "Nothing was held out" in browser.find_element(By.ID, "verdict").text
    assert [caption.text for caption in browser.find_elements(By.TAG_NAME, "figcaption")] == ["Mean raw reward"]


def test_several_runs_over_each_other(browser, tmp_path):
    """Each panel has one line per run, and a table lists the settings that differ."""
    folders = [
        run_folder(tmp_path / name, 4, ["a", "b"], evaluations=(0, 4), seed=seed, learning_rate=rate)
        for name, seed, rate in (("one", 0, 1e-3), ("two", 1, 1e-3), ("<i>three", 2, 1e-4))
    ]
    page = write_comparison(folders, tmp_path / "comparison.html")
    for width in (1200, 380):
        console_entries, requests = look(browser, page, width)
        assert (console_entries, requests) == ([], [])
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figure = browser.find_element(By.TAG_NAME, "figure")
    assert "Held-out problems solved (greedy)" in figure.text
    assert all(name in figure.text for name in ("one", "two", "<i>three"))
    assert len(figure.find_elements(By.CSS_SELECTOR, ".values li")) == 3
    look(browser, page)
    assert {PALETTE[name] for name in ("blue", "orange", "green")} <= colours(browser, figure_of(browser, "Total"))
    rows = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")]
        for row in browser.find_elements(By.CSS_SELECTOR, "section:nth-of-type(2) tr")
    ]
    assert rows == [
        ["setting", "one", "two", "<i>three"],
        ["seed", "0", "1", "2"],
        ["learning_rate", "0.001", "0.001", "0.0001"],
    ]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = (str(run_folder(tmp_path / name, 3, ["a"])) for name in ("one", "two"))
    cli.main(["report", one])
    assert Path(one, "report.html").exists()
    assert Path(one, "curves.png").exists()
    cli.main(["report", one, two])
    assert "the comparison is in comparison.html" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"has no metrics\.jsonl with a logged step"):
        cli.main(["report", str(tmp_path / "empty")])


def test_invisible_characters_are_escaped():
    assert escape_invisible({"\u202ea": ["x\n\ty", 1, None, True]}) == {"⟨U+202E⟩a": ["x\n\ty", 1, None, True]}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (-0.5164, "-0.516"),
        (1.2e-5, "1.2e-05"),
        (3, "3"),
        (12.34, "12.3"),
        (100, "100"),
        (999.6, "1,000"),
        (123456.7, "123,457"),
    ],
)
def test_numbers_are_shown_in_a_few_digits(number, text):
    assert format_number(number) == text
