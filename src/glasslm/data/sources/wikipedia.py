"""English Wikipedia, its first articles: from wikimedia/wikipedia on Hugging Face, which has them as plain text.

The card of that data set states CC BY-SA 3.0 and GFDL. The revision is fixed, so that everybody has the same text.
"""

from __future__ import annotations

from glasslm.data.sources import hub
from glasslm.data.sources.files import Source
from glasslm.data.sources.hub import Wanted
from glasslm.text import Say

FACTS = (
    "50 MB of 20 GB (--max-bytes)",
    "CC BY-SA 3.0 and GFDL",
    "https://huggingface.co/datasets/wikimedia/wikipedia, 20231101.en; needs the extra [hub]",
)
DATASET, CONFIG = "wikimedia/wikipedia", "20231101.en"
REVISION = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"
BY_HAND = (
    f"to supply it by hand, get a parquet file from https://huggingface.co/datasets/{DATASET}/tree/main/{CONFIG}, or a "
    "dump called pages-articles from https://dumps.wikimedia.org, and give it with --text-file"
)


def find(most: int, say: Say) -> Source:
    """Articles, title first, of `most` bytes in all. Raises DownloadError where neither cache nor hub has them."""
    wanted = Wanted(DATASET, CONFIG, "train", "text", most, title="title", revision=REVISION)
    return hub.find("wikipedia", wanted, say, BY_HAND)
