"""Each thread of an engine has one BLAS thread, whichever thread calls the engine."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from glasslm.config.schema import ModelConfig, RunConfig
from glasslm.engines.numpy.blas_limit import _set_threads, one_blas_thread
from glasslm.engines.numpy.engine import NumpyEngine
from glasslm.engines.protocol import Batch
from glasslm.model.parameters import initial_weights

Result = TypeVar("Result")


@pytest.fixture(params=[1, 3])
def libraries(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """The BLAS libraries, which another program has given this number of threads."""
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    previous = [library.num_threads for library in libraries]
    for library in libraries:
        _set_threads(library, request.param)
    yield libraries
    for library, threads in zip(libraries, previous):
        _set_threads(library, threads)


def in_thread(work: Callable[[], Result]) -> Result:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def counts(libraries: list[Any]) -> list[int]:
    return [library.num_threads for library in libraries]


def test_the_limit_holds_in_every_thread_and_ends_with_the_last(libraries: list[Any]) -> None:
    before = counts(libraries)

    def limited() -> list[int]:
        with one_blas_thread(libraries):
            return counts(libraries)

    for call in (limited, lambda: in_thread(limited), limited):
        assert set(call()) <= {1}
        assert counts(libraries) == before
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with one_blas_thread(libraries):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=stay)
    with one_blas_thread(libraries):
        thread.start()
        entered.wait(10)
    assert set(counts(libraries)) <= {1}  # the other thread still computes
    leave.set()
    thread.join()
    assert counts(libraries) == before


def test_an_engine_has_the_same_bits_in_any_thread(libraries: list[Any]) -> None:
    model = ModelConfig(d_model=64, n_layers=2, n_heads=2, block_size=64)
    engine = NumpyEngine(RunConfig(model=model).resolve(), 50, threads=1)
    engine.load(list(initial_weights(engine.table, seed=0)))
    tokens = np.random.default_rng(0).integers(0, 50, (16, 64))
    batch = Batch(tokens, tokens, 0, np.arange(16))

    def gradients() -> dict[str, Any]:
        return {name: array.copy() for name, array in engine.gradients(batch, 1e-3).items()}

    expected, actual = gradients(), in_thread(gradients)
    for name, gradient in expected.items():
        np.testing.assert_array_equal(actual[name], gradient, err_msg=name)
