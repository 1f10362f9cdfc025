"""CIFAR-10: the reference's small CNN with its base head and with summary heads, with and without ReLU in the body.

The reference compares a base network with ReLU to a summary network without, so that its two accuracies differ in more than the
head. The published ones are of 15 epochs on all training images. A CPU gets fewer epochs of all, a GPU as many; nothing is
extrapolated.
"""

from __future__ import annotations

import sys

from benchmarks.experiments import head_comparison
from benchmarks.experiments.head_comparison import Published, Study, Variant
from benchmarks.experiments.images import Budget

NAME = "summary_cnn"
STUDY = Study(
    name=NAME,
    architecture="cnn",
    learning_rate=1e-3,
    variants={
        "base head": Variant("mlp", published=Published(0.5658, 0.7041, 0.7120, 252.4)),
        "summary, orthogonal": Variant("summary"),
        "summary, reference's init": Variant("summary", reference_init=True),
        "no ReLU: summary, orthogonal": Variant("summary", relu=False),
        "no ReLU: summary, reference's init": Variant(
            "summary", reference_init=True, relu=False, published=Published(0.3934, 0.6456, 0.6520, 258.0)
        ),
    },
    ours="summary, orthogonal",
    off_base=0.01,
    either_way=False,
    step_over_base=1.0,
    cpu=Budget(None, None, 4),
    gpu=Budget(None, None, 15),
    quick=Budget(32, 20, 1, batch=16),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 where the data are not to be had."""
    return head_comparison.main(STUDY, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
