"""Read a Hugging Face dataset: `python -m glasslm.data.sources.hub_reader REQUEST FOLDER`.

hub.py starts this process. It is separate for three reasons: huggingface_hub reads the address of
the hub once, at import; threads of pyarrow may keep an interpreter from ending
(https://github.com/apache/arrow/issues/45214); and a process that hangs can be killed.

It writes lines of JSON: {"dataset_info": {...}} before any text is fetched, {"text": ...} for each
row, and last {"end": true}, {"refused": MESSAGE} (the request cannot be met),
{"exhausted": MESSAGE} (memory or open files ran out) or {"failed": REASON}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from glasslm.data.sources.texts import choose_text_column, list_names
from glasslm.errors import ExhaustedError, InputError, raise_if_exhausted
from glasslm.text import format_bytes, to_one_line

if TYPE_CHECKING:
    from datasets import IterableDataset
    from huggingface_hub.hf_api import DatasetInfo

MAX_READER_BYTES = 8 << 30  # of address space; the libraries alone map 1.5 GB
HUB_TIMEOUT_S = 20.0  # for the first answer of the hub
DATASETS_URL = "https://huggingface.co/datasets"
TEXT_DTYPES = ("string", "large_string", "string_view")

Request = dict[str, Any]  # the fields of hub.HubRequest


def main() -> None:
    """Write the lines to standard output; output of the libraries goes to standard error."""
    request, folder = sys.argv[1:]
    _limit_memory()
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        # `datasets` would read a local folder that has the name of the dataset.
        os.chdir(folder)
        with suppress(BrokenPipeError):
            for line in answer_request(json.loads(request)):
                out.write(json.dumps(line).encode() + b"\n")
                if "text" not in line:
                    out.flush()
    os._exit(0)  # It does not wait for threads.


def _limit_memory() -> None:
    """Keep a file that unpacks to far more than its size from filling the memory (Linux)."""
    if sys.platform == "linux":  # macOS refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_READER_BYTES, MAX_READER_BYTES))


def answer_request(request: Request) -> Iterator[dict[str, Any]]:
    """The lines for one request, in the order of the module's docstring."""
    try:
        import huggingface_hub

        hub = huggingface_hub.HfApi()
        info = hub.dataset_info(
            request["dataset"],
            revision=request["revision"],
            files_metadata=True,
            timeout=HUB_TIMEOUT_S,
        )
        _refuse_script(info)
        if info.gated:
            hub.auth_check(info.id, repo_type="dataset")
        facts = {"licence": _licence(info), "size": _size(info, request)}
        yield {"dataset_info": {"dataset": info.id, "revision": info.sha, **facts}}
        yield from ({"text": text[: request["max_bytes"]]} for text in _read_texts(info, request))
        yield {"end": True}
    except ImportError as error:
        library = f"the library datasets ({to_one_line(str(error))})"
        yield {
            "refused": f"reading {request['dataset']} needs {library}: pip install 'glasslm[hub]'"
        }
    except InputError as error:
        yield {"refused": str(error)}
    except Exception as error:  # of any kind: it is reported to the process that asked
        if exhausted := _describe_exhaustion(error, request):
            yield {"exhausted": exhausted}
            return
        yield _explain_error(error, request)


def _card(info: DatasetInfo) -> dict[str, Any]:
    data: Any = info.card_data
    return data.to_dict() if data else {}


def _licence(info: DatasetInfo) -> str:
    """The licence that the dataset card states."""
    card = _card(info)
    stated = card.get("license")
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated]) if name]
    if names == ["other"] and card.get("license_name"):
        names = [str(card["license_name"])]
    return f"licence {' and '.join(names)}" if names else "licence not stated"


def _size(info: DatasetInfo, request: Request) -> str:
    """The size of the split that the card states, else the size of all files."""
    card = _card(info)
    stated = card.get("dataset_info") or []
    for part in stated if isinstance(stated, list) else [stated]:
        if part.get("config_name", "default") == (request["config"] or "default"):
            for split in part.get("splits") or []:
                if split.get("name") == request["split"] and split.get("num_bytes"):
                    return f"{format_bytes(int(split['num_bytes']))} in all"
    total = sum(file.size or 0 for file in info.siblings or [])
    return f"files of {format_bytes(total)}" if total else "size not stated"


