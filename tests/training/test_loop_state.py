"""The state of the loop in a checkpoint: its keys in state.json and the way back."""

import json
from pathlib import Path

from glasslm.training.guard import GuardState
from glasslm.training.loop_state import LoopState

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run"


def test_a_state_comes_back_from_json() -> None:
    guard = GuardState((1.5, 2.5), (0.5,), 3, 4.0, 2.0, warned_overfit=True)
    state = LoopState(2, 10, 20, full_split_measured=True, guard=guard, rollback_step=7)
    assert LoopState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_the_keys_in_state_json_stay_those_of_old_runs() -> None:
    (path,) = OLD_RUN.glob("checkpoints/000010/state.json")
    loop = json.loads(path.read_text(encoding="utf-8"))["loop"]
    assert json.loads(json.dumps(LoopState.from_json(loop).to_json())) == loop
    assert LoopState.from_json(loop).rollback_step == loop["safe_at"] == 10


def test_a_run_without_a_loop_has_the_defaults() -> None:
    assert LoopState.from_json({}) == LoopState()
