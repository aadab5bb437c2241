"""glasslm try: accept or reject a change, by a test with a bounded rate of false accepts."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import shlex
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import tyro

from glasslm.cli.flag_groups import REFUSED_IN_STUDIES, JsonFlag, RecipeFlags, compute_config
from glasslm.cli.study_flags import RunnerFlags
from glasslm.config.config_fields import optional_flag
from glasslm.config.conversion import with_flags
from glasslm.config.schema import DeviceConfig, OperationsConfig
from glasslm.config.unused_flags import refuse_unread_settings
from glasslm.errors import GlasslmError, InputError, explain_system_errors, require
from glasslm.lab.studies.ablation_axes import Match
from glasslm.runs.metrics import to_json_types
from glasslm.text import notify, print_result

if TYPE_CHECKING:
    from glasslm.lab.tries.attempt import Change, TryResult
    from glasslm.lab.tries.ledger import Ledger

TOTAL_ALPHA = 0.05  # probability of any false accept in a ledger
EXIT_CODES = {"better": 0, "worse": 1, "not_distinguishable": 1, "diverged": 3}

DESCRIPTION = """Accept or reject a change of the recipe. The base and the change
are trained with the same seeds, pair after pair, until it is clear whether the
change is better, worse, or not distinguishable. The base is the preset tiny,
or that of --preset, with flags of `glasslm train`. To try a change of train's
default, give --preset quick.

The test is sequential: it may be read after every pair. The probability that a
change without an effect is ever called better is at most 5% over all tries in
the ledger. A part of the text stays hidden; --final measures the last accepted
change on it, once. The exit code is 0 for better, 1 for worse or not
distinguishable, 3 if the change diverged.

Examples:
  glasslm try --change "--qk-norm" --budget 10m
  glasslm try --d-model 64 --change "--lr 3e-3" --change "--norm layernorm" --detect 0.02
  glasslm try --ops my_norm.py --budget 10m
  glasslm try --source ../my-glasslm --budget 20m
  glasslm try --final"""


@dataclass(frozen=True, kw_only=True)
class Flags(RecipeFlags):
    """The base, the changes and what decides."""

    hidden_fields = REFUSED_IN_STUDIES
    varies_settings = True

    change: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FLAGS")
    ] = ()
    """Flags of `glasslm train` that change the base, as one word. Several --change are several
    tries. --ops and --source belong to the change, too."""
    source: Annotated[str | None, optional_flag("DIR|REF", "none")] = None
    """A changed copy of glasslm that trains the change: a folder, or a commit of this one."""
    budget: Annotated[str | None, optional_flag("TIME", "none: until --seeds")] = None
    """Time for each try, such as 10m. It fixes the number of steps."""
    detect: float = 0.01
    """Improvement in nats that matters; the try ends when it is excluded."""
    seeds: int = 20
    """Pairs of runs at most."""
    match: Match = "tokens"
    """What is equal in both runs: tokens, FLOPs, time, or parameters."""
    ledger: Path = Path("tries.jsonl")
    """Ledger of all tries. Each try makes the next one stricter."""
    final: bool = False
    """Measure the last accepted change on the hidden part of the text."""
    json: JsonFlag = False
    runner: RunnerFlags = field(default_factory=RunnerFlags)
    compute: DeviceConfig = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    from glasslm.cli.parsing import given_fields
    from glasslm.lab.tries.ledger import open_ledger

    flags = parse(argv)
    require(flags.seeds >= 3, "--seeds", flags.seeds, "at least 3")
    require(flags.detect > 0, "--detect", flags.detect, "nats above 0")
    if flags.final:
        _refuse_unread(argv)
        return _measure_final(flags)
    if not flags.change and flags.source is None and not flags.operations.ops:
        raise InputError('nothing to try: give --change "FLAGS", --ops FILE or --source DIR')
    with open_ledger(flags.ledger) as ledger, _open_source(flags.source) as checkout:
        changes = list(_parse_changes(flags, checkout))
        configs = [flags.config, *(change.config for change in changes)]
        refuse_unread_settings(given_fields(_join_changes(argv)), configs)
        command = shlex.join(["glasslm", "try", *argv])
        results = [_try_change(flags, change, ledger, command) for change in changes]
        page = _write_page(flags, ledger)
        tries = ledger.tries
    facts = [result.facts for result in results]
    best = min(range(len(facts)), key=lambda i: (EXIT_CODES[results[i].verdict], facts[i]["delta"]))
    if flags.json:
        chosen = {"tries": tries, **facts[best], "page": str(page)}
        print(json.dumps(to_json_types(chosen | {"changes": facts} if len(facts) > 1 else chosen)))
    else:
        lines = [line for result in results for line in [*result.sentences(), ""]]
        lines += [f"ledger: {flags.ledger}, {tries} so far", f"page: {page}"]
        print_result("\n".join(lines))
    return EXIT_CODES[results[best].verdict]


def parse(argv: list[str]) -> Flags:
    """The flags, over the preset that they name."""
    from glasslm.cli.parsing import parse_over_preset

    return parse_over_preset(Flags, _join_changes(argv), "glasslm try", DESCRIPTION)


def _join_changes(argv: list[str]) -> list[str]:
    """`argv` with each change in the word of its flag: it begins with dashes, as a flag does."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--change":
            words[-1] = f"--change={word}"
        else:
            words.append(word)
    return words


