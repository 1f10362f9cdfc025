import math
import pickle
import time
import warnings

import numpy as np
import pandas
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import r2_score, roc_auc_score
from torch import nn
from torch.nn import functional

from benchmarks.experiments.tabular import mlp
from interp_nn.explain.clusters import activation_clusters
from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.estimator import NotFittedError
from interp_nn.explain.following.gate_record import supported_ops
from interp_nn.explain.linear.regions import region
from interp_nn.gates.patterns import ActivationPatterns

SINGLE = "ignore:x. .* clusters hold a single sample:UserWarning"
pytestmark = pytest.mark.filterwarnings(SINGLE)


def fitted(*widths, n=300, y=None, seed=0, **options):
    model = mlp(*widths, seed=seed)
    x = torch.randn(n, widths[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ActivationClusters(model, **options).fit(x, y), model, x


def hidden(model, x):
    """The preactivations of an MLP's hidden layers."""
    found = []
    for layer in model:
        if isinstance(layer, nn.ReLU):
            found.append(x)
        x = layer(x)
    return found


def test_clusters_are_the_samples_that_share_a_pattern():
    clusters, model, x = fitted(3, 6, 5, 2)
    gates = torch.cat([z > 0 for z in hidden(model, x)], 1)
    same = (gates.unsqueeze(1) == gates).all(2)
    assert torch.equal(clusters.labels_.unsqueeze(1) == clusters.labels_, same)
    assert torch.equal(clusters.patterns_.unpack()[clusters.labels_], gates)
    assert torch.equal(clusters.counts_, clusters.labels_.bincount())
    assert clusters.counts_.tolist() == sorted(clusters.counts_.tolist(), reverse=True)
    margin = torch.cat(hidden(model, x), 1).abs().amin(1)
    torch.testing.assert_close(clusters.margin_, margin)
    assert torch.equal(clusters.coverage(), clusters.counts_.cumsum(0).double() / 300)
    assert torch.equal(clusters.affine_[2].weight.squeeze(0), clusters.affine_.weight[2])
    assert not clusters.affine_.weight.requires_grad
    assert len(clusters.affine_.bias) == len(clusters.counts_) < 300 and not clusters.outputs_.requires_grad


class Shared(nn.Module):
    """One network for both halves of a sample, one batch after the other."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()

    def forward(self, x):
        first, second = self.encoder(torch.cat([x[:, :2], x[:, 2:]])).chunk(2)
        return first - second


def test_a_model_that_reorders_samples_is_clustered_one_at_a_time():
    model, x = Shared(), torch.randn(60, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the gates of encoder.1 .* one sample at a time \(chunk_size=1\)"):
        ActivationClusters(model).fit(x)
    clusters = ActivationClusters(model, chunk_size=1).fit(x)
    assert clusters.check() <= 1e-12 and torch.equal(clusters.predict(x[:7]), clusters.labels_[:7])


def test_maps_are_products_of_the_active_weights():
    clusters, model, _ = fitted(3, 6, 5, 2)
    for c in range(len(clusters.counts_)):
        first, second = (g.double().squeeze(0) for g in clusters.patterns_[c].unpack().split([6, 5], 1))
        a, b, out = (model[i] for i in (0, 2, 4))
        weight = out.weight * second @ b.weight * first @ a.weight
        bias = out.weight * second @ (b.weight * first @ a.bias + b.bias) + out.bias
        torch.testing.assert_close(clusters.affine_.weight[c], weight)
        torch.testing.assert_close(clusters.affine_.bias[c], bias)


def test_the_check_fails_for_other_maps():
    clusters, model, _ = fitted(3, 6, 1)
    assert clusters.check() < 1e-12
    with torch.no_grad():
        model[2].bias += 1e-3
    del clusters.affine_
    assert 1e-5 < clusters.check() < 1e-1


def test_outputs_of_no_and_of_several_dimensions():
    x = torch.randn(60, 4, dtype=torch.float64)
    model = mlp(4, 8, 6)
    flat = ActivationClusters(model).fit(x)
    for shape in ((), (2, 3)):
        head = nn.Unflatten(1, shape) if shape else nn.Flatten(0)
        last = mlp(4, 8, 1) if not shape else model
        clusters = ActivationClusters(nn.Sequential(last, head)).fit(x)
        assert clusters.outputs_.shape == (60, *shape) and clusters.check() < 1e-12
        assert clusters.surrogate(x).shape == (60, *shape)
        assert clusters.fidelity().r2 == pytest.approx(1) and str(clusters.table())
    torch.testing.assert_close(clusters.importance(5), flat.importance(5))
    assert clusters.affine_.weight.shape == (len(clusters.counts_), 2, 3, 4)


def test_inputs_of_several_dimensions():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(50, 1, 4, 4, dtype=torch.float64)
    clusters = ActivationClusters(model, chunk_size=7).fit(x)
    assert clusters.check() < 1e-12
    for kind, length in (("coef", len(clusters.counts_)), ("contribution", 50)):
        assert clusters.importance(1, kind).shape == (length, 1, 4, 4)
    assert clusters.global_importance().mean.shape == (1, 4, 4)
    assert clusters.global_importance().mean.sum() == pytest.approx(1)


def test_importance():
    clusters, _, x = fitted(3, 6, 1)
    weight, std = clusters.affine_.weight[:, 0], x.std(0, correction=0)
    torch.testing.assert_close(clusters.importance(), weight)
    torch.testing.assert_close(clusters.importance(kind="scaled"), weight.abs() * std)
    share = clusters.importance(kind="share")
    torch.testing.assert_close(share, weight.abs() * std / (weight.abs() * std).sum(1, keepdim=True))
    # The output of a sample is its contributions, and its cluster's map at the mean.
    contribution = clusters.importance(kind="contribution")
    at_mean = (weight @ x.mean(0) + clusters.affine_.bias[:, 0])[clusters.labels_]
    torch.testing.assert_close(contribution.sum(1) + at_mean, clusters.outputs_[:, 0])
    mean, dispersion = clusters.global_importance()
    own = share[clusters.labels_]
    torch.testing.assert_close(mean, own.mean(0))
    torch.testing.assert_close(dispersion, own.std(0, correction=0))


def test_importance_of_classes_does_not_see_what_all_share():
    model, x = mlp(3, 8, 4), torch.randn(100, 3, dtype=torch.float64)
    before = ActivationClusters(model).fit(x)
    raw_before = before.importance(2, centre=False)
    with torch.no_grad():
        model[2].weight += torch.randn(8, dtype=torch.float64)
    after = ActivationClusters(model).fit(x)
    torch.testing.assert_close(before.importance(2), after.importance(2))
    raw = after.importance(2, centre=False)
    torch.testing.assert_close(raw, after.affine_.weight[:, 2])
    assert not torch.allclose(raw, raw_before)


def test_projected_coefficients_tell_the_samples_apart_as_the_map_does():
    """Two columns that add up to one: only the difference of their coefficients is the network's to say."""
    model, x = mlp(4, 6, 1), torch.randn(200, 4, dtype=torch.float64)
    x[:, 2] = (x[:, 2] > 0).double()
    x[:, 3] = 1 - x[:, 2]
    clusters = ActivationClusters(model).fit(x)
    projected = clusters.importance(project=True)
    torch.testing.assert_close(projected[:, 2], -projected[:, 3])
    full = clusters.rank_ == clusters.rank_.max()
    assert clusters.rank_.max() == 4 and bool(full.any())
    got = projected[full]
    wanted = clusters.importance()[full]
    torch.testing.assert_close(got[:, :2], wanted[:, :2])
    torch.testing.assert_close(got[:, 2] - got[:, 3], wanted[:, 2] - wanted[:, 3])


def test_small_patterns_are_no_clusters():
    every, model, x = fitted(3, 8, 1)
    some = ActivationClusters(model, min_size=5).fit(x)
    kept = int((every.counts_ >= 5).sum())
    assert 0 < kept < len(every.counts_)
    assert torch.equal(some.counts_, every.counts_[:kept]) and some.patterns_ == every.patterns_[:kept]
    assert torch.equal(some.labels_, torch.where(every.labels_ < kept, every.labels_, -1))
    assert torch.equal(some.predict(x), some.labels_)
    assert some.coverage()[-1] == (some.labels_ >= 0).double().mean() < 1
    assert some.check() < 1e-12 and some.fidelity().r2 == pytest.approx(1)
    assert torch.equal(some.importance(kind="contribution").isnan().any(1), some.labels_ == -1)
    assert some.rank_.tolist() == every.rank_[:kept].tolist()
    assert torch.equal(some.merge(by=torch.zeros(kept).long()).labels_, torch.where(some.labels_ < 0, -1, 0))


def test_unseen_patterns_are_flagged_or_go_to_the_nearest_cluster():
    clusters, model, x = fitted(3, 8, 6, 1, n=60)
    new = 3 * torch.randn(500, 3, dtype=torch.float64)
    labels, nearest = clusters.predict(new), clusters.predict(new, unseen="nearest")
    gates = torch.cat([z > 0 for z in hidden(model, new)], 1)
    patterns = ActivationPatterns.from_gates(gates)
    distance = patterns.hamming(clusters.patterns_)
    assert torch.equal(labels >= 0, (distance == 0).any(1)) and 0 < int((labels < 0).sum()) < 500
    assert torch.equal(labels[labels >= 0], distance.argmin(1)[labels >= 0])
    rows = torch.arange(500)
    assert torch.equal(distance[rows, nearest], distance.amin(1))
    assert torch.equal(clusters.predict(x), clusters.labels_)
    seen = labels >= 0
    torch.testing.assert_close(clusters.surrogate(new)[seen], model(new)[seen].detach())
    assert clusters.fidelity().r2 == pytest.approx(1) and clusters.fidelity(new).r2 < 1 - 1e-6


def test_a_region_is_where_the_map_holds():
    clusters, _, x = fitted(3, 6, 5, 1)
    new = torch.randn(400, 3, dtype=torch.float64)
    labels = clusters.predict(new)
    for c in (0, len(clusters.counts_) - 1):
        region = clusters.region(c)
        assert torch.equal(region.contains(x), clusters.labels_ == c)
        assert torch.equal(region.contains(new), labels == c)


def test_merging_what_has_the_same_map_loses_nothing():
    """Units that reach no output have gates that only split clusters."""
    clusters, model, _ = fitted(3, 6, 1)
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
    clusters.fit(clusters.inputs_)
    merged = clusters.merge(by="affine")
    alive = clusters.patterns_.unpack()[:, 1::2].unique(dim=0)
    assert len(merged.counts_) == len(alive) < len(clusters.counts_)
    assert merged.check() < 1e-12 and merged.counts_.sum() == 300
    assert repr(merged) == f"MergedClusters({len(clusters.counts_)} clusters merged into {len(alive)})"


def test_steep_maps_do_not_make_others_equal():
    """One cluster with coefficients in the thousands, in fp32; and an input that is constant in the data, but not elsewhere."""
    hidden, last = nn.Linear(2, 3), nn.Linear(3, 1)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]))
        hidden.bias.copy_(torch.tensor([0.0, 0.0, -0.9]))
        last.weight.copy_(torch.tensor([[0.001, 0.002, 5000.0]]))
    x = torch.stack([torch.linspace(-1, 1, 201) + 1e-3, torch.zeros(201)], 1)
    clusters = ActivationClusters(nn.Sequential(hidden, nn.ReLU(), last)).fit(x)
    assert len(clusters.merge(by="affine").counts_) == len(clusters.counts_) == 3


