"""The figure of docs/cookbook.md: the panels of the stability cookbook on one sheet.

    python benchmarks/cookbook_figure.py [--figure docs/cookbook.png --steps 120 --seeds 3]

The recipes are those of `glasslm diagnose --cookbook`, on Shakespeare. The script prints their
sentences and tables.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from glasslm import files
from glasslm.config.schema import ComputeConfig, DataConfig
from glasslm.lab.diagnosis import cookbook, cookbook_figures
from glasslm.lab.diagnosis.gradient_trials import STEPS
from glasslm.report import figures
from glasslm.text import notify


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", type=Path, default=Path("docs/cookbook.png"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = cookbook.run_cookbook(
            DataConfig(corpus="shakespeare"),
            ComputeConfig(),
            Path(folder),
            notify,
            args.steps,
            args.seeds,
        )
    sheet = cookbook_figures.draw_sheet(results, figures.PRINT_PALETTE)
    files.write_atomic(args.figure, figures.png(sheet))
    print(cookbook.format_text(results))


if __name__ == "__main__":
    main()