def _parse_changes(flags: Flags, checkout: str) -> Iterator[Change]:
    """Each change as a config over the base."""
    from glasslm.cli.parsing import flag_value, parse
    from glasslm.lab.tries.attempt import Change

    def base(argv: list[str]) -> RecipeFlags:
        """The base, whose min_lr follows an --lr of the change."""
        config = flags.config
        with contextlib.suppress(ValueError):  # `parse` reports a value that is not a number
            config = with_flags(config, {"lr": float(flag_value("--lr", argv, default=""))})
        parts = {part.name: getattr(config, part.name) for part in dataclasses.fields(config)}
        return RecipeFlags(preset=flags.preset, **parts)

    for words in flags.change or ("",):
        argv = shlex.split(words)
        changed = parse(RecipeFlags, argv, "glasslm try --change", DESCRIPTION, base(argv))
        if changed.preset != flags.preset:
            raise InputError("--preset belongs to the base, not into --change")
        if changed.data != flags.data:
            raise InputError(
                f"--change '{words}' changes the text: losses on other texts cannot be compared"
            )
        if changed.train.seed != flags.train.seed:
            raise InputError(
                f"--change '{words}' changes the seed: both sides have the same seeds, many of them"
            )
        if changed.train.max_steps != flags.train.max_steps:
            raise InputError(
                "--max-steps belongs to the base, not into --change: the base and --match set the "
                "length of both runs"
            )
        for name in sorted(REFUSED_IN_STUDIES):
            if getattr(changed.train, name) != getattr(flags.train, name):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{flag} does not work in a try, whose runs have the same number of steps and "
                    f"start from initial weights: leave {flag} out of --change"
                )
        ops = f"--ops {flags.operations.ops}" if flags.operations.ops else ""
        source = f"--source {flags.source}" if flags.source else ""
        name = " ".join(filter(None, [words, ops, source]))
        yield Change(name, changed.config, checkout)


