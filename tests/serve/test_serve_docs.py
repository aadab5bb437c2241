"""The commands and programs of docs/howto/serve.md, run as they stand but for the port."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from server_process import ServerProcess, make_run, serving

from glasslm.cli import main
from glasslm.data.tokenizers import ByteTokenizer
from glasslm.serve.app import api_routes

PAGE = (Path(__file__).parents[2] / "docs" / "howto" / "serve.md").read_text(encoding="utf-8")
BASH = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [command.strip() for block in BASH for command in block.split("\n\n")]
(PROGRAM,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    run = tmp_path_factory.mktemp("runs") / "bard"
    make_run(run, ByteTokenizer())
    with serving(run) as process:
        yield process


@pytest.mark.parametrize("command", COMMANDS)
def test_the_curl_lines_work(server: ServerProcess, command: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    assert command.startswith("curl ")
    command = command.replace("http://127.0.0.1:8000", server.url)
    silent = command.replace("curl ", "curl --silent --show-error --fail --noproxy '*' ", 1)
    done = subprocess.run(["bash", "-c", silent], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr + done.stdout
    if "stream" in command:
        assert done.stdout.endswith("data: [DONE]\n\n")
    elif "/metrics" in command:
        assert "glasslm_tokens_total" in done.stdout
    else:
        assert "error" not in json.loads(done.stdout)


def test_the_program_streams_a_text(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    names: dict[str, object] = {}
    exec(PROGRAM.replace("http://127.0.0.1:8000", server.url), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert len(capsys.readouterr().out) >= 25


def test_an_open_address_is_refused_in_these_words(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "bard", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.strip() in PAGE


def test_the_page_names_every_path() -> None:
    class NoService:
        """Routes are only listed."""

    for route in api_routes(NoService()):  # type: ignore[arg-type]
        path = route.path.replace("{name:path}", "NAME")  # type: ignore[attr-defined]
        assert f" {path}`" in PAGE, path