@pytest.mark.parametrize("by", ["coef", "hamming", "npk"])
def test_merged_clusters_stand_for_the_network(by):
    clusters, _, x = fitted(3, 12, 8, 2, n=400)
    count = len(clusters.counts_)
    scores = [clusters.merge(m, by=by).fidelity().r2 for m in (count, 20, 1)]
    assert scores[0] == pytest.approx(1, abs=1e-12) and scores[0] > scores[1] > scores[2]
    merged, plain = clusters.merge(20, by=by), clusters.merge(20, by=by, refit=False)
    assert len(merged.counts_) == 20 and torch.equal(merged.labels_, plain.labels_)
    assert torch.equal(merged.labels_, merged.members_[clusters.labels_])
    assert torch.equal(merged.counts_, merged.labels_.bincount())
    assert merged.fidelity().r2 > plain.fidelity().r2 > 0.8
    assert merged.fidelity().agreement > 0.9 and merged.check() > 1e-6
    assert torch.equal(merged.predict(x), merged.labels_)
    assert clusters.merge(20, by=by).affine_.weight.equal(merged.affine_.weight)
    assert str(merged.table()) and merged.importance().shape == (20, 3)


def test_one_merged_cluster_is_linear_regression():
    clusters, _, x = fitted(3, 12, 1)
    merged = clusters.merge(1, by="coef")
    design = functional.pad(x, (0, 1), value=1.0)
    solution = torch.linalg.lstsq(design, clusters.outputs_).solution
    best = r2_score(clusters.outputs_, design @ solution)
    assert best - 0.01 < merged.fidelity().r2 <= best  # a small penalty may be better for samples that are left out
    plain = clusters.merge(1, by="coef", refit=False)
    weight = (clusters.counts_ / 300).double().unsqueeze(1)
    torch.testing.assert_close(plain.affine_.weight[0, 0], (weight * clusters.affine_.weight[:, 0]).sum(0))


