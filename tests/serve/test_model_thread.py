"""The model thread: newer weights take the place of older ones."""

import asyncio
import queue
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from server_process import make_run, save_step

from glasslm.config.schema import DeviceConfig
from glasslm.inference.request import Finished, Request
from glasslm.serve.answer import Answer
from glasslm.serve.limits import Limits
from glasslm.serve.model_thread import Delivery, ModelThread
from glasslm.serve.prompts import PreparedText
from glasslm.serve.served_model import ModelSource
from glasslm.serve.service import Service


def test_old_weights_are_freed_after_their_last_text_without_another_request(
    tmp_path: Path,
) -> None:
    loaded = ModelSource("a", make_run(tmp_path / "a"), "best", DeviceConfig(engine="numpy")).load()
    deliveries: queue.Queue[Delivery] = queue.Queue()
    thread = ModelThread(deliveries.put)
    thread.start()
    text = PreparedText(Request([1], max_new_tokens=40))
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


def test_a_run_that_is_trained_again_in_the_same_folder_is_taken_up(tmp_path: Path) -> None:
    """A missing run, and one whose newest checkpoint is damaged, leave the old weights served."""
    run = make_run(tmp_path / "run")
    save_step(run, 5)
    source = ModelSource("run", run, "latest", DeviceConfig(engine="numpy"))

    async def reload_each_time() -> None:
        service = Service([source], Limits())
        await service.load()
        old = service.models["run"]
        assert await service.reload("run") is old
        shutil.rmtree(run)
        assert await service.reload("run") is old
        make_run(run, n_layers=2)
        save_step(run, 3)
        again = await service.reload("run")
        assert (again.model.step, again.model.config.model.n_layers) == (3, 2)
        assert service.models["run"] is again is await service.reload("run")
        shutil.rmtree(run)
        make_run(run)
        save_step(run, 3)
        same_step = await service.reload("run")
        assert (same_step.model.step, same_step.model.config.model.n_layers) == (3, 1)
        assert again.fingerprint != same_step.fingerprint
        (run / "checkpoints" / "000003" / "manifest.json").write_text("{}")
        assert await service.reload("run") is same_step
        await service.close_thread()

    asyncio.run(reload_each_time())