def _refuse_script(info: DatasetInfo) -> None:
    """Raise InputError for a dataset that consists of a program."""
    script = f"{info.id.rpartition('/')[2]}.py"
    if any(file.rfilename == script for file in info.siblings or []):
        raise InputError(
            f"{info.id} is a program ({script}) rather than files, and is never run here: take the "
            f"parquet files at {DATASETS_URL}/{info.id}/tree/refs%2Fconvert%2Fparquet, if there "
            "are any, with --text-file"
        )


def _read_texts(info: DatasetInfo, request: Request) -> Iterator[str]:
    dataset = _open_split(info, request)
    if dataset.features is None:  # JSON and CSV have no schema: the first row shows the types
        first_row: dict[str, Any] = next(iter(dataset), {})
        is_text = {name: isinstance(value, str) for name, value in first_row.items()}
    else:
        is_text = {
            name: getattr(feature, "dtype", None) in TEXT_DTYPES
            for name, feature in dataset.features.items()
        }
    column = choose_text_column(is_text, info.id, request["column"], "choose one with --hf-column")
    title = request["title"]
    for row in dataset.select_columns([title, column] if title else [column]):
        text = row[column]
        if not isinstance(text, str | None):
            raise InputError(
                f"column '{column}' of {info.id} holds {type(text).__name__} in some rows, not text"
            )
        if text:
            yield f"{row[title]}\n\n{text}" if title else text


def _open_split(info: DatasetInfo, request: Request) -> IterableDataset:
    """The split as a stream.

    Raises InputError for an unknown configuration or split, with the names that exist.
    """
    import datasets

    try:
        splits = datasets.load_dataset(
            info.id, request["config"], revision=info.sha, streaming=True
        )
    except ValueError:  # The configuration is unknown, or none was given and there is no default.
        names = datasets.get_dataset_config_names(info.id, revision=info.sha)
        if request["config"] is None and len(names) > 1:
            raise InputError(
                f"{info.id} has several configurations: "
                f"choose one with --hf-config: {list_names(names)}"
            ) from None
        if request["config"] is not None and request["config"] not in names:
            known = list_names(names, request["config"])
            raise InputError(
                f"{info.id} has no configuration '{request['config']}': there are {known}"
            ) from None
        raise
    if request["split"] not in splits:
        known = list_names(list(splits), request["split"])
        raise InputError(
            f"{info.id} has no split '{request['split']}': choose with --hf-split from {known}"
        )
    return splits[request["split"]]


def _explain_error(error: Exception, request: Request) -> dict[str, str]:
    """The last line to write for an error: {"refused": MESSAGE} or {"failed": REASON}."""
    from huggingface_hub import errors

    name, causes = request["dataset"], list(_causes(error))
    for cause in causes:
        if isinstance(cause, errors.GatedRepoError):
            cure = "accept its conditions there, then log in (`hf auth login`, or HF_TOKEN)"
            return {"refused": f"{DATASETS_URL}/{name} is open only to users with access: {cure}"}
        if isinstance(cause, errors.RevisionNotFoundError):
            return {"failed": f"the hub no longer has its revision {request['revision']}"}
        if isinstance(cause, errors.RepositoryNotFoundError):
            similar = _similar_datasets(name)
            cure = f"is it one of {', '.join(similar)}?" if similar else f"see {DATASETS_URL}"
            return {
                "refused": f"there is no dataset {name} on Hugging Face, or it is private: {cure}"
            }
        if isinstance(cause, errors.HfHubHTTPError):
            return {"failed": f"the server answers {cause.response.status_code}"}
    return {"failed": to_one_line(f"{type(causes[-1]).__name__}: {causes[-1]}")}


def _describe_exhaustion(error: Exception, request: Request) -> str:
    """What ran out in the reader; empty where nothing did."""
    try:
        raise_if_exhausted(error, f"a file of {request['dataset']}")
    except ExhaustedError as exhausted:
        return str(exhausted)
    except MemoryError:
        return (
            f"out of memory while {request['dataset']} was read: a part of it may unpack to far "
            f"more than its size (at most {format_bytes(MAX_READER_BYTES)} of memory are used): "
            "get its parquet files, and give them with --text-file, which reads in small parts"
        )
    return ""


def _similar_datasets(name: str) -> list[str]:
    """Ids of at most 3 datasets with a similar name; empty if the hub does not answer."""
    import huggingface_hub

    with suppress(Exception):
        datasets = huggingface_hub.HfApi().list_datasets(search=name.rpartition("/")[2], limit=3)
        return [dataset.id for dataset in datasets]
    return []


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


if __name__ == "__main__":
    main()
