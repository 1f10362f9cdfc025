"""Convert a trained MLP to summary layers with the same outputs, train it on other data, and fold it back."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from interp_nn.convert import fold, summarize
from interp_nn.nn import follow, parameter_groups


def fit(network: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train in place. Make the optimizer after the conversion, which adds gains."""
    adam = torch.optim.AdamW(parameter_groups(network, 0.01), 3e-3)
    follow(adam, network)  # updates the layers' spectral norms after each step
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            adam.step()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> str:
    """Return the share of right answers, as text."""
    return f"{100 * (network(x).argmax(1) == y).float().mean():.1f} %"


def main() -> None:
    """Print the accuracy before and after each step."""
    images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 8, 8) / 16
    upright, turned = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)
    train, test = slice(None, 1297), slice(1297, None)

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(network, upright[train], digits[train], epochs=8)
    print("plain, upright digits:", accuracy(network, upright[test], digits[test]))

    before = network(upright[test]).detach()
    print(summarize(network, polynomial="newton-schulz"))
    print(f"largest change of an output: {(network(upright[test]) - before).abs().max():.0e}")
    print("converted, turned digits:", accuracy(network, turned[test], digits[test]))

    fit(network, turned[train], digits[train], epochs=8)
    print("trained on turned digits:", accuracy(network, turned[test], digits[test]))

    fold(network)
    print("folded to plain layers:", accuracy(network, turned[test], digits[test]), network[0])


if __name__ == "__main__":
    main()
