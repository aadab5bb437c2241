"""Write sums with noisy answers, the text of docs/howto/preference.md.

    python examples/additions.py [additions.txt [LINES [NOISE [RIGHT]]]]

Each answer is the sum plus a whole number drawn evenly from -NOISE to NOISE, except in a share
RIGHT of the lines, where it is the sum. So a model that has learned this text is right with a
probability of 1 / (2 NOISE + 1) if RIGHT is 0. No line has a sum that `--reward addition` holds
out.
"""

import sys
from pathlib import Path
from random import Random

from glasslm.training.preference.rewards import LARGEST_ADDEND, is_held_out


def noisy_sums(lines: int, noise: int, right: float = 0.0, seed: int = 0) -> str:
    """`lines` lines such as "12+34=47"."""
    random = Random(seed)
    sums: list[str] = []
    while len(sums) < lines:
        a, b = (random.randrange(LARGEST_ADDEND + 1) for _ in range(2))
        if is_held_out(a, b):
            continue
        error = 0 if random.random() < right else random.randint(-noise, noise)
        sums.append(f"{a}+{b}={abs(a + b + error)}\n")
    return "".join(sums)


if __name__ == "__main__":
    defaults = ("additions.txt", "60000", "2", "0")
    path, lines, noise, right = (*sys.argv[1:], *defaults[len(sys.argv) - 1 :])
    text = noisy_sums(int(lines), int(noise), float(right))
    Path(path).write_text(text, encoding="utf-8", newline="\n")
