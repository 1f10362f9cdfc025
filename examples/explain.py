"""Explain a network on a table: a row as an exact sum, all rows by few maps, and a page: python explain.py [page.html]."""

import sys

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from interp_nn.explain import ActivationClusters, linearize, report


def main(page: str | None = None) -> None:
    """Print the explanations, and write the page if a file is given.

    Args:
        page: File for the HTML page, or None.
    """
    data = load_breast_cancer()
    names = list(data.feature_names)
    x, y = torch.as_tensor(data.data), torch.as_tensor(data.target)
    x = (x - x.mean(0)) / x.std(0)
    x, y, test_x, test_y = x[:400], y[:400], x[400:], y[400:]

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    adam = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(100):
        adam.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        adam.step()
    network.eval()

    affine = linearize(network, test_x)  # F(x) = W x + b at each row
    print(affine, f"error {affine.check():.0e}")
    benign = affine.contrast(1, 0)  # logit 1 minus logit 0
    parts = benign.contributions(test_x)[0]
    print(f"row 0: {benign(test_x)[0]:+.2f} for {data.target_names[1]}, {benign.bias[0]:+.2f} of it constant")
    for i in parts.abs().topk(3).indices.tolist():
        print(f"  {names[i]}: {parts[i]:+.2f}")

    few = ActivationClusters(network).fit(x).merge()
    fidelity = few.fidelity(test_x)
    print(
        f"{len(few.counts_)} maps for all rows: the network's answer for {100 * fidelity.agreement:.1f} % of test rows"
    )

    if page is not None:
        report(network, test_x, test_y, feature_names=names, class_names=list(data.target_names)).save(page)
        print(f"wrote {page}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
