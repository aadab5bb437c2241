"""glasslm look: the microscope page of trained models, in a browser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from glasslm.cli.parsing import parse
from glasslm.cli.serve import require_extra
from glasslm.config.schema import DeviceConfig
from glasslm.errors import InputError

DESCRIPTION = """See inside trained models: a page shows what they compute as they read and write.

Examples:
  glasslm look RUN
  glasslm look RUN ANOTHER_RUN
  glasslm look RUN --no-browser       prints the address only

It serves this machine alone, without a network, also while RUN is trained, and changes nothing in
it. `glasslm serve RUN --host ADDRESS --api-key KEY` shows the same page to other machines."""


@dataclass(frozen=True)
class Flags:
    """The models to look into."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN", help="Folders of runs, or their names under ./runs."),
    ]
    port: int = 8000
    """Port to listen at (0: any free one, which is printed)."""
    browser: bool = True
    """Open the page in the browser."""
    compute: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm look", DESCRIPTION)
    require_extra()
    from glasslm.serve.served_model import name_sources
    from glasslm.serve.server import ServerSettings, serve

    if not 0 <= flags.port <= 65535:
        raise InputError(f"--port is {flags.port}: expected 0 (any free one) to 65535")
    sources = name_sources(flags.runs, "best", flags.compute)
    serve(sources, ServerSettings(port=flags.port, open_browser=flags.browser))
    return 0
