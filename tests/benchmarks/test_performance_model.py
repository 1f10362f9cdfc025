"""The model of the kernels' times gives those that were worked out by hand, and the page has what it gives now."""

from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.__main__ import main
from benchmarks.timing import performance_model
from benchmarks.timing.performance_model import GPUS, Kernels, linear, predict
from interp_nn.engines.problem import Config

PAGE = Path(__file__).parents[2] / "docs/performance-model.md"
pytest.importorskip("triton")


def kernels_of_120e4e3(*configs):
    names = "stream", "summary_backward", "pair_loss"
    return Kernels(False, 32, (256, 256), 4, tuple(zip(names, configs, strict=True)))


# Shape, kernels, microseconds of forward, backward and loss on an H200, and of nn.Linear; the digits that these have.
BY_HAND = [
    (
        (65536, 512, 64),
        kernels_of_120e4e3(Config((128, 64)), Config((64, 128, 16)), Config((64, 64, 64, 128, 16))),
        (23.3, 49, 102), (21.5, 43, 98), 0.0,
    ),
    (
        (65536, 1024, 128),
        kernels_of_120e4e3(Config((128, 64)), Config((64, 128, 16)), Config((32, 64, 64, 128, 16), scratch=True)),
        (44.6, 91, 247), (41.1, 82, 181), 0.0,
    ),
    (
        (4096, 512, 100),
        kernels_of_120e4e3(Config((32, 64)), Config((32, 64, 16)), Config((32, 64, 32, 64, 16))),
        (5, 12, 17), (3.3, 6.4, None), 0.5,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kernels", "ours", "theirs", "digit"), BY_HAND)
def test_the_model_gives_what_was_worked_out_by_hand(shape, kernels, ours, theirs, digit):
    gpu = GPUS["H200"]
    for name, expected, of_linear in zip(linear(gpu, *shape), ours, theirs, strict=True):
        found = 1e6 * predict(name, gpu, *shape, kernels).seconds
        assert abs(found - expected) <= 0.05 * expected + digit, (name, found)
        if of_linear is not None:
            assert 1e6 * linear(gpu, *shape)[name] == pytest.approx(of_linear, rel=0.05)


def test_no_time_is_below_what_the_bytes_need():
    for gpu in GPUS.values():
        for shape in performance_model.SHAPES:
            for name in linear(gpu, *shape):
                predicted = predict(name, gpu, *shape)
                assert predicted.seconds > predicted.bytes / gpu.spec.bandwidth


def test_the_page_says_what_it_is_and_has_what_the_command_writes(tmp_path, capsys):
    text = PAGE.read_text(encoding="utf-8")
    assert "predicted, not measured" in text.splitlines()[0]
    assert text.count("| ratio | measured, µs |\n") == len(GPUS)
    copied = tmp_path / PAGE.name
    copied.write_text(text, encoding="utf-8")
    assert main(["model", "--page", str(copied)]) == 0
    assert copied.read_text(encoding="utf-8") == text, "python -m benchmarks model --page docs/performance-model.md"
    assert main(["model"]) == 0
    assert capsys.readouterr().out.strip() in text


def test_without_triton_it_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(command, "triton_version", lambda: (0, 0))
    assert main(["model"]) == 2 and "Triton is not installed" in capsys.readouterr().err
