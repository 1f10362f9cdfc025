"""Oblique trees of gated networks: every number of a tree against the network that it was read from."""

import copy
import pickle

import pytest
import torch

from interp_nn.nn import DGN, DLGN, DLGNValueTensor, HardGate, SoftGate, permute_gates

F64 = torch.float64


def points(n=400, d=3, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(kind=DLGN, outputs=2, gate=None, widths=(4, 4), **options):
    torch.manual_seed(0)
    bias = {"bias": True, "dtype": F64, "gate": gate or HardGate()}
    return kind((3, *widths, outputs), **bias, **options)


NETWORKS = {
    "linear": lambda outputs: network(outputs=outputs),
    "shallow": lambda outputs: network(outputs=outputs, gating="shallow"),
    "value tensor": lambda outputs: network(DLGNValueTensor, outputs=outputs),
    "DGN": lambda outputs: network(DGN, outputs=outputs, gating="linear", value_input="ones"),
    "permuted": lambda outputs: permute_gates(network(outputs=outputs), (1, 0)),
}


def known(normals):
    """A network of the tree: u0 > 0 ? sign(u2) : sign(u1), in which u0 alone tells nothing."""
    model = DLGNValueTensor((len(normals[0]), 2, 4, 1), gating="shallow", gate=HardGate(), dtype=F64)
    u0, u1, u2 = normals
    with torch.no_grad():
        model.gating.layers[0].weight.copy_(torch.stack([u0, -u0]))
        model.gating.layers[1].weight.copy_(torch.stack([u1, -u1, u2, -u2]))
        model.value.weight.copy_(torch.tensor([[0.0, 0, 1, -1], [1, -1, 0, 0]], dtype=F64).unsqueeze(2))
    return model


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_tree_of_hard_gates_is_the_network_at_the_samples(name, outputs):
    model, x = NETWORKS[name](outputs), points()
    y = model(x).detach()
    tree = model.to_tree(x, task="regression")
    torch.testing.assert_close(tree(x), y, rtol=1e-13, atol=1e-13)
    assert tree.leaves > 3 and tree.fidelity(x) == pytest.approx(1, abs=1e-12)
    classes = model.to_tree(x)
    wanted = (y[:, 0] > 0).long() if outputs == 1 else y.argmax(1)
    assert torch.equal(classes.predict(x), wanted) and classes.fidelity(x) == 1
    assert torch.equal(tree.predict(x), tree(x))


@pytest.mark.parametrize("gate", [HardGate(), SoftGate(3.0, eps=0.1)], ids=["hard", "soft"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_nodes_are_those_of_the_networks_gates(gate, task):
    model, x = network(gate=gate, outputs=3), points()
    tree = model.to_tree(x, task=task, min_samples=5)
    y = model(x).detach()
    if task == "classification":
        y = torch.nn.functional.one_hot(y.argmax(1), 3).double()
    gates, planes = model.gates(x), model.effective_gate_weights()
    samples = {0: torch.arange(len(x))}
    for node in range(len(tree.no)):
        own = samples[node]
        assert len(own) == tree.count[node] >= 5
        torch.testing.assert_close(tree.value[node], y[own].mean(0), rtol=1e-13, atol=1e-13)
        assert tree.coverage[node] == len(own) / len(x)
        if tree.is_leaf[node]:
            assert tree.no[node] == tree.yes[node] == -1 and tree.gate[node].tolist() == [-1, -1]
            assert not tree.weight[node].any() and bool((tree.apply(x[own]) == node).all())
            continue
        layer, unit = tree.gate[node].tolist()
        assert torch.equal(tree.weight[node], planes[layer].weight[unit])
        assert torch.equal(tree.bias[node], planes[layer].bias[unit])
        on = gates.gates(layer)[own, unit]
        samples[int(tree.yes[node])], samples[int(tree.no[node])] = own[on], own[~on]
    leaves = tree.is_leaf.nonzero().squeeze(1)
    assert tree.leaves == len(leaves) and tree.coverage[leaves].sum() == pytest.approx(1)
    new = points(seed=2)
    agreed = model(new).argmax(1) == tree(new).argmax(1)
    if task == "classification":
        assert tree.fidelity(new) == agreed.double().mean().item()
    else:
        out = model(new).detach()
        lost = (out - tree(new)).square().sum() / (out - out.mean(0)).square().sum()
        assert tree.fidelity(new) == pytest.approx(1 - lost.item(), rel=1e-12)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_root_is_found_that_tells_nothing_alone(task):
    normals = torch.eye(3, dtype=F64) + 0.05 * points(3)
    normals[2] = normals[2] / 4 - normals[1]  # so that most steps across u0 change the sign
    model, x = known(normals), points(600)
    tree = model.to_tree(x, task=task)
    assert (tree.leaves, tree.depth) == (4, 2)
    angle = torch.cosine_similarity(tree.weight[0], normals[0], 0)
    assert abs(angle) == pytest.approx(1)
    sides = {tuple(abs(tree.weight[int(side[0])]).tolist()) for side in (tree.no, tree.yes)}
    assert sides == {tuple(abs(normals[i]).tolist()) for i in (1, 2)}
    new = points(600, seed=5)
    assert tree.fidelity(x) == tree.fidelity(new) == 1


def test_pruning_merges_the_weakest_leaves():
    model, x = network(outputs=3, gate=SoftGate(3.0)), points()
    tree = model.to_tree(x, task="regression", min_samples=5)
    y = model(x).detach()
    errors = []
    for leaves in range(tree.leaves, 0, -1):
        small = tree.prune(leaves)
        assert small.leaves <= leaves and len(small.no) == 2 * small.leaves - 1
        at = small.apply(x)
        for leaf in small.is_leaf.nonzero().squeeze(1):
            assert (at == leaf).sum() == small.count[leaf]
            torch.testing.assert_close(small.value[leaf], y[at == leaf].mean(0))
        assert bool((small.gate[small.is_leaf] == -1).all()) and not small.weight[small.is_leaf].any()
        errors.append((small(x) - y).square().sum().item())
    assert errors == sorted(errors)
    one = tree.prune(1)
    assert one.leaves == 1 and one.depth == 0 and one.fidelity(x) == pytest.approx(0, abs=1e-12)
    # The first merge is the cheapest of all pairs of leaves.
    costs = []
    for node in (~tree.is_leaf).nonzero().squeeze(1).tolist():
        if tree.is_leaf[tree.no[node]] and tree.is_leaf[tree.yes[node]]:
            sides = [int(side[node]) for side in (tree.no, tree.yes)]
            costs.append(sum(float(tree.count[i] * (tree.value[i] - tree.value[node]).square().sum()) for i in sides))
    assert errors[1] - errors[0] <= min(costs) * (1 + 1e-9)
    assert torch.equal(tree.prune(tree.leaves)(x), tree(x)) and tree.leaves > 5


def test_text():
    normals = torch.eye(3, dtype=F64)
    model = known(torch.stack([normals[0], normals[1], -normals[1] + normals[2] / 4]))
    tree = model.to_tree(points(600))
    text = tree.to_text(["age", "fare", "sex"], ["died", "survived"])
    lines = text.splitlines()
    assert lines[0] == "600 samples, 4 leaves, depth 2" and len(lines) == 8
    assert lines[1] in (f"{sign}1.00 age > 0?  [layer 0, gate {i}]" for i, sign in enumerate(("", "- ")))
    assert lines[2].startswith("|  yes: ") and lines[3].startswith("|  |  yes: ")
    assert sum(line.count("died, ") + line.count("survived, ") for line in lines) == 4
    assert str(tree) == tree.to_text() and "x0 > 0?" in str(tree)
    assert repr(tree) == "ObliqueTree(classification, 4 leaves, depth 2, 600 samples)"
    value = tree.value[0]
    assert str(tree.prune(1)).endswith(f"{int(value.argmax())} ({100 * value.max():.0f} %), 100.0 % of samples")
    wide = network(outputs=2).to_tree(points(), task="regression")
    assert "+ 2 more > " in wide.to_text(terms=1)
    with pytest.raises(ValueError, match="feature_names: got 2 names, want 3"):
        tree.to_text(["a", "b"])
    with pytest.raises(ValueError, match="class_names: got 3 names, want 2"):
        tree.to_text(class_names="abc")


def test_one_response_or_no_gate_that_divides_is_a_leaf():
    model, x = network(), points()
    assert model.to_tree(x[:1]).leaves == 1
    assert model.to_tree(x, min_samples=len(x)).leaves == 1
    torch.nn.init.zeros_(model.value.layers[-1].weight)
    constant = model.to_tree(x, task="regression")
    assert constant.leaves == 1 and constant.fidelity(x) != constant.fidelity(x)  # NaN
    for layer in model.gating.layers:
        torch.nn.init.zeros_(layer.weight)
    assert model.to_tree(x).leaves == 1


def test_the_network_is_not_changed_and_trees_are_copied():
    model, x = network(gate=SoftGate()).train(), points(100)
    state = copy.deepcopy(model.state_dict())
    tree = model.to_tree(x, min_samples=5)
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = pickle.loads(pickle.dumps(tree))
    assert torch.equal(again(x), tree(x)) and again.fidelity(x) == tree.fidelity(x)
    assert not tree(x).requires_grad


def test_refusals():
    x = points(10)
    model = network()
    for make, error, text in (
        (lambda: network(DGN, value_input="ones").to_tree(x), ValueError, "gating: is 'relu'"),
        (lambda: network(value_input="x").to_tree(x), ValueError, "value_input: is 'x'"),
        (lambda: model.to_tree(x.float()), TypeError, "x: got torch.float32, want a tensor of .* torch.float64"),
        (lambda: model.to_tree(x.numpy()), TypeError, "x: got ndarray"),
        (lambda: model.to_tree(x[:, :2]), ValueError, r"x: got shape \(10, 2\), want finite samples \(n, 3\)"),
        (lambda: model.to_tree(x[:0]), ValueError, "n > 0"),
        (lambda: model.to_tree(x / 0), ValueError, "finite"),
        (lambda: model.to_tree(x, task="ranking"), ValueError, "task: got 'ranking'"),
        (lambda: model.to_tree(x, min_samples=0), ValueError, "min_samples: got 0"),
        (lambda: model.to_tree(x).prune(0), ValueError, "leaves: got 0"),
        (lambda: model.to_tree(x)(x[0]), ValueError, r"x: got shape \(3,\), want \(n, 3\)"),
    ):
        with pytest.raises(error, match=text):
            make()
