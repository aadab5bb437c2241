"""The data of the microscope page over HTTP: numbers of the model, limits, and an untouched run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from inside_client import InsideClient, View, looking_at
from server_process import make_byte_run, make_run, save_step

from glasslm.config.model_config import FeedForward, ModelConfig, Norm, NormPosition, Residual
from glasslm.config.schema import DeviceConfig
from glasslm.data.dataset import Dataset
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.inference.head_scores import SCORE_NAMES
from glasslm.inference.sampling import Sampling, log_probabilities, probabilities
from glasslm.inference.trained_model import Model, load_model
from glasslm.runs import run_folder
from glasslm.runs.run_folder import Run
from glasslm.serve.inside.binary import encode_arrays, to_pixels
from glasslm.serve.inside.measures import find_measure
from glasslm.serve.inside.runs import SAMPLE_TOKENS, InsideRun
from glasslm.serve.inside.source import describe_place
from glasslm.serve.inside.source_places import source_kinds
from glasslm.serve.inside.texts import MAX_TEXT_TOKENS, InsideText, text_limit
from glasslm.serve.logprobs import TokenNames
from glasslm.serve.served_model import name_sources
from glasslm.text import Notify
from glasslm.training.loop import Loop
from small_runs import train, write_text

TEXT = "the cat sees a dog.\nthe old king calls"
OTHER = "my sister likes the old king.\na dog"
FLAGS: dict[str, Any] = {
    "max_steps": 40, "sample_interval": 0, "checkpoint_interval": 20, "eval_interval": 20
}  # fmt: skip
BACKWARD = Path(__file__).parents[2] / "docs" / "backward.md"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(write_text(folder / "text.txt"), folder / "run", **FLAGS).run_dir


@pytest.fixture(scope="module")
def byte_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_run(tmp_path_factory.mktemp("bytes") / "byte-run")


@pytest.fixture(scope="module")
def client(trained: Path, byte_run: Path) -> Iterator[InsideClient]:
    with looking_at(trained, byte_run) as client:
        yield client


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return load_model(trained, "latest", engine="numpy", threads=1)


@pytest.fixture(scope="module")
def newest(client: InsideClient) -> str:
    return client.checkpoint()


@pytest.fixture(scope="module")
def text(client: InsideClient, trained: Path) -> str:
    return client.post_text(TEXT, trained.name)["text"]


def folder_hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- runs and texts -------------------------------------------------------------------------------


def test_runs_are_described(client: InsideClient, trained: Path) -> None:
    run, byte_run = client.runs()
    history = run_folder.Run(trained).history
    assert (run["name"], byte_run["name"]) == (trained.name, "byte-run")
    assert [checkpoint["step"] for checkpoint in run["checkpoints"]] == [0, 20, 40]
    assert len({checkpoint["hash"] for checkpoint in run["checkpoints"]}) == 3
    assert [c["step"] for c in run["checkpoints"] if c["best"]] == [history.best_step]
    assert run["checkpoints"][-1]["val_loss"] == history.val_losses[-1]
    assert run["curve"] == [list(p) for p in zip(history.steps, history.train_losses)]
    assert (run["status"], run["is_training"]) == ("finished", False)
    assert (run["config"]["layers"], run["config"]["heads"]) == (2, 2)
    assert run["parameters"] == run_folder.Run(trained).record["parameters"]["total"]
    val = run_folder.Run(trained).dataset(lambda message: None).val.tokens
    tokenizer = run_folder.Run(trained).tokenizer
    assert run["sample_text"] == tokenizer.decode(val[: run["config"]["block_size"]])
    assert 10 < len(byte_run["sample_text"]) <= SAMPLE_TOKENS  # it has no text of its own
    config = byte_run["config"]
    assert config["text_limit"] == config["block_size"] < MAX_TEXT_TOKENS == text_limit(2048)


def test_a_sample_text_is_no_longer_than_the_context(tmp_path: Path) -> None:
    short = make_run(tmp_path / "bytes", ByteTokenizer(), block_size=8)
    text = write_text(tmp_path / "text.txt")
    own = train(text, tmp_path / "own", **FLAGS | {"max_steps": 1, "block_size": 8}).run_dir
    for path in (short, own):
        [source] = name_sources([str(path)], "latest", DeviceConfig(engine="numpy"))
        run = InsideRun(source)
        run._read_sample()
        assert len(run.sample_text()) == 8


def test_unchanged_runs_are_not_sent_again(client: InsideClient, byte_run: Path) -> None:
    first = client.get("/inside/runs")
    headers = {"If-None-Match": first.headers["etag"]}
    again = client.request("GET", "/inside/runs", headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    save_step(byte_run, 7)
    newer = client.request("GET", "/inside/runs", headers=headers)
    assert newer.status_code == 200
    assert [c["step"] for c in newer.json()["runs"][1]["checkpoints"]] == [0, 7]


def test_a_damaged_run_leaves_the_others(trained: Path, tmp_path: Path) -> None:
    broken = make_byte_run(tmp_path / "broken")
    with looking_at(broken, trained) as client:
        (broken / "metrics.jsonl").write_text('{"kind": "nonsense"}\n{"kind": "plan"}\n')
        first, second = client.runs()
        assert "damaged" in first["error"]
        assert second["checkpoints"]


def test_texts_are_tokens_with_a_name(client: InsideClient, trained: Path) -> None:
    answer = client.post_text(TEXT, trained.name)
    assert "".join(piece["text"] for piece in answer["pieces"]) == TEXT[-32:]
    assert answer["whole"] == TEXT[-32:]
    assert (len(answer["ids"]), answer["cut"]) == (32, len(TEXT) - 32)  # the context is 32
    same = client.request(
        "POST", "/inside/texts", json={"run": trained.name, "ids": answer["ids"]}
    ).json()
    assert same["text"] == answer["text"]
    assert client.post_text(OTHER, trained.name)["text"] != answer["text"]


@pytest.mark.parametrize(
    ("ids", "whole"),
    [
        (tuple("naïve".encode()), "naïve"),
        (tuple(b"na\xc3"), "na\ufffd"),
        ((256, 195, 175), "<|end|>ï"),
    ],
)
def test_the_text_of_parts_of_a_character_is_whole(ids: tuple[int, ...], whole: str) -> None:
    names = TokenNames(ByteTokenizer(["<|end|>"]))
    content = InsideText("name", "sha256", ids, 0).content(names, frozenset([256]))
    assert content["whole"] == whole


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": ""}, "the text is empty"),
        ({"text": "the cat 5"}, "5"),
        ({"text": 7}, "expected a string"),
        ({"ids": [1, -4]}, "outside the vocabulary"),
        ({"ids": [1, "a"]}, "expected a list"),
        ({"ids": [10**9]}, "outside the vocabulary"),
        ({"run": "nothing", "text": "a"}, "there is no model"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(
    client: InsideClient, trained: Path, body: dict[str, Any], message: str
) -> None:
    response = client.request("POST", "/inside/texts", json={"run": trained.name} | body)
    assert response.status_code in (400, 404)
    assert message in response.json()["error"]["message"]


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m\x07",
    "\u202e right to left \u2067 שלום",
    "👩‍👩‍👧‍👦 emoji " * 20,
    "x" * 10_000,
    "\x00\x01",
    "]]><!--",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_are_only_tokens(client: InsideClient, hostile: str) -> None:
    answer = client.post_text(hostile, "byte-run")
    tail = hostile.encode()[-64:]
    assert bytes(answer["ids"]) == tail
    checkpoint = client.checkpoint(run=1)
    view = client.view("read", checkpoint, answer["text"])
    assert view["nats"].shape == (len(tail),)
    assert np.isfinite(view["nats"][1:]).all()


# -- views ----------------------------------------------------------------------------------------


def test_read_gives_the_losses_of_the_model(
    client: InsideClient, model: Model, newest: str, text: str
) -> None:
    view = client.view("read", newest, text)
    read = TEXT[-32:]
    np.testing.assert_allclose(view["nats"][1:], model.losses(read), atol=1e-5)
    assert view.facts["bits_per_byte"] == pytest.approx(model.evaluate(read).bpb, abs=1e-5)
    assert view.facts["bytes"] == 31
    logprobs = log_probabilities(model.logits(read))
    assert view["top_ids"][-1].tolist() == np.argsort(-logprobs, kind="stable")[:8].tolist()
    np.testing.assert_allclose(view["top_logprobs"][-1], np.sort(logprobs)[::-1][:8], atol=1e-5)


def test_distribution_gives_what_sampling_draws_from(
    client: InsideClient, model: Model, newest: str, text: str
) -> None:
    view = client.view("distribution", newest, text, t=31, temperature=0.5, top_k=4)
    expected = probabilities(model.logits(TEXT[-32:]), Sampling(temperature=0.5, top_k=4))
    np.testing.assert_allclose(view["after"], expected[view["ids"]], atol=1e-5)
    assert (view["after"] > 0).sum() == 4


def test_attention_gives_the_weights_of_the_model(
    client: InsideClient, model: Model, newest: str, text: str
) -> None:
    weights = model.attention(TEXT[-32:])
    row = client.view("attention", newest, text, t=20)["weights"]
    np.testing.assert_allclose(row, weights[:, :, 20], atol=1e-6)
    head = client.view("head", newest, text, layer=1, head=0)["weights"]
    np.testing.assert_allclose(head, weights[1, 0], atol=1e-3)
    view = client.view("thumbnails", newest, text)
    shown = view["weights"] / 255 * view["scale"][..., None, None]
    np.testing.assert_allclose(shown, weights, atol=0.51 / 255)
    averages = client.view("averages", newest, text)
    shown = averages["weights"] / 255 * averages["scale"][:, None, None]
    np.testing.assert_allclose(shown[-1], weights.mean((0, 1)), atol=0.51 / 255)
    scores = client.view("scores", newest, text)
    assert scores.facts["kinds"] == [
        "previous_token",
        "first_token",
        "duplicate_token",
        "induction",
    ]
    previous = np.diagonal(weights, -1, 2, 3).mean(-1)
    np.testing.assert_allclose(scores["text"][0], previous, atol=1e-5)


def test_lens_and_why_end_in_the_output(
    client: InsideClient, model: Model, newest: str, text: str
) -> None:
    logits = model.logits(TEXT[-32:])
    logprobs = log_probabilities(logits)
    lens = client.view("lens-at", newest, text, t=31, ids="0,3")
    np.testing.assert_allclose(lens["asked_logprobs"][-1], logprobs[[0, 3]], atol=1e-5)
    assert lens.facts["places"][-1] == "blocks.1"
    assert client.view("lens", newest, text)["top_ids"][-1, 31] == logits.argmax()
    why = client.view("why", newest, text, t=31)
    np.testing.assert_allclose(why["shares"].sum(0), logits[why["ids"]], atol=1e-4)
    assert why.facts["gap"] < 1e-4
    candidate, rival = (int(i) for i in why["ids"][:2])
    source = client.view(
        "why-source", newest, text, t=31, layer=1, head=1, candidate=candidate, rival=rival
    )["shares"]
    part = why["shares"][why.facts["parts"].index("1.1")]
    assert source.sum() == pytest.approx(part[0] - part[1], abs=1e-4)


def test_effects_are_those_of_the_model(
    client: InsideClient, model: Model, trained: Path, newest: str, text: str
) -> None:
    read = TEXT[-32:]
    nats = model.losses(read)
    nothing = client.view("off", newest, text, t=9, parts="")
    np.testing.assert_allclose(nothing["nats_after"], nothing["nats_before"])
    np.testing.assert_allclose(nothing["nats_before"][1:], nats, atol=1e-5)
    edits = [("blocks.0.attention.heads", np.s_[:, :, 1], 0.0)]
    logits = model.inspect(read, ["logits"], edits)["logits"]
    without = client.view("off", newest, text, t=9, parts="0.1")
    expected = log_probabilities(logits[9])[without["ids"]]
    np.testing.assert_allclose(without["after"], expected, atol=1e-5)
    each = client.view("ablate", newest, text, t=9)
    row = each["logprobs"][each.facts["parts"].index("0.1")]
    np.testing.assert_allclose(row, expected, atol=1e-5)
    gradients = client.view("backward", newest, text, t=9)
    assert gradients["stream"].shape == (3, 32)
    assert not gradients["stream"][:, 10:].any()
    assert gradients.facts["names"] == list(model.gradients(read))
    step = client.view("step", newest, text, t=9, lr=0.01)
    np.testing.assert_allclose(step["nats_before"][1:], nats, atol=1e-5)
    assert step["nats_after"][10] < step["nats_before"][10]
    assert step.facts["norm"] == pytest.approx(gradients.facts["total"], rel=1e-4)
    other = client.post_text(OTHER, trained.name)["text"]
    patch = client.view("patch", newest, text, t=9, other=other, place=2, first=8)
    assert patch["positions"].tolist() == [8, 9]
    theirs = client.view("read", newest, other)
    same = client.view("patch", newest, text, t=9, other=text, place=1)
    np.testing.assert_allclose(same["logprobs"] - same["before"], 0, atol=1e-5)
    best = patch["ids"][patch["logprobs"][1].argmax()]
    assert best == theirs["top_ids"][9, 0] or theirs["top_ids"][9, 0] not in patch["ids"]


def test_learning_and_ngrams_use_the_text_of_the_run(
    client: InsideClient, model: Model, newest: str, text: str
) -> None:
    view = client.view("learning", newest, text)
    assert view["probe_nats"].shape == (32,)
    assert 0.5 < view["probe_nats"].mean() < 4
    assert view["scores"].shape == (4,)
    ngram = client.view("ngram", newest, text)
    assert ngram.facts["order"] == 5
    assert 0 < np.nanmean(ngram["nats"]) < 3  # the grammar is simple


def test_what_is_missing_is_answered_by_its_reason(client: InsideClient, tmp_path: Path) -> None:
    text = client.post_text("some bytes", "byte-run")["text"]
    checkpoint = client.checkpoint(run=1)
    assert "probe_reason" in client.view("learning", checkpoint, text).facts
    assert client.view("ngram", checkpoint, text).facts["reason"]
    assert "text ends here" in client.view("step", checkpoint, text, t=9).facts["reason"]
    assert (
        "there is no part" in client.view("off", checkpoint, text, t=1, parts="7").facts["reason"]
    )


def test_a_reason_is_not_kept_by_the_browser(
    client: InsideClient, newest: str, text: str, byte_run: Path
) -> None:
    other = client.post_text("some bytes", byte_run.name)["text"]
    reason = client.get(f"/inside/ngram/{client.checkpoint(run=1)}/{other}")
    assert View(reason.content).facts["reason"]
    assert reason.headers["cache-control"] == "no-store"
    view = client.get(f"/inside/read/{newest}/{text}")
    assert "max-age" in view.headers["cache-control"]


def test_a_missing_text_is_looked_for_again_after_a_while(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [source] = name_sources([str(trained)], "latest", DeviceConfig(engine="numpy"))
    run, calls = InsideRun(source), 0

    def missing(self: Run, notify: Notify) -> Dataset:
        nonlocal calls
        calls += 1
        raise FileNotFoundError("the disk is not there")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "dataset", missing)
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                run.dataset()
    assert calls == 1  # the second time within a minute
    run._retry_time = 0.0
    assert len(run.dataset().train.tokens) > 0


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("nothing/{c}/{t}", 404, "not_found"),
        ("read/{c}/unknown", 404, "unknown_text"),
        ("read/unknown/{t}", 404, "unknown_checkpoint"),
        ("attention/{c}/{t}", 400, "invalid_value"),
        ("attention/{c}/{t}?t=32", 400, "invalid_value"),
        ("attention/{c}/{t}?t=-1", 400, "invalid_value"),
        ("attention/{c}/{t}?t=1e3", 400, "invalid_value"),
        ("attention/{c}/{t}?t=--5", 400, "invalid_value"),
        ("head/{c}/{t}?layer=2&head=0", 400, "invalid_value"),
        ("distribution/{c}/{t}?t=1&temperature=nan", 400, "invalid_value"),
        ("distribution/{c}/{t}?t=1&top_p=2", 400, "invalid_value"),
        ("lens-at/{c}/{t}?t=1&ids=1,x", 400, "invalid_value"),
        ("lens-at/{c}/{t}?t=1&ids=99999", 400, "invalid_value"),
        ("why-source/{c}/{t}?t=1&layer=0&head=0&candidate=1", 400, "invalid_value"),
        ("step/{c}/{t}?t=1&lr=-1", 400, "invalid_value"),
        ("step/{c}/{t}?t=1&lr=0", 400, "invalid_value"),
        ("patch/{c}/{t}?t=1&place=0&other=unknown", 404, "unknown_text"),
        ("source/{c}/{t}?name=nonsense", 404, "not_found"),
        ("ngram/unknown/{t}", 404, "unknown_checkpoint"),
    ],
)
def test_a_wrong_address_is_refused(
    client: InsideClient, newest: str, text: str, path: str, status: int, code: str
) -> None:
    response = client.get("/inside/" + path.format(c=newest, t=text))
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_several_views_are_those_that_are_asked_for_alone(
    client: InsideClient, newest: str, text: str
) -> None:
    views = ["read/{c}/{t}", "why/{c}/{t}?t=3", "why/{c}/{t}?t=99", "ngram/{c}/{t}", "no/{c}/{t}"]
    addresses = ["/inside/" + view.format(c=newest, t=text) for view in views]
    response = client.request("POST", "/inside/several", json={"addresses": addresses})
    assert response.status_code == 200, response.text
    body = response.content
    for address in addresses:
        alone = client.get(address)
        length = int.from_bytes(body[:4], "little")
        assert body[4 : 4 + length] == (alone.content if alone.status_code == 200 else b"")
        body = body[4 + length :]
    assert body == b""


ADDRESS = "/inside/read/c/t"


@pytest.mark.parametrize(
    "addresses",
    [
        None,
        ADDRESS,
        ["/inside/runs"],
        [3],
        [ADDRESS] * 17,
        [ADDRESS, "/inside/read/c/\ud800"],
        [f"{ADDRESS}?t=\ud800"],
        [f"{ADDRESS}?t=\n"],
        ["/inside/read/\xe9/t"],
        [f"{ADDRESS}?".ljust(4001, "t")],
    ],
)
def test_several_wrong_addresses_are_refused(client: InsideClient, addresses: Any) -> None:
    body = json.dumps({"addresses": addresses})  # in ASCII, also a lone surrogate
    response = client.request("POST", "/inside/several", content=body)
    assert response.status_code == 400
    assert "at most 16 addresses" in response.json()["error"]["message"]


def test_several_addresses_may_be_as_many_and_as_long_as_the_limits(
    client: InsideClient, newest: str, text: str
) -> None:
    path = f"/inside/read/{newest}/{text}"
    addresses = [path] * 15 + [f"{path}?".ljust(4000, "t")]
    response = client.request("POST", "/inside/several", json={"addresses": addresses})
    assert response.status_code == 200, response.text
    alone = client.get(path).content
    assert response.content == (len(alone).to_bytes(4, "little") + alone) * 16


def test_a_text_of_another_tokenizer_is_refused(client: InsideClient, newest: str) -> None:
    """Its ids would be read as other characters, without a word."""
    text = client.post_text("\x01\x02", "byte-run")["text"]
    for address in (f"read/{newest}/{text}", f"ngram/{newest}/{text}"):
        response = client.get(f"/inside/{address}")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "other_tokenizer")


def test_looking_changes_no_file(trained: Path, byte_run: Path) -> None:
    before = folder_hashes(trained)
    with looking_at(trained) as client:
        text = client.post_text(TEXT)["text"]
        for checkpoint in client.runs()[0]["checkpoints"]:
            for name in ("read", "scores", "lens", "learning", "averages"):
                client.view(name, checkpoint["hash"], text)
            for name in ("why", "ablate", "backward", "step"):
                client.view(name, checkpoint["hash"], text, t=5)
    assert folder_hashes(trained) == before


def test_a_run_that_is_watched_computes_the_same_bits(tmp_path: Path, trained: Path) -> None:
    """Training while its checkpoints are looked at, against the same training alone."""
    watched, looks = tmp_path / "live", list[bool]()
    save = Loop.save

    def save_and_look(loop: Loop, *arguments: bool, **options: bool) -> None:
        save(loop, *arguments, **options)
        with looking_at(watched) as client:
            run = client.runs()[0]
            looks.append(run["is_training"])
            text = client.post_text("the cat")["text"]
            client.view("step", run["checkpoints"][-1]["hash"], text, t=3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "save", save_and_look)
        train(trained.parent / "text.txt", watched, **FLAGS)
    assert looks == [True, True, True]
    alone, seen = (folder_hashes(run / "checkpoints" / "000040") for run in (trained, watched))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert seen[file] == alone[file]


# -- sources and encoding -------------------------------------------------------------------------


def test_every_marker_is_found_and_every_derivation_is_a_heading() -> None:
    lines = BACKWARD.read_text(encoding="utf-8").splitlines()
    headings = {line.lstrip("# ").strip("`") for line in lines if line.startswith("#")}
    configs = [
        ModelConfig(feedforward=feedforward, norm=norm, norm_position=position, n_experts=experts)
        for feedforward in get_args(FeedForward)
        for norm in get_args(Norm)
        for position in get_args(NormPosition)
        for experts in (0, 2)
    ]
    configs += [ModelConfig(residual=residual) for residual in get_args(Residual)]
    for kind in {kind for config in configs for kind in source_kinds(config)}:
        assert kind.derivation in headings
    places = [p for config in configs for k in source_kinds(config) for p in (*k.numpy, *k.torch)]
    names = [f"head_scores/text/{kind}" for kind in SCORE_NAMES] + ["step/0.1"]
    measures = [find_measure(name, 3) for name in names]
    for place in {*places, *(place for m in measures if m for place in m.places)}:
        described = describe_place(place)
        starts = [described["lines"][i].strip() for i in described["computed"]]
        for marker in place.markers:
            assert any(line.startswith(marker) for line in starts), (place, marker)
        assert place.function.rpartition(".")[2] in described["lines"][0]


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("blocks.1.attention.weights", -1),
        ("logits", -1),
        ("nats", -1),
        ("gradient/blocks.0", 5),
        ("gradient/blocks.0.attention.q.weight", 5),
        ("head_scores/text/induction", -1),
        ("head_scores/repeated/induction", -1),
        ("step/0.1", 5),
    ],
)
def test_the_line_of_python_repeats_the_number(
    client: InsideClient, newest: str, text: str, name: str, t: int
) -> None:
    facts = client.view("source", newest, text, name=name, t=t).facts
    *statements, value = facts["python"].split("\n")
    assert statements[0] == "import glasslm, numpy as np"
    assert facts["python"].count("glasslm.load(") == 1
    scope: dict[str, Any] = {}
    exec("\n".join(statements), scope)
    array = eval(value, scope)
    if name == "nats":
        expected = client.view("read", newest, text)["nats"][1:]
        np.testing.assert_allclose(array, expected, atol=1e-5)
    elif name == "logits":
        view = client.view("why", newest, text, t=20)
        np.testing.assert_allclose(array[20, view["ids"]], view["logits"], atol=1e-5)
    elif name.startswith("head_scores"):
        view = client.view("scores", newest, text)
        np.testing.assert_allclose(array, view[name.split("/")[1]], atol=1e-5)
    elif name.startswith("step"):
        view = client.view("step", newest, text, t=t, lr=0.1)
        np.testing.assert_allclose(array, view["nats_after"], atol=1e-5)
    elif name.endswith("weights"):
        view = client.view("attention", newest, text, t=20)
        np.testing.assert_allclose(array[:, 20], view["weights"][1], atol=1e-6)
    else:
        view = client.view("backward", newest, text, t=t)
        if name == "gradient/blocks.0":
            norms = np.linalg.norm(array, axis=-1)
            np.testing.assert_allclose(norms, view["stream"][1], rtol=1e-4, atol=1e-7)
        else:
            index = view.facts["names"].index(name.removeprefix("gradient/"))
            assert np.linalg.norm(array) == pytest.approx(view["weights"][index], rel=1e-4)


def test_arrays_are_aligned_and_facts_are_json() -> None:
    arrays = {
        "a": np.arange(3, dtype=np.uint8),
        "b": np.array([[1.5, np.nan]], np.float16),
        "c": np.zeros((0, 4), np.int32),
        "d": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    view = View(encode_arrays(arrays, {"x": float("nan"), "name": "<b>\u202e", "n": np.int64(3)}))
    assert view.facts == {"x": None, "name": "<b>\u202e", "n": 3}
    for name, array in arrays.items():
        np.testing.assert_array_equal(view[name], array)
    assert b"\xe2" not in encode_arrays({}, {"name": "\u202e"})
    assert json.loads(encode_arrays({}, {"a": [1, None]})[4:])["a"] == [1, None]
    pixels, scale = to_pixels(np.array([[[0.0, 0.2]], [[0.0, 0.0]]]), axes=(1, 2))
    assert pixels.tolist() == [[[0, 255]], [[0, 0]]]
    assert scale.tolist() == [np.float32(0.2), 0]


def test_the_data_needs_the_key(byte_run: Path) -> None:
    with looking_at(byte_run, api_key="secret") as client:
        assert client.get("/inside/runs").status_code == 401
        text = {"text": "a"}
        assert client.request("POST", "/inside/texts", json=text).status_code == 401
        several = {"addresses": [ADDRESS]}
        assert client.request("POST", "/inside/several", json=several).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.request("GET", "/inside/runs", headers=right).status_code == 200
        foreign = {"Origin": "http://elsewhere.example", **right}
        assert client.request("GET", "/inside/runs", headers=foreign).status_code == 403