def test_merged_clusters_of_few_samples_hold_for_new_ones():
    """With about as many samples in a cluster as inputs, a fit to those samples would be far off for others."""
    model = mlp(20, 24, 1, seed=1)
    x, new = torch.randn(400, 20, dtype=torch.float64), torch.randn(400, 20, dtype=torch.float64)
    clusters = ActivationClusters(model).fit(x)
    for by in ("coef", "hamming"):
        one, many = (clusters.merge(m, by=by).fidelity(new).r2 for m in (1, 20))
        assert many > one - 0.05 and many > clusters.merge(20, by=by, refit=False).fidelity(new).r2 - 0.02


def test_merging_by_groups_such_as_a_level_of_the_tree():
    clusters, model, x = fitted(3, 5, 8, 1)
    tree = clusters.tree()
    assert [level.layer for level in tree.levels] == [site.name for site in clusters.sites_] and len(tree) == 2
    assert torch.equal(tree.levels[1].nodes, torch.arange(len(clusters.counts_)))
    merged = clusters.merge(by=tree.levels[0].nodes)
    first = ActivationPatterns.from_preactivations(hidden(model, x)[0]).groups()
    assert sorted(merged.counts_.tolist()) == sorted(first.counts.tolist())
    second = clusters.merge(by=clusters.layer_patterns(1).groups().labels)
    own = ActivationPatterns.from_preactivations(hidden(model, x)[1]).groups()
    assert sorted(second.counts_.tolist()) == sorted(own.counts.tolist())
    assert clusters.layer_patterns(clusters.sites_[0].name) == clusters.layer_patterns(-2)
    assert len(clusters.tree(1)) == 1


