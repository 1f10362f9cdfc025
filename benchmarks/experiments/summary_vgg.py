"""CIFAR-10: vgg11 with the reference's base head and with a summary head, from the reference's initialisation of b and from ours.

The published accuracies are of 15 epochs on all training images. A CPU gets the reduced budget that the record states, a GPU the
full one; nothing is extrapolated.
"""

from __future__ import annotations

import sys

from benchmarks.experiments import head_comparison
from benchmarks.experiments.head_comparison import Published, Study, Variant
from benchmarks.experiments.images import Budget

NAME = "summary_vgg"
BASE = "base head"
STUDY = Study(
    name=NAME,
    architecture="vgg11",
    learning_rate=1e-4,
    variants={
        BASE: Variant("mlp", published=Published(0.4926, 0.7677, 0.7677, 393.2)),
        "summary head, orthogonal": Variant("summary"),
        "summary head, reference's init": Variant(
            "summary", reference_init=True, published=Published(0.1834, 0.7649, 0.7692, 392.3)
        ),
    },
    ours="summary head, orthogonal",
    off_base=0.015,
    either_way=True,
    step_over_base=1.02,
    cpu=Budget(32_000, 2000, 1),
    gpu=Budget(None, None, 15),
    quick=Budget(8, 8, 1, batch=4),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 where the data are not to be had."""
    return head_comparison.main(STUDY, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
