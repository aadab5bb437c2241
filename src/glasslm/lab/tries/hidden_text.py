"""--final: base and change of an accepted try on the part of the text that no try has touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glasslm.config.schema import ComputeConfig
from glasslm.errors import InputError
from glasslm.inference.exact_answers import score_own_text
from glasslm.inference.trained_model import load_model
from glasslm.lab.statistics import compare_losses, judge_family
from glasslm.lab.tries.ledger import Ledger
from glasslm.runs.run_folder import Run
from glasslm.text import Notify


def measure_final(ledger: Ledger, compute: ComputeConfig, notify: Notify) -> dict[str, Any]:
    """The losses of the last accepted try on its hidden text, and the verdict on them.

    Raises InputError where no try was accepted, or its runs are gone.
    """
    accepted = [event for event in ledger.results if event["verdict"] == "better"]
    if not accepted:
        raise InputError(f"no try in {ledger.path} was accepted: --final measures the last one")
    last = accepted[-1]
    study = Path(last["study"])
    earlier = [
        event
        for event in ledger.events
        if event["kind"] == "final" and event["study"] == last["study"]
    ]
    if earlier:
        raise InputError(
            f"the hidden text of try {last['number']} was measured already, on "
            f"{earlier[-1]['time']}: a second look would no longer be hidden"
        )
    looks = [str(event["number"]) for event in ledger.events if event["kind"] == "final"]
    if looks:
        notify(
            f"the hidden text was measured for try {', '.join(looks)} before: a choice between "
            "tries that rests on it makes the new number too good"
        )
    runs = [
        (study / "runs" / f"base-s{seed}", study / "runs" / f"change-s{seed}")
        for seed in last["seed_values"]
    ]
    losses: list[tuple[float, float]] = []
    for number, pair in enumerate(runs, 1):
        notify(f"the hidden text: pair {number} of {len(runs)}")
        base, change = (_loss_on_test(path, compute, notify) for path in pair)
        losses.append((base, change))
    comparison = compare_losses([b for _, b in losses], [a for a, _ in losses])
    verdict = judge_family([comparison])[0]
    return {
        "number": last["number"],
        "study": last["study"],
        "change": last["change"],
        "losses": losses,
        "delta": comparison.delta,
        "ci_low": comparison.ci_low,
        "ci_high": comparison.ci_high,
        "p": comparison.p,
        "verdict": verdict.kind.replace(" ", "_"),
        "words": verdict.words,
    }


def _loss_on_test(path: Path, compute: ComputeConfig, notify: Notify) -> float:
    run = Run(path)
    dataset = run.dataset(notify)
    if dataset.test is None:
        raise InputError(f"{path} has no test part: it was not trained by glasslm try")
    model = load_model(
        path,
        "latest",
        engine=compute.engine,
        device=compute.device,
        precision=compute.precision,
        threads=compute.threads,
    )
    return score_own_text(model, dataset.test).loss