def test_fidelity():
    model = mlp(2, 6, 3)
    x = torch.randn(200, 2, dtype=torch.float64)
    merged = ActivationClusters(model).fit(x).merge(2)
    wanted, got = model(x).detach(), merged.surrogate(x)
    r2, agreement = merged.fidelity(x)
    assert r2 == pytest.approx(r2_score(wanted, got, multioutput="variance_weighted"))
    assert agreement == (wanted.argmax(1) == got.argmax(1)).double().mean() and merged.fidelity() == (r2, agreement)
    with torch.no_grad():
        model[2].weight.zero_()
    constant = ActivationClusters(model).fit(x)
    assert math.isnan(constant.fidelity().r2) and constant.check() == 0


def test_a_table_of_regression():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, 0] + 0.1 * torch.randn(300, dtype=torch.float64)
    clusters, _, x = fitted(3, 5, 1, y=y)
    table = clusters.table(feature_names=["age", "fare", "sex"], rows=4)
    assert table.score == "R²" and torch.equal(table.count, clusters.counts_[:4])
    for c in range(4):
        own = clusters.labels_ == c
        fitted_by = (x @ clusters.affine_.weight[c, 0] + clusters.affine_.bias[c, 0]).numpy()
        assert table.mean[c] == pytest.approx(y[own].mean().item())
        assert table.std[c] == pytest.approx(y[own].std().item())
        assert table.local[c] == pytest.approx(r2_score(y[own], fitted_by[own]))
        assert table.overall[c] == pytest.approx(r2_score(y, fitted_by))
    lines = str(table).splitlines()
    assert lines[0].startswith(f"300 samples in {len(clusters.counts_)} clusters, max |W x + c - F| / max |F| = ")
    assert lines[1].startswith("largest 1: ") and lines[1].endswith(f"largest {len(clusters.counts_)}: 100.0 %")
    order = table.importance.mean.argsort(descending=True).tolist()
    names = " ".join(("age", "fare", "sex")[j] for j in order)
    header = f"cluster samples response std R² here R² on all rank {names}"
    assert " ".join(lines[2].split()) == header
    assert lines[3].split()[:2] == ["0", str(int(clusters.counts_[0]))]
    assert lines[9] == f"and {len(clusters.counts_) - 4} smaller clusters"
    legend = " ".join(lines[10:])
    assert all(f"{column}" in legend for column in ("response", "std", "R² here", "on all", "rank", "share", "±"))


def test_a_table_of_classes():
    """Of several outputs, one class against the rest, by its logit less their mean; one-class clusters have no AUC."""
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = mlp(12, 2, 3)
    y = (model(x) + torch.randn(200, 3)).argmax(1)
    clusters = ActivationClusters(model).fit(x, y)
    table = clusters.table(1)
    assert table.score == "AUC" and len(table.count) == len(clusters.counts_) <= 4
    centred = clusters.affine_.weight[:, 1] - clusters.affine_.weight.mean(1)
    for c in range(len(clusters.counts_)):
        own, score = clusters.labels_ == c, x @ centred[c]
        assert table.local[c] == pytest.approx(roc_auc_score(y[own] == 1, score[own]))
        assert table.overall[c] == pytest.approx(roc_auc_score(y == 1, score))
        assert table.mean[c] == pytest.approx((y[own] == 1).double().mean().item())
    assert "and 4 features of less importance" in str(table) and str(table).startswith("output 1 of 3: 200 samples")
    assert "features: output, less the mean of the 3 outputs, per unit" in str(table)
    plain = str(clusters.table(-1, centre=False))
    assert plain.startswith("output 2 of 3: 200 samples") and "features: output per unit" in plain
    alone = clusters.fit(x, torch.where(clusters.labels_ == 0, 1, y)).table(1)
    assert math.isnan(alone.local[0]) and str(alone).splitlines()[3].split()[4] == "-"


