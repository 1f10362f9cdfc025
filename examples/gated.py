"""Gated networks: a table classified by half-spaces and read as a tree, and the kernel of a ReLU network's open paths."""

import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import nn

from interp_nn.explain import DLGNClassifier, NPKMachine, kernel_alignment, npk


def tree() -> None:
    """Fit a network whose gates are half-spaces, and print it as a tree of four leaves."""
    wine = load_wine()
    x, test_x, y, test_y = train_test_split(wine.data, wine.target, test_size=0.3, random_state=0)
    torch.manual_seed(0)
    model = DLGNClassifier((8, 8)).fit(x, y)
    small = model.to_tree(x).prune(4)
    print(f"DLGN: {100 * model.score(test_x, test_y):.1f} % of {len(test_x)} test rows are right")
    print(f"tree: the same answer for {100 * small.fidelity(torch.as_tensor(test_x)):.1f} % of them")
    print(small.to_text(list(wine.feature_names), list(wine.target_names)))


def kernel() -> None:
    """Train a ReLU network on digits below 5, and compare the kernel of its open paths before and after."""
    images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images, small = images.double() / 16, (digits < 5).long()
    train, test = slice(0, 600), slice(600, 1000)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 2)).double()
    adam = torch.optim.Adam(network.parameters(), 3e-3)
    for steps in (0, 150):
        for _ in range(steps):
            adam.zero_grad()
            nn.functional.cross_entropy(network(images[train]), small[train]).backward()
            adam.step()
        alignment = kernel_alignment(npk(network, images[test]), small[test])
        machine = NPKMachine(network, ridge=1e-3).fit(images[train], small[train])
        right = machine.score(images[test], small[test])
        print(f"after {steps} steps: alignment {alignment:.2f}, kernel machine {100 * right:.1f} % right")


if __name__ == "__main__":
    tree()
    kernel()