def _try_change(flags: Flags, change: Change, ledger: Ledger, command: str) -> TryResult:
    """One try, with its begin and its end in the ledger."""
    from glasslm.config.units import parse_duration
    from glasslm.lab.tries.attempt import TrySpec, plan_try, run_try
    from glasslm.lab.tries.sequential_test import alpha_of_try

    number = ledger.tries + 1
    budget_s = None if flags.budget is None else parse_duration(flags.budget)
    spec = TrySpec(
        alpha_of_try(number, TOTAL_ALPHA), flags.detect, flags.seeds, budget_s, flags.match
    )
    runner = flags.runner.make_runner(flags.compute)
    base = dataclasses.replace(flags.config, operations=OperationsConfig())
    plan = plan_try(base, change, spec, runner, notify)
    study = _new_folder(flags.ledger, number)
    facts = {"number": number, "time": _now(), "study": str(study), "command": command}
    ledger.append("begin", facts | {"change": change.words, "alpha": spec.alpha})
    notify(
        f"try {number}: {change.words or 'the base'}, {plan.base.train.max_steps} steps a run; a "
        f"false accept has a probability of at most {spec.alpha:.2%}"
    )
    try:
        result = run_try(plan, study, runner, command, notify)
    except GlasslmError as error:
        reason = {"time": _now(), "change": change.words, "reason": str(error)}
        ledger.append("failed", facts | reason)
        raise
    except KeyboardInterrupt:
        ledger.append("interrupted", facts | {"time": _now(), "change": change.words})
        raise
    seeds = [trial.seed for trial in result.base]
    ledger.append("end", {**facts, **result.facts, "time": _now(), "seed_values": seeds})
    return result


def _new_folder(ledger: Path, number: int) -> Path:
    """The folder of a try's runs, beside the ledger."""
    folder = ledger.absolute().parent / f"{ledger.stem}-runs" / f"{number:04d}"
    if folder.exists():
        raise InputError(
            f"{folder} exists, but {ledger} has no such try: lines of it were removed. Restore it, "
            "or begin another one with --ledger"
        )
    return folder


def _measure_final(flags: Flags) -> int:
    from glasslm.lab.tries.hidden_text import measure_final
    from glasslm.lab.tries.ledger import open_ledger

    with open_ledger(flags.ledger) as ledger:
        facts = measure_final(ledger, compute_config(flags.compute), notify)
        ledger.append("final", {**facts, "time": _now()})
        page = _write_page(flags, ledger)
    if flags.json:
        print(json.dumps(to_json_types({**facts, "tries": ledger.tries, "page": str(page)})))
    else:
        print_result(f"{facts['change']} on the hidden text: {facts['words']}\npage: {page}")
    return 0 if facts["verdict"] == "better" else 1


def _refuse_unread(argv: list[str]) -> None:
    """Raise InputError for a flag that --final would ignore: its runs are trained already."""
    from glasslm.cli.parsing import find_unread

    read_flags = {"--final", "--ledger", "--json", *(
        "--" + field.name.replace("_", "-") for field in dataclasses.fields(DeviceConfig)
    )}  # fmt: skip
    if unread := find_unread(argv, read_flags):
        raise InputError(
            f"--final measures the runs of the last accepted try, so {unread} has no effect: "
            "leave it out"
        )


def _write_page(flags: Flags, ledger: Ledger) -> Path:
    from glasslm.lab.tries import tries_page

    return tries_page.write(flags.ledger.absolute().parent / f"{flags.ledger.stem}-page", ledger)


@contextmanager
def _open_source(source: str | None) -> Iterator[str]:
    """The folder of --source: itself, or a commit of this repository in a temporary folder."""
    from glasslm.lab.studies.checkout import require_checkout

    if source is None:
        yield ""
        return
    if Path(source).is_dir():
        require_checkout(Path(source))
        yield str(Path(source).absolute())
        return
    with TemporaryDirectory(prefix="glasslm-source-") as folder:
        _extract_commit(source, Path(folder))
        require_checkout(Path(folder))
        yield folder


def _extract_commit(ref: str, folder: Path) -> None:
    """Write the files of a commit of the repository around glasslm's source into `folder`."""
    package = Path(__file__).parent

    def not_found(reason: str) -> InputError:
        return InputError(f"--source {ref} is neither a folder nor a commit of {package}: {reason}")

    with explain_system_errors("git", not_found):
        try:
            top = _git(["rev-parse", "--show-toplevel"], package).decode().strip()
            archive = _git(["archive", "--format=tar", "--end-of-options", ref], Path(top))
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise not_found(reason) from None
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            members.extractall(folder, filter="data")


def _git(arguments: Sequence[str], folder: Path) -> bytes:
    """The output of a git command in `folder`."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True).stdout


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