def test_a_table_of_a_data_frame_keeps_its_names():
    x = pandas.DataFrame(np.random.default_rng(0).normal(size=(300, 10)), columns=[f"column {j}" for j in "abcdefghij"])
    clusters = ActivationClusters(mlp(10, 3, 1)).fit(x)
    for made in (clusters, clusters.merge(2)):
        table = made.table(rows=2)
        frame = table.to_pandas()
        order = table.importance.mean.argsort(descending=True).tolist()
        assert list(frame.columns[5:]) == [x.columns[j] for j in order] and frame.index.name == "cluster"
        np.testing.assert_allclose(frame.iloc[:, 5:], table.coefficients[:, order])
        np.testing.assert_allclose(frame["share"] * 300, frame["samples"])
        shown = [name for name in str(table).splitlines()[2].split("  ") if name.startswith("column")]
        assert shown == [x.columns[j] for j in order[:8]] and str(table) == repr(table)
    html = clusters.table(feature_names=[f"<{j}>" for j in range(10)])._repr_html_()
    assert html.count("<tr>") == 1 + len(clusters.counts_[:10]) + 2 and "&lt;0&gt;" in html and "<0>" not in html


def test_a_table_is_drawn():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    clusters, _, _ = fitted(3, 5, 1)
    table = clusters.table(feature_names=["age", "fare", "sex"], rows=4)
    axes = table.plot()
    order = table.importance.mean.argsort(descending=True).tolist()
    np.testing.assert_allclose(axes.images[0].get_array(), table.coefficients[:, order])
    share = int(table.count[0]) / 300
    assert f"({share:.1%})" in axes.get_yticklabels()[0].get_text()
    plt.close(axes.figure)


