"""The process that reads a data set of Hugging Face: `python -m glasslm.data.sources.hub_reader REQUEST FOLDER`, by hub.py.

It is a process of its own because huggingface_hub takes the address of the hub once, when it is imported, because
threads of pyarrow may keep an interpreter from ending (https://github.com/apache/arrow/issues/45214), and because what
hangs can then be ended. It writes a line of JSON for each thing: {"about": {...}} before any text is fetched, {"text":
...} for each row, and at last {"end": true}, {"refused": MESSAGE} (what was asked for is not there) or {"failed":
REASON}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from glasslm.data.sources.texts import listed, text_column
from glasslm.errors import InputError
from glasslm.text import one_line, size

if TYPE_CHECKING:
    from datasets import IterableDataset
    from huggingface_hub.hf_api import DatasetInfo

PATIENCE_S = 20.0  # for the first answer of the hub
PAGE = "https://huggingface.co/datasets"
TEXT = ("string", "large_string", "string_view")

Asked = dict[str, Any]  # the fields of hub.Wanted


def main() -> None:
    request, folder = sys.argv[1:]
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what libraries print is not ours
        os.chdir(
            folder
        )  # where no folder has the name of a data set, which would be read in its place
        with suppress(BrokenPipeError):
            for line in answer(json.loads(request)):
                out.write(json.dumps(line).encode() + b"\n")
                if "text" not in line:
                    out.flush()
    os._exit(0)  # without waiting for threads


def answer(asked: Asked) -> Iterator[dict[str, Any]]:
    """The lines, to the last one."""
    try:
        import huggingface_hub

        hub = huggingface_hub.HfApi()
        info = hub.dataset_info(
            asked["dataset"], revision=asked["revision"], files_metadata=True, timeout=PATIENCE_S
        )
        _refuse_script(info)
        if info.gated:
            hub.auth_check(info.id, repo_type="dataset")
        about = {"licence": _licence(info), "size": _size(info, asked)}
        yield {"about": {"dataset": info.id, "revision": info.sha, **about}}
        yield from ({"text": text[: asked["most"]]} for text in _texts(info, asked))
        yield {"end": True}
    except ImportError as error:
        needs = f"reading {asked['dataset']} needs the library datasets ({one_line(str(error))})"
        yield {"refused": f"{needs}: pip install 'glasslm[hub]'"}
    except InputError as error:
        yield {"refused": str(error)}
    except Exception as error:  # of whatever kind: it is told to the one who asked
        yield _told(error, asked)


def _card(info: DatasetInfo) -> dict[str, Any]:
    data: Any = info.card_data
    return data.to_dict() if data else {}


def _licence(info: DatasetInfo) -> str:
    """As the card of the data set states it."""
    card = _card(info)
    stated = card.get("license")
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated]) if name]
    if names == ["other"] and card.get("license_name"):
        names = [str(card["license_name"])]
    return f"licence {' and '.join(names)}" if names else "licence not stated"


def _size(info: DatasetInfo, asked: Asked) -> str:
    """That of the split, as the card states it, else of all files."""
    card = _card(info)
    stated = card.get("dataset_info") or []
    for part in stated if isinstance(stated, list) else [stated]:
        if part.get("config_name", "default") == (asked["config"] or "default"):
            for split in part.get("splits") or []:
                if split.get("name") == asked["split"] and split.get("num_bytes"):
                    return f"{size(int(split['num_bytes']))} in all"
    total = sum(file.size or 0 for file in info.siblings or [])
    return f"files of {size(total)}" if total else "size not stated"


def _refuse_script(info: DatasetInfo) -> None:
    script = f"{info.id.rpartition('/')[2]}.py"
    if any(file.rfilename == script for file in info.siblings or []):
        raise InputError(
            f"{info.id} is a program ({script}) rather than files, and a program of others is never run here: take the "
            f"parquet files at {PAGE}/{info.id}/tree/refs%2Fconvert%2Fparquet, if there are some, with --text-file"
        )


def _texts(info: DatasetInfo, asked: Asked) -> Iterator[str]:
    dataset = _rows(info, asked)
    if dataset.features is None:  # as with JSON and CSV: the first row tells
        holds = {name: isinstance(value, str) for name, value in next(iter(dataset), {}).items()}
    else:
        holds = {
            name: getattr(kind, "dtype", None) in TEXT for name, kind in dataset.features.items()
        }
    column, title = text_column(holds, info.id, asked["column"]), asked["title"]
    for row in dataset.select_columns([title, column] if title else [column]):
        text = row[column]
        if not isinstance(text, str | None):
            raise InputError(
                f"column '{column}' of {info.id} holds {type(text).__name__} in some rows, not text"
            )
        if text:
            yield f"{row[title]}\n\n{text}" if title else text


def _rows(info: DatasetInfo, asked: Asked) -> IterableDataset:
    """The split as a stream. InputError for a configuration or a split that is not there, with the names of others."""
    import datasets

    try:
        splits = datasets.load_dataset(info.id, asked["config"], revision=info.sha, streaming=True)
    except ValueError:  # it is not there, or none was given and none is the default
        names = datasets.get_dataset_config_names(info.id, revision=info.sha)
        if asked["config"] is None and len(names) > 1:
            raise InputError(
                f"{info.id} has several configurations: choose one with --hf-config: {listed(names)}"
            ) from None
        if asked["config"] is not None and asked["config"] not in names:
            there = listed(names, asked["config"])
            raise InputError(
                f"{info.id} has no configuration '{asked['config']}': there are {there}"
            ) from None
        raise
    if asked["split"] not in splits:
        there = listed(list(splits), asked["split"])
        raise InputError(
            f"{info.id} has no split '{asked['split']}': choose with --hf-split from {there}"
        )
    return splits[asked["split"]]


def _told(error: Exception, asked: Asked) -> dict[str, str]:
    """What went wrong, in one line."""
    from huggingface_hub import errors

    name, chain = asked["dataset"], list(_chain(error))
    for cause in chain:
        if isinstance(cause, errors.GatedRepoError):
            cure = "accept its conditions there, then log in (`hf auth login`, or HF_TOKEN)"
            return {"refused": f"{PAGE}/{name} is given only to those who ask for it: {cure}"}
        if isinstance(cause, errors.RevisionNotFoundError):
            return {"failed": f"the hub no longer has its revision {asked['revision']}"}
        if isinstance(cause, errors.RepositoryNotFoundError):
            close = _similar(name)
            cure = f": is it one of {', '.join(close)}?" if close else f": see {PAGE}"
            return {
                "refused": f"there is no data set {name} on Hugging Face, or it is private{cure}"
            }
        if isinstance(cause, errors.HfHubHTTPError):
            return {"failed": f"the server answers {cause.response.status_code}"}
    return {"failed": one_line(f"{type(chain[-1]).__name__}: {chain[-1]}")}


def _similar(name: str) -> list[str]:
    """Data sets with such a name, if the hub tells."""
    import huggingface_hub

    with suppress(Exception):
        found = huggingface_hub.HfApi().list_datasets(search=name.rpartition("/")[2], limit=3)
        return [dataset.id for dataset in found]
    return []


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


if __name__ == "__main__":
    main()
