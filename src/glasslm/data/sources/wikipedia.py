"""The first articles of English Wikipedia, as plain text from wikimedia/wikipedia on Hugging Face.

The dataset card states CC BY-SA 3.0 and GFDL. The revision is fixed, so everyone has the same text.
"""

from __future__ import annotations

from glasslm.data.sources import hub
from glasslm.data.sources.hub import HubRequest
from glasslm.data.sources.text_files import Source
from glasslm.data.sources.texts import SEPARATOR
from glasslm.text import Notify

FACTS = (
    "50 MB of 20 GB (--max-bytes)",
    "CC BY-SA 3.0 and GFDL",
    "https://huggingface.co/datasets/wikimedia/wikipedia, 20231101.en; needs the extra [hub]",
)
DATASET, CONFIG = "wikimedia/wikipedia", "20231101.en"
REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
MANUAL_SUPPLY = (
    "to supply it by hand, get a parquet file from "
    f"https://huggingface.co/datasets/{DATASET}/tree/main/{CONFIG} and give it with --text-file"
)


def find_source(max_bytes: int, notify: Notify, separator: str = SEPARATOR) -> Source:
    """Articles, title first, of at most `max_bytes` bytes, with `separator` between them.

    Raises DownloadError when neither the cache nor the hub has them.
    """
    request = HubRequest(DATASET, CONFIG, "train", "text", max_bytes, "title", REVISION, separator)
    return hub.find_source("wikipedia", request, notify, MANUAL_SUPPLY)