@pytest.mark.filterwarnings("default:x. .* clusters hold a single sample:UserWarning")
def test_most_clusters_of_one_sample_are_warned_of():
    with pytest.warns(UserWarning, match=r"x: \d+ of \d+ clusters hold a single sample, .* merge\(\)"):
        fitted(20, 24, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(20, 24, 1, n=12)  # no more than one reads
        fitted(3, 5, 1)
        fitted(3, 12, 8, 2, n=400, min_size=2)


def test_merge_makes_the_fewest_clusters_that_reach_the_target():
    clusters, _, _ = fitted(3, 12, 8, 1, n=600)
    merged = clusters.merge()
    few, closer = len(merged.counts_), clusters.merge(target=0.99)
    assert 1 < few < len(closer.counts_) <= 12
    for one, target in ((merged, 0.95), (closer, 0.99)):
        assert one.held_out_.r2 >= target and f"R² {one.held_out_.r2:.3f}" in repr(one)
    fixed = clusters.merge(few)
    assert fixed.held_out_ is None and torch.equal(fixed.labels_, merged.labels_)
    assert closer.one_map_ == merged.one_map_ and merged.one_map_.r2 < merged.held_out_.r2 and fixed.one_map_ is None
    assert repr(merged).endswith(f"; one map R² {merged.one_map_.r2:.3f}, agreement {merged.one_map_.agreement:.1%})")
    assert "on the held-out samples that chose the number" in repr(merged) and "one map" not in repr(fixed)
    new = torch.randn(2000, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert merged.fidelity(new).r2 == pytest.approx(merged.held_out_.r2, abs=0.05)
    assert torch.equal(clusters.merge().labels_, merged.labels_)


def test_merge_says_when_no_few_clusters_reach_the_target():
    clusters, _, _ = fitted(3, 40, 40, 1, n=200)
    said = r"target: \d+ clusters reach an R² of 0\.\d+ .* below 0.9999, and no other .* up to 12 .* merge\(n_clusters=\.\.\.\)$"
    with pytest.warns(UserWarning, match=said):
        merged = clusters.merge(by="hamming", target=0.9999)
    assert len(merged.counts_) <= 12 and merged.held_out_.r2 < 0.9999


def test_merge_says_where_one_map_gives_the_networks_answer_more_often():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).double()
    clusters = ActivationClusters(model).fit(torch.randn(100, 6).double())
    with pytest.warns(UserWarning, match=r"One map gives the network's answer more often: 100\.0% against 95\.0%$"):
        merged = clusters.merge(target=0.9999)
    assert merged.one_map_.agreement > merged.held_out_.agreement


def test_merge_of_a_constant_network_and_of_too_few_samples():
    model = mlp(2, 3, 1)
    with torch.no_grad():
        model[-1].weight.zero_()
    assert len(ActivationClusters(model).fit(torch.randn(50, 2).double()).merge().counts_) == 1
    with pytest.raises(ValueError, match="n_clusters: got None, but 1 samples are too few"):
        ActivationClusters(model).fit(torch.randn(1, 2).double()).merge()


def test_a_table_of_the_networks_own_output():
    clusters, _, _ = fitted(3, 6, 1)
    table = clusters.table()
    assert table.score is None and "R²" not in str(table)
    assert len(clusters.table(rows=0).count) == 0 and "share" in str(clusters.table(rows=0))
    assert table.mean[0] == pytest.approx(clusters.outputs_[clusters.labels_ == 0].mean().item())


def test_the_response_is_centred_as_the_coefficients_are():
    clusters, _, x = fitted(3, 6, 3)
    own = clusters.labels_ == 0
    for centre in (True, False):
        table = clusters.table(1, centre=centre)
        constant = clusters.affine_.bias[0, 1] - (clusters.affine_.bias[0].mean() if centre else 0)
        assert table.mean[0] == pytest.approx((x[own] @ table.coefficients[0] + constant).mean().item())
        assert ("network's output, less the mean of the 3 outputs\n" in str(table)) == centre


def test_what_scikit_learn_expects():
    clusters, model, x = fitted(3, 6, 1, min_size=2, chunk_size=50)
    assert clusters.get_params() == {"model": model, "min_size": 2, "chunk_size": 50, "progress": None}
    copy = clone(clusters)
    assert copy.min_size == 2 and copy.model is not model and not hasattr(copy, "labels_")
    assert torch.equal(copy.fit(x.numpy()).labels_, clusters.labels_)
    assert clusters.set_params(min_size=1) is clusters and clusters.fit(x.tolist()).labels_.min() == 0
    assert repr(copy.set_params(min_size=1)).startswith("ActivationClusters(300 samples in ")
    with pytest.raises(ValueError, match="size: not a parameter; want one of model, min_size, chunk_size"):
        clusters.set_params(size=1)
    rows = np.zeros((2, 3))
    rows.flags.writeable = False
    single = ActivationClusters(mlp(3, 6, 1, dtype=torch.float32)).fit(rows, rows[:, 0])
    assert single.inputs_.dtype == torch.float32 and single.counts_.tolist() == [2]


def test_fitting_again_forgets():
    clusters, _, x = fitted(3, 6, 1)
    before = clusters.affine_, clusters.rank_
    clusters.fit(x[:9])
    assert len(clusters.rank_) == len(clusters.counts_) == len(clusters.affine_.bias) <= 9
    assert len(before[1]) > len(clusters.rank_)


def test_merged_clusters_stay_as_they_are():
    clusters, _, x = fitted(3, 6, 1)
    merged, labels = clusters.merge(3), clusters.merge(3).labels_
    clusters.fit(x[:9])
    assert torch.equal(merged.predict(x), labels) and merged.check() < 1
    assert len(merged.rank_) == 3
    assert torch.equal(pickle.loads(pickle.dumps(merged)).predict(x), labels)


@pytest.mark.parametrize(
    "use",
    [
        lambda c: c.labels_,
        lambda c: c.affine_,
        lambda c: c.rank_,
        lambda c: c.predict(torch.zeros(1, 3)),
        lambda c: c.coverage(),
        lambda c: c.importance(),
        lambda c: c.table(),
        lambda c: c.region(0),
        lambda c: c.merge(1),
        lambda c: c.tree(),
        lambda c: c.check(),
    ],
)
def test_before_fit(use):
    clusters = ActivationClusters(mlp(3, 6, 1))
    assert repr(clusters) == "ActivationClusters(not fitted)"
    with pytest.raises(NotFittedError, match=r"ActivationClusters: \w+_ is known only after fit; call fit\(x\) first"):
        use(clusters)


NAN = torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 1.0], [torch.inf, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda c: c.fit(NAN), ValueError, "x: 2 of its samples have values that are not finite"),
        (lambda c: c.fit(torch.zeros(0, 3)), ValueError, r"x: got shape \(0, 3\), want \(n, \.\.\.\) with n > 0"),
        (lambda c: c.fit(torch.zeros(3)), ValueError, r"x: got shape \(3,\)"),
        (lambda c: c.fit(torch.zeros(2, 3), [1, 2, 3]), ValueError, r"y: got shape \(3,\), want \(2,\)"),
        (lambda c: c.predict(torch.zeros(2, 4)), ValueError, r"x: got shape \(2, 4\), want \(n, 3\)"),
        (lambda c: c.predict(NAN), ValueError, "x: 2 of its samples"),
        (lambda c: c.predict(torch.zeros(2, 3), unseen="drop"), ValueError, "unseen: got 'drop', want flag or nearest"),
        (lambda c: c.importance(kind="shap"), ValueError, "kind: got 'shap', want one of coef, scaled, share, contribution"),
        (lambda c: c.importance(1), IndexError, "output: got 1, want one of 1 outputs"),
        (lambda c: c.table(feature_names=["a"]), ValueError, "feature_names: got 1 names, want 3"),
        (lambda c: c.merge(10**6), ValueError, r"n_clusters: got 1000000, want 1 to \d+"),
        (lambda c: c.merge(target=1.0), ValueError, "target: got 1.0, want an R² between 0 and 1"),
        (lambda c: c.merge(3, target=0.9), ValueError, "target: got 0.9, but the number of clusters is given"),
        (lambda c: c.merge(0), ValueError, "n_clusters: got 0, want 1 to"),
        (lambda c: c.merge(2, by="affine"), ValueError, "n_clusters: got 2, but by='affine' determines the number"),
        (lambda c: c.merge(2, by="colour"), ValueError, "by: got 'colour', want one of affine, coef, hamming, npk, or a tensor"),
        (lambda c: c.merge(by=torch.zeros(2)), ValueError, r"by: got torch.float32 of shape \(2,\), want integers of shape"),
        (lambda c: c.tree(3), ValueError, "depth: got 3, want 1 to 1"),
        (lambda c: c.layer_patterns("fc7"), ValueError, "layer: got 'fc7', want one of 1, or its index"),
        (lambda c: c.set_params(min_size=0).fit(c.inputs_), ValueError, "min_size: got 0, want at least 1"),
        (lambda c: c.set_params(min_size=10**6).fit(c.inputs_), ValueError, "min_size: got 1000000, but no pattern .*merge"),
    ],
)  # fmt: skip
def test_bad_input_is_named(use, error, text):
    clusters, _, _ = fitted(3, 6, 1)
    with pytest.raises(error, match=text):
        use(clusters)


