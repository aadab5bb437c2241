"""Write sums with noisy answers, the text of docs/howto/preference.md.

    python examples/additions.py [additions.txt [LINES [NOISE]]]

Each answer is the sum plus a whole number drawn evenly from -NOISE to NOISE. So a model that has
learned this text is right with a probability of 1 / (2 NOISE + 1). No line has a sum that
`--reward addition` holds out.
"""

import sys
from pathlib import Path
from random import Random

from glasslm.training.preference.rewards import LARGEST_ADDEND, is_held_out


def noisy_sums(lines: int, noise: int, seed: int = 0) -> str:
    """`lines` lines such as "12+34=47"."""
    random = Random(seed)
    sums: list[str] = []
    while len(sums) < lines:
        a, b = (random.randrange(LARGEST_ADDEND + 1) for _ in range(2))
        if not is_held_out(a, b):
            sums.append(f"{a}+{b}={abs(a + b + random.randint(-noise, noise))}\n")
    return "".join(sums)


if __name__ == "__main__":
    path, lines, noise = (*sys.argv[1:], *("additions.txt", "60000", "2")[len(sys.argv) - 1 :])
    Path(path).write_text(noisy_sums(int(lines), int(noise)), encoding="utf-8", newline="\n")
