"""The model thread: newer weights take the place of older ones."""

import queue
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from server_process import make_run

from glasslm.config.schema import DeviceConfig
from glasslm.inference.request import Finished, Request
from glasslm.serve.answer import Answer
from glasslm.serve.model_thread import Delivery, ModelThread
from glasslm.serve.prompts import PreparedText
from glasslm.serve.served_model import ModelSource


def test_old_weights_are_freed_after_their_last_text_without_another_request(
    tmp_path: Path,
) -> None:
    loaded = ModelSource("a", make_run(tmp_path / "a"), "best", DeviceConfig(engine="numpy")).load()
    deliveries: queue.Queue[Delivery] = queue.Queue()
    thread = ModelThread(deliveries.put)
    thread.start()
    text = PreparedText(Request([1], max_new_tokens=40), None)
    thread.submit(Answer(loaded, [text], with_logprobs=False, max_waiting=None))
    thread.retire(loaded)
    events = []
    while not any(isinstance(event, Finished) for event in events):
        events += [event for _, _, event in deliveries.get(timeout=30)]
    assert events[-1].reason == "length"
    deadline = time.monotonic() + 10
    while thread.counts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not thread.counts
    thread.stop()
    thread.join(10)