class Halves(nn.Module):
    """Two outputs, not in one tensor."""

    def forward(self, x):
        return x.relu().chunk(2, 1)


class Branching(nn.Module):
    """More gates for large values."""

    def forward(self, x):
        return x.relu().relu() if bool((x > 5).any()) else x.relu()


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (nn.Linear(2, 1), ValueError, "model: has no gates"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), ValueError, "model: has no gates"),
        (Halves(), TypeError, "model: returned tuple, want one tensor"),
        (Branching(), ValueError, "model: samples go through different gates"),
        (nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()), ValueError, "training"),
    ],
)
def test_models_without_clusters(model, error, text):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]])
    with pytest.raises(error, match=text):
        ActivationClusters(model, chunk_size=2).fit(x)


def test_secants_are_warned_of_and_show_in_the_check():
    """A sigmoid at the end: a probability is no affine function of the input, its logit is."""
    model, x = mlp(2, 4, 1), 4 * torch.randn(90, 2, dtype=torch.float64)
    clusters = ActivationClusters(nn.Sequential(*model, nn.Sigmoid()))
    with pytest.warns(
        UserWarning, match="model: sigmoid in layer '3' is not piecewise linear; samples of one cluster may"
    ):
        clusters.fit(x)
    assert clusters.check() > 1e-3 and ActivationClusters(model).fit(x).check() < 1e-12


