"""The microscope page in a browser: its numbers are those of glasslm.load(RUN)."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("playwright")

from browser_page import PageDriver, open_page, running_browser
from server_process import ServerProcess, serving

import glasslm
from glasslm.inference.sampling import Sampling, log_probabilities, probabilities
from glasslm.inference.trained_model import Model
from small_runs import train, write_text

TEXT = "the cat sees a dog.\nthe old"
FLAGS: dict[str, Any] = {
    "max_steps": 40, "sample_interval": 0, "checkpoint_interval": 20, "eval_interval": 20
}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
MAX_PAGE_BYTES, MAX_SENT_BYTES = 250 << 10, 92_750  # of all files, and of them compressed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return train(write_text(folder / "text.txt"), folder / "run", **FLAGS).run_dir


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    with serving(run) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return glasslm.load(run)


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[PageDriver]:
    with open_page(browser, server.url, accept_downloads=True) as page:
        yield page


def set_text(page: PageDriver, text: str) -> None:
    """Type a text as a person does."""
    page.page.keyboard.press("/")
    page.page.locator("dialog textarea").fill(text)
    page.page.wait_for_function("() => !document.querySelector('dialog .main').disabled")
    page.page.keyboard.press("Control+Enter")
    page.page.wait_for_function("() => !document.querySelector('dialog').open")
    page.wait()


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_typing_reading_and_writing(page: PageDriver, model: Model, tmp_path: Path) -> None:
    page.open()
    set_text(page, TEXT)
    page.page.keyboard.press("2")  # opens Read
    page.wait()
    losses = model.losses(TEXT)
    said = re.findall(r"\d+\.\d+", page.sentence("read"))
    np.testing.assert_allclose(float(said[0]), losses.mean(), atol=0.006)
    np.testing.assert_allclose(float(said[1]), losses.mean() / np.log(2), atol=0.006)
    page.page.locator("#read header p", has_text="5-gram").wait_for()
    ngram = read_table(page.save("CSV", tmp_path, "read")[0])
    mean = np.mean([float(row["5-gram, nats"]) for row in ngram])
    said = re.findall(r"\d+\.\d+", page.sentence("read"))
    np.testing.assert_allclose(float(said[2]), mean, atol=0.006)

    t = int(page.text(".crumb.after b").split()[0])
    ids = model.tokenizer.encode(TEXT)
    logits = model.inspect(TEXT, ["logits"])["logits"]
    logprobs = log_probabilities(logits[t])
    best = model.tokenizer.decode([int(logprobs.argmax())])
    shown = {" ": "·", "\n": "↵"}.get(best, best)
    assert page.sentence("write").startswith(f"It expects “{shown}”")
    value, python = page.choose_number("#write header .n")
    np.testing.assert_allclose(float(value), np.exp(logprobs.max()), atol=6e-5)
    np.testing.assert_allclose(evaluate(python), float(value), atol=6e-5)

    page.page.keyboard.press("ArrowLeft")
    page.wait()
    assert int(page.text(".crumb.after b").split()[0]) == t - 1
    assert page.state()["t"] == str(t - 1)
    surprise = page.text(".rail .facts dd:nth-of-type(2)").split()[0]
    np.testing.assert_allclose(float(surprise), losses[t - 1], atol=0.006)
    assert len(ids) == page.page.locator(".tok").count()
    page.require_silence()


def evaluate(python: str) -> float:
    """The value of the last line."""
    *before, last = python.strip().splitlines()
    names: dict[str, Any] = {"glasslm": glasslm, "np": np}
    exec("\n".join(before), names)
    return float(eval(last, names))


def test_a_view_without_numbers_is_named_and_the_others_are_saved(
    page: PageDriver, tmp_path: Path
) -> None:
    """At the last character nothing follows, so there is no gradient."""
    page.open("open=read,backward")
    page.page.locator(".tok").last.click()
    page.wait()
    page.page.keyboard.press("s")
    page.page.locator("dialog dt button", has_text="CSV").click()
    page.page.wait_for_function(
        "() => /^Saved as [^,]*-read\\.csv\\. Backward has no numbers: ./.test("
        "document.querySelector('dialog p').textContent)"
    )
    page.page.wait_for_timeout(200)
    assert [file.suggested_filename.rpartition("-")[2] for file in page.downloads] == ["read.csv"]
    page.downloads.clear()
    page.page.locator("dialog select").select_option("backward")
    page.page.locator("dialog dt button", has_text="CSV").click()
    page.page.wait_for_function(
        "() => /^Backward has no numbers: ./.test(document.querySelector('dialog p').textContent)"
    )
    assert not page.downloads


def test_the_saved_tables_are_the_model(page: PageDriver, model: Model, tmp_path: Path) -> None:
    page.open("open=write,read,attention,lens,why&t=11&temperature=0.5&topK=4")
    set_text(page, TEXT)
    page.page.locator(".tok").nth(11).click()
    page.wait()
    files = page.save("CSV", tmp_path)
    said = page.page.locator("dialog p").text_content()
    assert said == f"Saved as {', '.join(path.name for path in files)}"
    tables = {path.stem.rsplit("-", 1)[1]: read_table(path) for path in files}
    assert set(tables) == {"write", "read", "attention", "lens", "why"}

    losses = model.losses(TEXT)
    found = [float(row["surprise, nats"]) for row in tables["read"]]
    np.testing.assert_allclose(found, losses, atol=1e-4)

    logits = model.inspect(TEXT, ["logits"])["logits"]
    before = np.exp(log_probabilities(logits[11]))
    after = probabilities(logits[11], Sampling(temperature=0.5, top_k=4))
    for row in tables["write"]:
        token = int(row["token"])
        np.testing.assert_allclose(float(row["probability"]), before[token], atol=1e-5)
        np.testing.assert_allclose(float(row["with these settings"]), after[token], atol=1e-5)

    weights = model.inspect(TEXT, ["blocks.1.attention.weights"])["blocks.1.attention.weights"]
    row = next(row for row in tables["attention"] if row["head"] == "head 1.0")
    found = [float(row[name]) for name in list(row)[2:]]
    np.testing.assert_allclose(found, weights[0, 11, :12], atol=1e-5)

    last = [row for row in tables["lens"] if row["after"] == "blocks.1"]
    best = np.exp(log_probabilities(logits).max(-1))
    np.testing.assert_allclose([float(r["its probability"]) for r in last], best, atol=1e-4)

    *parts, logit_row = tables["why"]
    for name in list(logit_row)[1:]:
        total = sum(float(row[name]) for row in parts)
        np.testing.assert_allclose(total, float(logit_row[name]), atol=1e-4)
    assert "✓" in page.text("#why .proof")


GROWING_LIST = """async () => {
  const { el, morph } = await import("/page/dom.js");
  const box = el("div");
  const option = (i, n) => el("option", { value: String(i), selected: i === n - 1 }, i);
  const draw = (n) => morph(box, el("select", {}, [...Array(n).keys()].map((i) => option(i, n))));
  return [8, 9, 5].map((n) => (draw(n), box.firstChild.value));
}"""


def test_a_list_that_grows_keeps_what_is_chosen(page: PageDriver) -> None:
    """As that of the candidates of Why, from one position to the next."""
    page.page.goto(page.url)
    assert page.page.evaluate(GROWING_LIST) == ["7", "8", "4"]


def test_an_open_table_is_filled_again(page: PageDriver, model: Model) -> None:
    page.open("open=read&t=3")
    set_text(page, TEXT)
    page.page.locator("#read summary").click()
    cells = page.page.locator("#read tbody tr:nth-child(9) td:nth-child(3)")
    np.testing.assert_allclose(float(cells.inner_text()), model.losses(TEXT)[8], rtol=1e-3)
    page.page.locator(".tok").nth(8).click()
    page.wait()
    assert page.page.locator("#read tbody tr").count() == len(TEXT) - 1
    set_text(page, TEXT[::-1])
    expected = model.losses(TEXT[::-1])[8]
    np.testing.assert_allclose(float(cells.inner_text()), expected, rtol=1e-3)
    page.page.locator("#read summary").click()  # closes it
    page.page.locator(".tok").nth(3).click()
    page.wait()
    assert not page.page.locator("#read table").is_visible()


def test_only_what_can_still_be_drawn_is_counted(page: PageDriver, model: Model) -> None:
    for top_k in (1, 8, 0):
        page.open(f"open=write&t=3&temperature=1&topK={top_k}")
        shown = page.page.locator("#write .alt:not(.gone)").count()
        rest = (top_k or model.tokenizer.vocab_size) - shown
        assert f"{rest} other character" in page.text("#write .cap")


def test_the_list_of_runs_may_have_gaps_and_a_limit(page: PageDriver, model: Model) -> None:
    """A step whose loss was not finite has none; texts may be shorter than the context."""

    def change(route: Any) -> None:
        answer = route.fetch().json()
        [run] = answer["runs"]
        run["curve"][5][1], run["config"]["text_limit"] = None, 31
        curve.extend(run["curve"])
        route.fulfill(json=answer)

    curve = list[Any]()
    page.page.route("**/inside/runs", change)
    page.open("open=")
    points = page.page.locator("#when polyline").get_attribute("points").split()
    assert len(points) == len(curve) - 1
    page.page.keyboard.press("/")
    page.page.locator("#text-status", has_text="of at most 31").wait_for()


def test_a_text_waits_for_models_that_load(page: PageDriver) -> None:
    refusal = {"error": {"message": "the models are being loaded"}}
    texts = "**/inside/texts"
    page.page.route(texts, lambda route: route.fulfill(status=503, json=refusal), times=1)
    page.open("open=")
    assert page.page.locator(".tok").count() > 9


@pytest.mark.parametrize("status", [500, 401])
def test_why_there_are_no_runs_is_said(page: PageDriver, status: int) -> None:
    refusal = {"error": {"message": "this is why"}}
    runs = "**/inside/runs"
    page.page.route(runs, lambda route: route.fulfill(status=status, json=refusal))
    page.page.goto(page.url)
    page.page.locator("#notice", has_text="this is why").wait_for()
    if status == 401:
        page.page.locator("dialog input").press("Escape")
    page.page.unroute(runs)
    page.page.locator("#notice button", has_text="Try again").click()
    page.wait()
    assert page.page.locator("#notice").is_hidden()


def test_a_text_that_is_too_long_for_an_address_comes_back(page: PageDriver) -> None:
    page.open("open=write")
    set_text(page, "the cat sees a dog.\n" * 250 + TEXT)
    tokens = page.page.locator(".tok")
    before = tokens.all_inner_texts()
    assert "tokens are left out before the last" in page.text("#notice")
    page.page.locator("#write .alt .ch").first.click()
    page.wait()
    assert tokens.all_inner_texts() != before
    page.page.locator("#write .tool", has_text="back to the text before").click()
    page.page.locator("#write .tool", has_text="back to the text").wait_for(state="detached")
    page.wait()
    assert tokens.all_inner_texts() == before


def test_the_python_of_a_share_repeats_it(page: PageDriver, model: Model) -> None:
    t = 9
    page.open(f"open=why&t={t}")
    shares = {
        "tbody tr:nth-child(1) button": "embedding",
        "tbody tr:nth-child(3) td:nth-child(2) button": "blocks.1.attention.heads",
        "tbody tr:nth-child(3) td:nth-child(4) button": "blocks.1.feedforward",
    }
    for rival in ("", "nothing"):
        if rival:
            page.page.locator("#why .dials select").nth(1).select_option(label=rival)
            page.wait()
        for selector, name in shares.items():
            value, python = page.choose_number(f"#why .con {selector}")
            assert page.text(".where .name").startswith(name)
            np.testing.assert_allclose(evaluate(python), float(value), atol=6e-5)
            assert page.page.locator(".where .src .hot").count()
    # The last share is that of a logit alone: the feed-forward times the row of the token.
    text = re.search(r"^text = (.*)$", python, re.MULTILINE)
    token = re.search(r"np\.array\(\[(\d+)\]\)", python)
    assert text
    assert token
    names = ["blocks.1", "blocks.1.feedforward", "logits"]
    arrays = model.inspect(ast.literal_eval(text[1]), names)
    parameters = dict(model.engine.state())
    row = parameters["norm.weight"] * parameters["embedding.weight"][int(token[1])]
    scale = 1 / np.sqrt((arrays["blocks.1"][t] ** 2).mean() + model.config.model.norm_eps)
    np.testing.assert_allclose(
        arrays["blocks.1.feedforward"][t] @ row * scale, float(value), atol=6e-5
    )
    page.require_silence()


def test_a_drawing_has_all_labels_and_bars(page: PageDriver, tmp_path: Path) -> None:
    page.open("open=attention,why&t=9")
    page.page.wait_for_selector("#why svg")
    labels = page.page.locator("#attention .rows > *").all_inner_texts()
    values = page.page.locator("#why .con td button span").all_inner_texts()
    (path,) = page.save("SVG", tmp_path)
    svg = ElementTree.parse(path).getroot()
    texts = [(text.text or "").replace("\xa0", " ") for text in svg.iter(f"{SVG}text")]
    assert [label for label in labels if label and label not in texts] == []
    assert any(value.startswith("−") for value in values)
    colours = page.page.evaluate(
        "() => [...document.querySelectorAll('#why .con i')].filter((bar) => bar.offsetWidth > 0)"
        ".map((bar) => getComputedStyle(bar).backgroundColor)"
    )
    shapes = [rect.get("fill") for rect in svg.iter(f"{SVG}rect") if rect.get("height") == "9"]
    for colour in set(colours):
        assert shapes.count(colour) == colours.count(colour)
    assert len(set(colours)) == 2


def test_a_keyboard_alone_reaches_a_number_and_its_origin(page: PageDriver, model: Model) -> None:
    page.open("open=attention&t=9")
    page.page.keyboard.press("3")  # closes Attention, and its title has the focus
    page.page.keyboard.press("3")
    page.wait()
    for _ in range(12):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("() => document.activeElement.matches('#attention .cells')"):
            break
    page.page.keyboard.press("ArrowDown")
    page.page.keyboard.press("ArrowLeft")
    assert "head 0.1" in page.page.locator("#announcement").text_content()
    page.page.keyboard.press("Enter")
    page.wait()
    state = page.state()
    assert (state["n"], state["head"]) == ("attention.0.1.8", "0.1")
    page.page.wait_for_selector(".where .python")
    name = "blocks.0.attention.weights"
    text = page.page.evaluate("() => [...document.querySelectorAll('.tok')].length")
    assert text > 9
    value = float(page.text(".where .big"))
    np.testing.assert_allclose(evaluate(page.text(".where .python")), value, atol=6e-5)
    assert page.text(".where .name").startswith(name)
    assert "softmax" in page.text(".where") or "weights" in page.text(".where .src")
    assert page.page.evaluate("() => document.activeElement.matches('#attention .cells')")
    pattern = page.page.locator(".headcard .pattern").get_attribute("aria-label")
    assert pattern == (
        "Attention pattern of head 0.1; the table of Attention has the row of the caret"
    )


# The clock of the page advances by `step` ms whenever it is read, so a frame has time for one part.
POINT_DURING_A_CUT_DRAW = """async () => {
  const waiting = () => [...document.querySelectorAll("[data-waiting]")].map(({ id }) => id);
  const nextFrame = () => new Promise(requestAnimationFrame);
  const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
  let [time, step] = [performance.now(), 50];
  performance.now = () => (time += step);
  press("ArrowRight");
  await nextFrame();
  const ids = [waiting()];
  step = 0;
  const cells = document.querySelector("#attention .cells");
  const { left, bottom } = cells.getBoundingClientRect();
  const place = { clientX: left + 3, clientY: bottom - 3 };
  cells.dispatchEvent(new PointerEvent("pointermove", place));
  await nextFrame();
  await nextFrame(); // an answer that comes now puts the frame of the page after the first one
  ids.push(waiting());
  step = 50;
  press("ArrowLeft");
  return ids;
}"""


def test_a_pointer_does_not_stop_a_draw_of_several_frames(page: PageDriver) -> None:
    page.open("open=attention,lens&t=9")
    page.page.keyboard.press("ArrowLeft")
    page.wait()  # the answers of both places are kept
    cut, finished = page.page.evaluate(POINT_DURING_A_CUT_DRAW)
    assert {"lane", "rail", "lens-figure"} <= set(cut)  # the ruler was drawn first
    assert finished == []
    page.wait()  # draws all, although no frame has time for more than one part
    assert page.text(".crumb.after b").startswith("8")


KEY_IN_A_CLOSED_DIALOG = """() => {
  const press = (at) => at.dispatchEvent(new KeyboardEvent("keydown", {key: "s", bubbles: true}));
  const dialog = document.querySelector("dialog");
  const states = [];
  press(document.body);
  const select = dialog.querySelector("select");
  press(select);
  states.push(dialog.open && select.isConnected);
  dialog.close();
  press(select);
  states.push(dialog.open);
  dialog.close();
  return states;
}"""


def test_a_key_right_after_a_dialog_is_not_lost(page: PageDriver) -> None:
    """The focus is still in the dialog until the next frame."""
    page.open("open=lens&t=9")
    assert page.page.evaluate(KEY_IN_A_CLOSED_DIALOG) == [True, True]


CLOSE_DURING_A_CUT_DRAW = """async () => {
  const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
  let time = performance.now();
  performance.now = () => (time += 50);
  press("ArrowRight");
  await new Promise(requestAnimationFrame);
  const isWaiting = document.querySelector("#lens .inner").matches("[data-waiting]");
  press("4");
  return isWaiting;
}"""


def test_a_view_that_is_closed_during_a_draw_waits_for_nothing(page: PageDriver) -> None:
    page.open("open=attention,lens&t=9")
    page.page.keyboard.press("ArrowLeft")
    page.wait()  # the answers of both places are kept
    assert page.page.evaluate(CLOSE_DURING_A_CUT_DRAW)
    page.wait()
    assert page.page.locator("#lens .inner").is_hidden()


def test_a_checkpoint_that_is_missing_for_a_moment_is_asked_for_again(page: PageDriver) -> None:
    """As while it is saved again; the list of checkpoints, which may be another, too."""
    refusal = {"error": {"message": "it is missing", "code": "unknown_checkpoint"}}
    page.page.route(
        "**/inside/read/**", lambda route: route.fulfill(status=404, json=refusal), times=1
    )
    page.open("open=read&t=9")
    assert page.page.locator(".empty").count() == 0
    assert sum(url.endswith("/inside/runs") for url in page.requests) > 1


@pytest.mark.slow
def test_the_saved_page_opens_offline(page: PageDriver, browser: Any, tmp_path: Path) -> None:
    page.open("open=attention,why&t=9&head=1.1")
    _, python = page.choose_number("#attention header .n")
    sentence, row = page.sentence("attention"), page.text(".crumb.head b")
    (path,) = page.save("HTML", tmp_path)
    with open_page(browser, path.as_uri(), offline=True) as saved:
        saved.page.goto(saved.url)
        saved.wait()
        assert saved.sentence("attention") == sentence
        assert saved.text(".where .python") == python
        assert saved.text(".crumb.head b") == row
        assert "1 of 3 checkpoints is in this file" in saved.page.locator("#when").text_content()
        saved.page.keyboard.press("ArrowLeft")
        saved.wait()
        assert saved.sentence("attention") != sentence
        assert "✓" in saved.text("#why .proof")
        saved.require_silence()


def test_what_the_server_sends(server: ServerProcess) -> None:
    response = server.client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    total, sent, waiting, files = 0, 0, ["/page/main.js", "/page/style.css"], set[str]()
    while waiting:
        path = waiting.pop()
        if path in files:
            continue
        files.add(path)
        response = server.client.get(path)
        assert response.status_code == 200, path
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-encoding"] == "gzip"
        total += len(response.content)
        sent += response.num_bytes_downloaded
        for name in re.findall(r'(?:from|import) "(\.[^"]+)"', response.text):
            waiting.append(str(response.url.join(name).path))
    assert total + len(server.client.get("/").content) <= MAX_PAGE_BYTES
    assert sent <= MAX_SENT_BYTES
    plain = server.client.get("/page/main.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == server.client.get("/page/main.js").content
    etag = server.client.get("/page/main.js").headers["etag"]
    again = server.client.get("/page/main.js", headers={"If-None-Match": etag})
    assert again.status_code == 304
    assert server.client.get("/page/nothing.js").status_code == 404
    assert server.client.get("/page/../access.py").status_code == 404
