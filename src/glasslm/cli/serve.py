"""glasslm serve: trained models behind OpenAI's HTTP API."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from glasslm.cli.flag_groups import CheckpointFlag
from glasslm.cli.parsing import parse
from glasslm.config.config_fields import optional_flag
from glasslm.config.schema import DeviceConfig
from glasslm.errors import InputError
from glasslm.runs.checkpoint_selector import parse_checkpoint

EXTRA = ("starlette", "uvicorn", "prometheus_client")  # the libraries of the extra `serve`

# An origin as a browser sends it: no path, and no port that is the default of its scheme.
ORIGIN = re.compile(
    r"(?!http://[^:]+:80$|https://[^:]+:443$)"
    r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
)

DESCRIPTION = """Serve trained models over HTTP, with OpenAI's API.

Examples:
  glasslm serve RUN
  glasslm serve RUN ANOTHER_RUN --port 8001
  glasslm serve RUN --follow          serves each new checkpoint of a run in training
  glasslm serve RUN --host 0.0.0.0 --api-key KEY

Then, with the name of the run's folder as the model:
  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "RUN", "prompt": "ROMEO:", "max_tokens": 50}'"""


@dataclass(frozen=True)
class Flags:
    """The models, and who may use them."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN", help="Folders of runs, or their names under ./runs."),
    ]
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at. Any other than loopback needs --api-key or --no-api-key."""
    port: int = 8000
    """Port to listen at (0: any free one, which is printed)."""
    api_key: Annotated[str | None, optional_flag("KEY", "none on loopback")] = None
    """Answer only requests with the header Authorization: Bearer KEY."""
    no_api_key: bool = False
    """Answer everybody who reaches the address."""
    allow_origin: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="URL")
    ] = ()
    """Let pages of this origin use the server (*: of all). May be given several times."""
    follow: bool = False
    """Serve the newest checkpoint, and each newer one as soon as it is there."""
    checkpoint: CheckpointFlag = "best"
    compute: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, "glasslm serve", DESCRIPTION)
    require_extra()
    from glasslm.serve.addresses import is_loopback
    from glasslm.serve.served_model import name_sources
    from glasslm.serve.server import ServerSettings, serve

    if not 0 <= flags.port <= 65535:
        raise InputError(f"--port is {flags.port}: expected 0 (any free one) to 65535")
    if flags.api_key is not None and flags.no_api_key:
        raise InputError("both --api-key and --no-api-key were given: choose one of them")
    if flags.api_key is not None and not re.fullmatch("[!-~]+", flags.api_key):
        raise InputError("--api-key cannot be sent: expected printable ASCII without spaces")
    if not is_loopback(flags.host) and flags.api_key is None and not flags.no_api_key:
        raise InputError(
            f"--host {flags.host} is open to other machines: give --api-key KEY, or --no-api-key "
            "to answer everybody"
        )
    for origin in flags.allow_origin:
        if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
            raise InputError(
                f"--allow-origin is {origin}: expected an origin as a browser sends it, "
                "SCHEME://HOST[:PORT] in small letters, such as https://example.org, or *, or null "
                "(a file's page). Leave out the path and the port 80 of http or 443 of https"
            )
    if flags.follow and flags.checkpoint != "best":
        raise InputError("--follow serves the newest checkpoint: leave out --checkpoint")
    selector = "latest" if flags.follow else parse_checkpoint(flags.checkpoint)
    sources = name_sources(flags.runs, selector, flags.compute)
    settings = ServerSettings(
        flags.host, flags.port, flags.api_key, flags.allow_origin, flags.follow
    )
    serve(sources, settings)
    return 0


def require_extra() -> None:
    """Raise InputError where the libraries of the extra are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is missing: install the extra with pip install 'glasslm[serve]'"
        )