def test_the_places_of_maxima_are_part_of_the_pattern():
    """Two samples whose ReLUs are on alike, and whose maxima are in different places, have two maps."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2), nn.Flatten())
    clusters = ActivationClusters(model).fit(torch.tensor([[[1.0, 2.0]], [[3.0, 2.5]], [[4.0, 9.0]]]))
    assert clusters.labels_.tolist() == [0, 1, 0] and clusters.check() == 0
    assert clusters.affine_.weight.flatten(1).tolist() == [[0, 1], [1, 0]]


class Second(nn.Module):
    """The second largest of the units that are on."""

    def forward(self, x):
        return x.relu().sort(1).values[:, -2:-1]


def test_s10_orders_are_part_of_the_pattern():
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.5, 7.0], [2.0, 4.0, 8.0]])
    clusters = ActivationClusters(Second()).fit(x)
    assert clusters.labels_.tolist() == [0, 1, 0] and clusters.check() == 0


class Experts(nn.Module):
    """Two experts, of which an operation chooses one."""

    def __init__(self, choose):
        super().__init__()
        self.choose, self.gate = choose, nn.Linear(3, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        index = self.choose(self.gate(x))
        return outputs.gather(1, index.view(-1, 1, 1).expand(-1, 1, 3)).squeeze(1)


CHOICES = {
    "argmax": lambda z: z.argmax(1),
    "argmin": lambda z: torch.argmin(z, axis=1),
    "argsort": lambda z: z.argsort(1)[:, 0],
    "sort": lambda z: z.sort(1, descending=True).indices[:, 0],
    "topk": lambda z: z.topk(1).indices[:, 0],
    "max": lambda z: z.max(1).indices,
    "kthvalue": lambda z: z.kthvalue(2).indices,
    "median": lambda z: z.median(1).indices,
    "sign": lambda z: (z[:, 0] - z[:, 1]).sign().clamp(min=0).long(),
    "gt": lambda z: (z[:, 0] > z[:, 1]).long(),
    "bool": lambda z: (z[:, 0] - z[:, 1]).clamp(min=0).bool().long(),
    "signbit": lambda z: torch.signbit(z[:, 0] - z[:, 1]).long(),
}


@pytest.mark.parametrize("name", CHOICES)
def test_s10_choices_are_gates_of_the_pattern_and_of_regions(name):
    model, x = Experts(CHOICES[name]).double(), torch.randn(120, 3, dtype=torch.float64)
    clusters = ActivationClusters(model).fit(x)
    assert clusters.check() <= 1e-13 and len(clusters.counts_) > 4 and supported_ops(model, x).exact
    assert clusters.check() <= 1e-13
    for c in range(4):
        here, own = clusters.region(c), clusters.inputs_[clusters.first_[c]]
        assert torch.equal(here.contains(clusters.inputs_), clusters.labels_ == c)
        near = own + 0.999 * here.radius(own) * nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=1)
        torch.testing.assert_close(
            clusters.affine_[c].weight[0] @ near.T + clusters.affine_[c].bias.T, model(near).detach().T
        )


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("round", lambda z: z[:, 0].round().long() % 2),
        ("floor", lambda z: z[:, 0].floor().long() % 2),
        ("ceil", lambda z: z[:, 0].ceil().long() % 2),
        ("trunc", lambda z: z[:, 0].trunc().long() % 2),
        ("long", lambda z: z[:, 0].long() % 2),
        ("to", lambda z: z[:, 0].to(torch.int64) % 2),
        ("topk", lambda z: z.topk(1, sorted=False).indices[:, 0]),
        ("sort", lambda z: z.repeat(1, 80).sort(1).indices[:, 0] % 2),
    ],
)
def test_s10_pieces_that_are_not_gates_are_named(name, choose):
    model, x = Experts(choose).double(), 3 * torch.randn(40, 3, dtype=torch.float64)
    report = supported_ops(model, x)
    assert not report.exact and report.supported and (name, "", "piece", 1) in report.rows
    text = f"{name} in layer '' has pieces that are not gates"
    with pytest.warns(UserWarning, match=text):
        ActivationClusters(model).fit(x)
    with pytest.warns(UserWarning, match=f"{name} in layer ''.* is a secant, or its pieces are not gates"):
        region(model, x[:1])


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("width", [3, 64, 100, 130])
def test_the_nearest_pattern_is_that_of_the_hamming_distance(width, counts, monkeypatch):
    if not counts:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    known, new = (ActivationPatterns.from_gates(torch.rand(n, width) < 0.5) for n in (200, 30))
    assert torch.equal(activation_clusters.nearest(known, new), new.hamming(known).argmin(1))
    assert activation_clusters.nearest(known, new[:0]).shape == (0,)


@pytest.mark.slow
def test_nearest_clusters_cost_one_pass_over_the_packed_patterns():
    known, new = (ActivationPatterns.from_gates(torch.rand(n, 128) < 0.5) for n in (200_000, 200))
    words = np.ascontiguousarray(known.packed.numpy().view(np.uint64).T)

    def one_pass():
        for i in range(len(new)):
            for word in words:
                np.bitwise_count(word ^ word[i]).argmin()

    def seconds(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    one_pass()
    ratios = [seconds(lambda: activation_clusters.nearest(known, new)) / seconds(one_pass) for _ in range(3)]
    assert min(ratios) <= 3
