"""The views Patch, Backward and Learning in a browser, against glasslm.load(RUN) and real steps."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")
pytest.importorskip("playwright")

from browser_page import PageDriver, open_page, running_browser
from server_process import ServerProcess, make_run, serving

import glasslm
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.inference.sampling import log_probabilities
from glasslm.inference.trained_model import Model
from glasslm.serve.inside.binary import encode_arrays
from small_runs import train, write_text

TEXT = "the cat sees a dog.\nthe old"
OTHER = "the dog sees a cat.\nthe old"
T = 21  # the caret stands after the second "t"
FLAGS: dict[str, Any] = {
    "max_steps": 40, "sample_interval": 0, "checkpoint_interval": 10, "eval_interval": 20
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("effects")
    text = write_text(folder / "text.txt")
    tokenizer = ByteTokenizer(["<|end|>"])  # 256
    other = {"n_experts": 2, "shared_expert": True, "bias_targets": "head", "tie_embeddings": False}
    return [
        train(text, folder / "first", **FLAGS).run_dir,
        train(text, folder / "second", **FLAGS | {"seed": 7, "n_layers": 1}).run_dir,
        make_run(folder / "bytes", tokenizer, **other),
    ]


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[ServerProcess]:
    with serving(*runs) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[PageDriver]:
    with open_page(browser, server.url, accept_downloads=True) as page:
        yield page


@pytest.fixture(scope="module")
def model(runs: list[Path]) -> Model:
    return glasslm.load(runs[0], "latest")


def address(view: str, **fields: Any) -> str:
    words = {"open": view, "text": TEXT, "t": T} | fields
    return str(httpx_query(words))


def httpx_query(fields: dict[str, Any]) -> Any:
    import httpx

    return httpx.QueryParams(fields)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d*\.\d+", text)]


def evaluate(python: str) -> float:
    """The value of the last line."""
    *before, last = python.strip().splitlines()
    names: dict[str, Any] = {"glasslm": glasslm, "np": np}
    exec("\n".join(before), names)
    return float(eval(last, names))


def read_table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def loss_without(model: Model, name: str, index: Any) -> float:
    logits = model.inspect(TEXT, ["logits"], [(name, index, 0.0)])["logits"]
    return float(-log_probabilities(logits[T])[model.tokenizer.encode(TEXT)[T + 1]])


def test_a_head_that_is_clicked_is_switched_off(
    page: PageDriver, model: Model, tmp_path: Path
) -> None:
    page.open(address("patch"))
    before = model.losses(TEXT)[T]
    without = loss_without(model, "blocks.1.attention.heads", np.s_[:, :, 0])
    button = page.page.locator("#patch .switches tbody tr").nth(1).locator("td button").nth(0)
    np.testing.assert_allclose(numbers(page_text(button))[0], without - before, atol=0.006)
    button.click()
    page.wait()
    assert page.state()["off"] == "1.0"
    value, python = page.text(".where .big"), page.text(".where .python")
    np.testing.assert_allclose(numbers(value)[0], without - before, atol=6e-5)
    np.testing.assert_allclose(evaluate(python), without, atol=1e-5)
    next_token = page.text("#patch .compared:has(.hit) > :last-child")
    assert "→" in next_token
    # A second part is switched off with it, and the table has every part.
    page.page.locator("#patch .switches tbody tr").nth(0).locator("td button").last.click()
    page.wait()
    assert page.state()["off"] == "1.0,0.feedforward"
    edits = [
        ("blocks.1.attention.heads", np.s_[:, :, 0], 0.0),
        ("blocks.0.feedforward", np.s_[:], 0.0),
    ]
    logits = model.inspect(TEXT, ["logits"], edits)["logits"]
    both = -log_probabilities(logits[T])[model.tokenizer.encode(TEXT)[T + 1]]
    said = numbers(page.sentence("patch").replace("head 1.0", "head"))
    np.testing.assert_allclose(said, [before, both, both - before], atol=0.011)
    value, python = page.choose_number("#patch header .n:last-of-type")
    np.testing.assert_allclose(evaluate(python), both, atol=1e-5)
    table = read_table(page.save("CSV", tmp_path, "patch")[0])
    rows = {row[0]: float(row[1]) for row in table[1:] if row[0] != "nothing"}
    np.testing.assert_allclose(rows["head 1.0"], without - before, atol=1e-5)
    off = loss_without(model, "blocks.0.feedforward", np.s_[:])
    np.testing.assert_allclose(rows["feed-forward 0"], off - before, atol=1e-5)
    page.page.locator("#patch .framed", has_text="all on again").click()
    page.wait()
    assert "off" not in page.state()
    page.require_silence()


def page_text(locator: Any) -> str:
    return str(locator.inner_text()).replace("−", "-")


FOCUSED = "() => document.activeElement.getAttribute('aria-label') ?? ''"


@pytest.mark.parametrize(
    ("view", "key", "table", "cell", "number"),
    [
        ("why", "5", ".con", "head 1.0", "why.1-0"),
        ("patch", "6", ".switches", "without head 1.0", "patch.off.1-0"),
        ("backward", "7", ".switches", "gradient of blocks.1.attention.k", "backward.matrix."),
    ],
)
def test_a_table_of_numbers_is_one_tab_stop(
    page: PageDriver, view: str, key: str, table: str, cell: str, number: str
) -> None:
    page.open(address(view))
    keyboard = page.page.keyboard
    keyboard.press(key)  # closes the view
    keyboard.press(key)  # opens it, with the focus on its title
    page.wait()
    is_inside = f"() => document.activeElement.closest('#{view} {table}') !== null"
    for _ in range(12):
        keyboard.press("Tab")
        if page.page.evaluate(is_inside):
            break
    assert page.page.evaluate(is_inside)
    stops = f"#{view} {table} button"
    assert page.page.locator(stops).count() > 6
    assert page.page.locator(f"{stops}:not([tabindex='-1'])").count() == 1
    first_cell = ["ArrowUp"] * 4 + ["ArrowLeft"] * 12
    for arrow in [*first_cell, "ArrowRight", "ArrowDown"]:
        keyboard.press(arrow)
    assert cell in page.page.evaluate(FOCUSED)
    assert page.state()["t"] == str(T)  # the caret has not moved
    keyboard.press("Enter")
    page.wait()
    assert page.state()["n"].startswith(number)
    assert cell in page.page.evaluate(FOCUSED)
    keyboard.press("Tab")
    assert not page.page.evaluate(is_inside)
    keyboard.press("Shift+Tab")
    assert cell in page.page.evaluate(FOCUSED)
    page.require_silence()


@pytest.mark.slow
def test_neurons_can_be_switched_off(page: PageDriver, model: Model) -> None:
    page.open(address("patch"))
    page.page.wait_for_selector("#patch .chips [aria-pressed]")
    page.page.locator("#patch .chips [aria-pressed]").first.click()
    page.wait()
    match = re.fullmatch(r"0\.n(\d+)", page.state()["off"])
    assert match
    python = page.text(".where .python")
    name, neuron = "blocks.0.feedforward.activation", int(match[1])
    without = loss_without(model, name, np.s_[:, :, neuron])
    np.testing.assert_allclose(evaluate(python), without, atol=1e-5)
    before = model.losses(TEXT)[T]
    value = numbers(page.text(".where .big"))[0]
    np.testing.assert_allclose(value, without - before, atol=6e-5)
    assert f"neuron {neuron} of layer 0" in page.sentence("patch")
    said = numbers(page.sentence("patch"))
    np.testing.assert_allclose(said, [before, without, without - before], atol=0.011)


ANOTHER_NUMBER = """(before) => {
  const number = document.querySelector(".where .big")?.textContent.replace("\u2212", "-");
  return number?.endsWith("nats") && number !== before;
}"""


def test_a_second_text_is_copied_in(page: PageDriver, model: Model) -> None:
    page.open(address("patch"))
    field = page.page.locator("#patch .second textarea")
    assert field.input_value() == TEXT
    field.fill(OTHER)
    page.wait()
    page.page.wait_for_selector('[data-key="patch-copy"]')
    page.page.wait_for_timeout(400)
    # The keyboard walks to the place after layer 0 at position 17, which both texts have read.
    cells = page.page.locator('[data-key="patch-copy"] .cells')
    cells.focus()
    for key in ["ArrowDown", *["ArrowLeft"] * 4, "Enter"]:
        page.page.keyboard.press(key)
    page.wait()
    assert page.state()["n"] == f"patch.copy.1.{T - 4}"
    stream = model.inspect(OTHER, ["blocks.0"])["blocks.0"][T - 4]
    edits = [("blocks.0", np.s_[:, T - 4], stream)]
    logits = model.inspect(TEXT, ["logits"], edits)["logits"]
    after = -log_probabilities(logits[T])[model.tokenizer.encode(TEXT)[T + 1]]
    change = numbers(page.text(".where .big"))[0]
    np.testing.assert_allclose(change, after - model.losses(TEXT)[T], atol=6e-5)
    assert abs(change) > 1e-3
    np.testing.assert_allclose(evaluate(page.text(".where .python")), change, atol=6e-5)
    # Of a second text that is longer than the context, only the newest tokens are read.
    before = page.text(".where .big")
    field.fill(OTHER * 3)
    page.page.wait_for_function(ANOTHER_NUMBER, arg=before)
    page.wait()
    assert "49 tokens are left out before the last 32" in page.text("#patch .second .note")
    assert page.page.locator(".where .src").count() > 0
    assert page.page.locator(".where .python").count() == 0
    field.fill("the cat 7")
    page.page.locator("#patch .second .note", has_text="'7'").wait_for()
    assert all("400 (Bad Request)" in complaint for complaint in page.complaints)


def test_a_second_text_that_has_ended_is_said(page: PageDriver) -> None:
    page.page.set_viewport_size({"width": 360, "height": 800})
    page.open(address("patch", other="the dog"))
    assert "Nothing in sight can be copied." in page.text("#patch .empty")
    assert "The second text has 7 characters" in page.text("#patch .empty")
    page.require_silence()


def test_the_step_that_is_promised_is_one_really_made(
    page: PageDriver, model: Model, tmp_path: Path
) -> None:
    page.open(address("backward", lr=0.1))
    said = numbers(page.sentence("backward"))
    ids = model.tokenizer.encode(TEXT)
    targets = np.where(np.arange(len(ids)) == T, np.append(ids[1:], -1), -1)
    from glasslm.engines.protocol import Batch

    batch = Batch(ids[None], targets[None], 0, np.zeros(1, int))
    names = [name for name, spec in model.parameters.items() if spec.trained]
    arrays = model.engine.inspect(batch, [f"gradient/{name}" for name in names])
    stepped = {
        name: array - 0.1 * arrays[f"gradient/{name}"]
        for name, array in model.engine.state()
        if name in model.parameters
    }
    moved = glasslm.load(Path(page_run(page)), "latest")
    moved.engine.load(stepped.items())
    after = moved.losses(TEXT)
    np.testing.assert_allclose(said[1], model.losses(TEXT)[T], atol=0.006)
    np.testing.assert_allclose(said[2], after[T], atol=0.006)
    table = {row[0]: row[1:] for row in read_table(page.save("CSV", tmp_path, "backward")[0])}
    np.testing.assert_allclose([float(x) for x in table["loss after, nats"][1:]], after, atol=1e-4)
    for name in names:
        norm = np.linalg.norm(arrays[f"gradient/{name}"])
        np.testing.assert_allclose(float(table[name][0]), norm, rtol=1e-4, atol=1e-6)
    page.page.locator("#backward .switches td button").first.click()
    page.wait()  # the number before stands there until the lines of this one have come
    page.page.locator(".where .src", has_text="dw = np.matmul(dy.T, x").first.wait_for()
    value, python = numbers(page.text(".where .big"))[0], page.text(".where .python")
    np.testing.assert_allclose(evaluate(python), value, atol=1e-4)
    page.require_silence()


def test_a_step_that_is_too_long_is_said(page: PageDriver) -> None:
    page.open(address("backward", lr=1000))
    before, after = numbers(page.sentence("backward"))[:2]
    assert after > before
    norm = re.search(r"its norm is ([\d.]+)\)", page.sentence("backward"))
    assert norm
    assert float(norm[1]) > 1
    assert "would raise its loss" in page.sentence("backward")
    assert "try a smaller learning rate" in page.sentence("backward")


def page_run(page: PageDriver) -> str:
    """The path of the run, from the line of Python of any number."""
    page.page.locator("#backward header .n").first.click()
    page.page.wait_for_selector(".where .python")
    match = re.search(r"glasslm\.load\('([^']+)'", page.text(".where .python"))
    assert match
    return match[1]


@pytest.mark.parametrize(
    ("view", "button", "name"),
    [
        ("why", "the output’s bias", "logits"),
        ("backward", "gradient of blocks.0.feedforward.shared.up.weight", "gradient/blocks.0.feed"),
        ("backward", "gradient of blocks.0.feedforward.experts.*.up.weight", "gradient/blocks.0.f"),
    ],
)
def test_the_python_of_an_unusual_part_repeats_it(
    page: PageDriver, view: str, button: str, name: str
) -> None:
    page.open(address(view, run="bytes"))
    value, python = page.choose_number(f"#{view} td button[aria-label^='{button}']")
    assert page.text(".where .name").startswith(name)
    assert abs(numbers(value)[0]) > 1e-3
    np.testing.assert_allclose(evaluate(python), numbers(value)[0], atol=6e-5)
    page.require_silence()


@pytest.mark.parametrize(
    ("ids", "ngram", "said"),
    [
        ("97.98.256", [np.nan, 0.25, np.nan], "A 5-gram of bytes has 0.25 nats, and does better"),
        ("97.256", [np.nan, np.nan], ""),
    ],
)
def test_tokens_without_bytes_have_no_numbers_for_bytes(
    page: PageDriver, ids: str, ngram: list[float], said: str
) -> None:
    body = encode_arrays({"nats": np.array(ngram, np.float32)}, {"order": 5})
    page.page.route("**/inside/ngram/**", lambda route: route.fulfill(body=body))
    page.open(address("read", run="bytes", ids=ids, n="read.bits.", t=0))
    page.page.locator("#read figcaption", has_text="what followed the last 4 bytes").wait_for()
    bits = r", \d+\.\d+ bits per byte\. " if said else r"\."
    end = rf"{said} at [01] of 1 bytes\." if said else ""
    assert re.fullmatch(rf"\d+\.\d+ nats a byte here{bits}{end}", page.sentence("read"))
    assert page.page.locator(".where .big").count() == bool(said)
    page.require_silence()


NUMBERS_WITHOUT_VALUE = """async () => {
  const { fixed, signed, significant } = await import("/page/words.js");
  const values = [null, undefined, NaN, Infinity, -Infinity];
  return [fixed, signed, significant].map((write) => values.map((x) => write(x)).join(" "));
}"""

TEXT_OF_TOKENS = """async (ids) => {
  const { Texts } = await import("/page/texts.js");
  const [run, texts] = [{ name: "bytes" }, new Texts(() => {})];
  const text = await texts.post(run, { ids });
  return [text.text, texts.record(run, text)[1].whole];
}"""


def test_numbers_without_a_value_and_parts_of_a_character(page: PageDriver) -> None:
    page.page.goto(page.url)
    written = page.page.evaluate(NUMBERS_WITHOUT_VALUE)
    assert written == ["– – – ∞ −∞", "– – – +∞ −∞", "– – – ∞ −∞"]
    ids = list("naïve".encode())
    assert page.page.evaluate(TEXT_OF_TOKENS, ids) == ["naïve", "naïve"]


def test_the_end_of_the_text_has_no_gradient(page: PageDriver) -> None:
    page.open(address("backward", t=len(TEXT) - 1))
    assert "The text ends here" in page.text("#backward .empty")
    page.require_silence()


def test_two_runs_side_by_side(page: PageDriver, runs: list[Path], model: Model) -> None:
    page.open(address("learning"))
    options = page.page.locator("#learning .dials select option")
    labels = options.all_inner_texts()
    assert "second, step 40" in labels
    assert any("another tokenizer" in label for label in labels)
    page.page.locator("#learning .dials select").select_option("second@40")
    page.wait()
    rows = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in page.page.locator("#learning .sides tbody tr").all()
    }
    other = glasslm.load(runs[1], "latest")
    shown = [float(x) for x in rows["bits per byte of this text"]]
    expected = [each.evaluate(TEXT).bpb for each in (model, other)]
    np.testing.assert_allclose(shown, expected, atol=6e-4)
    surprise = next(cells for name, cells in rows.items() if name.startswith("surprise"))
    expected = [each.losses(TEXT)[T] for each in (model, other)]
    np.testing.assert_allclose([float(x) for x in surprise], expected, atol=0.006)
    assert page.page.locator('[data-key="learning-change"]').count() == 1
    page.require_silence()


@pytest.mark.slow
def test_the_slider_moves_through_the_checkpoints(page: PageDriver, runs: list[Path]) -> None:
    page.open(address("learning"))
    steps = []
    for key in ("", ",", ","):
        if key:
            page.page.keyboard.press(key)
            page.wait()
        steps.append(int(re.findall(r"step (\d+)", page.sentence("learning").lower())[0]))
        nats = float(page.text(".rail .facts dd:nth-of-type(2)").split()[0])
        expected = glasslm.load(runs[0], steps[-1]).losses(TEXT)[T]
        np.testing.assert_allclose(nats, expected, atol=0.006)
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) == 3


@pytest.mark.parametrize(
    ("width", "theme"),
    [
        (1280, "dark"),
        pytest.param(1280, "light", marks=pytest.mark.slow),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(360, "dark", marks=pytest.mark.slow),
    ],
)
def test_the_views_can_be_read_everywhere(page: PageDriver, width: int, theme: str) -> None:
    page.page.set_viewport_size({"width": width, "height": 800})
    views = "patch,backward,learning"
    page.open(address(views, theme=theme, off="0.1", other=OTHER, against="second@40"))
    page.page.wait_for_timeout(300)
    assert page.faults() == []
    assert page.page.evaluate("document.documentElement.scrollWidth") == width
    hidden = "(table) => table.scrollHeight - table.clientHeight"
    assert page.page.locator("#learning .sides").evaluate(hidden) <= 0
    page.require_silence()


def test_a_saved_file_holds_what_is_shown(page: PageDriver, browser: Any, tmp_path: Path) -> None:
    views = "patch,backward,learning"
    page.open(address(views, off="0.1", other=OTHER, against="second@40"))
    page.page.wait_for_timeout(500)
    page.wait()
    shown = {view: page.text(f"#{view} .inner") for view in views.split(",")}
    (path,) = page.save("HTML", tmp_path)
    assert page.page.locator("dialog p").text_content() == f"Saved as {path.name}"
    with open_page(browser, path.as_uri(), offline=True) as saved:
        saved.page.goto(saved.url)
        saved.wait()
        for view in ("patch", "backward"):
            assert saved.text(f"#{view} .inner") == shown[view]
        assert saved.page.locator('[data-key="patch-copy"]').count() == 1
        assert "second, step 40" in saved.text("#learning .sides")
        assert saved.page.locator("#learning svg").count() == 3
        saved.page.evaluate(
            "location.hash = JSON.parse(document.getElementById('recorded').textContent)['#']"
            ".replace('off=0.1', 'off=1.1')"
        )
        message = saved.page.locator("#patch .empty", has_text=f"saved at position {T}.")
        message.wait_for()
        assert "Patch was not saved: open the run with `glasslm look`." in message.inner_text()
        saved.require_silence()


def test_a_saved_file_lacks_the_answers_that_did_not_come(page: PageDriver, tmp_path: Path) -> None:
    lost = list[str]()

    def break_off(route: Any) -> None:
        lost.extend(route.request.post_data_json["addresses"])
        route.abort()

    page.page.route("**/inside/several", break_off, times=1)
    page.open(address("backward"))
    (path,) = page.save("HTML", tmp_path)
    message = page.page.locator("dialog p").text_content()
    assert message == f"Saved as {path.name}. {len(lost)} answers are not in this file"
    html = path.read_text(encoding="utf-8")
    record = json.loads(html.split('id="recorded">')[1].split("</script>")[0])
    assert len(lost) == 16
    assert record.keys().isdisjoint(lost)
    assert sum(name.startswith("/inside/backward/") for name in record) > 1  # of other requests
