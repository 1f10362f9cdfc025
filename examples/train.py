"""Train a small CNN with two heads on scikit-learn's digits: an MLP head and a SummaryHead, from the same start."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from interp_nn.nn import SummaryHead, follow, parameter_groups


def body() -> nn.Sequential:
    """Return the layers before the head, from the same seed each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())


def train(network: nn.Sequential, x: Tensor, y: Tensor, epochs: int = 12) -> None:
    """Train by the head's own loss, or by the cross entropy of its logits."""
    adam = torch.optim.AdamW(parameter_groups(network, 0.01), 3e-3)
    follow(adam, network)  # for layers with a spectral norm or a retraction; there are none here
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            features, head = network[0](x[batch]), network[1]
            if isinstance(head, SummaryHead):
                loss = head.loss(features, y[batch])  # cross entropies of both readings, and their difference
            else:
                loss = nn.functional.cross_entropy(head(features), y[batch])
            loss.backward()
            adam.step()
    network.eval()


def main() -> None:
    """Print the test accuracy of both heads, and how near the summary's two readings are."""
    images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    train_x, test_x, train_y, test_y = images[:1297], images[1297:], digits[:1297], digits[1297:]
    heads = {
        "mlp": lambda: nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
        "summary": lambda: SummaryHead(128, latent=32, num_classes=10),
    }
    for name, make in heads.items():
        network = nn.Sequential(body(), make())
        train(network, train_x, train_y)
        with torch.no_grad():
            right = (network(test_x).argmax(1) == test_y).float().mean()
        print(f"{name}: {100 * right:.1f} % of {len(test_y)} test images are right")
    first, second = network.train()(test_x)
    agree = (first.argmax(1) == second.argmax(1)).float().mean()
    print(f"both readings agree for {100 * agree:.1f} %; orthogonality defect {network[1].orthogonality_defect():.2f}")


if __name__ == "__main__":
    main()
