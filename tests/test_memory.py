"""Memory: work in blocks gives the same numbers, no more is taken than estimated, and a budget is kept or refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icl_lib import models, ridge
from icl_lib.models import LinearTransformer, RandomTransformer, training_memory
from icl_lib.prompts import Summaries, sample_summaries
from icl_lib.tasks import TaskPrior

FLOATS = [torch.float32, torch.float64]


def draw(n: int, generator: torch.Generator, dim: int = 4) -> Summaries:
    tasks = TaskPrior(dim).sample(n, generator=generator)
    return sample_summaries(tasks, 6, target="relu", noise=0.1, generator=generator)


@pytest.mark.parametrize("n", [1, 15, 16, 47, 48, 79, 200])
@pytest.mark.parametrize("width", [1, 7, 33])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_of_prompts_give_the_bits_of_one_block(n, width, dtype, monkeypatch):
    """The products of the first layer agree to rounding; everything after them, the twin's noise included, exactly."""
    results = []
    for rows in (32, 10**6):
        monkeypatch.setattr(models, "ROWS", rows)
        generator = torch.Generator().manual_seed(1)
        model = RandomTransformer(4, width, "tanh", generator=generator, dtype=dtype)
        inputs = model.preactivations(draw(n, generator))
        first = results[0][0] if results else inputs
        torch.testing.assert_close(inputs, first)
        results.append(
            [first, model.features(first), *(model.hermite_twin(degree).features(first) for degree in (0, 3))]
        )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert n < 48 or len(models._blocks(n)) == 1  # the second setting is one block


def test_blocks_cover_all_prompts_and_are_never_too_small(monkeypatch):
    monkeypatch.setattr(models, "ROWS", 32)
    for n in range(1, 200):
        blocks = models._blocks(n)
        assert [row for block in blocks for row in range(n)[block]] == list(range(n))
        assert all(16 <= block.stop - block.start < 48 for block in blocks) or len(blocks) == 1


@pytest.mark.parametrize("degree", [None, 2])
@pytest.mark.parametrize("n, width", [(90, 20), (20, 90)])
def test_training_with_own_and_with_given_preactivations_is_the_same(n, width, degree, monkeypatch):
    monkeypatch.setattr(models, "ROWS", 32)
    weights = []
    for given in (False, True):
        generator = torch.Generator().manual_seed(3)
        train = draw(n, generator)
        model = RandomTransformer(4, width, "relu", generator=generator)
        model = model if degree is None else model.hermite_twin(degree)
        model.trace = train.trace
        inputs = model.preactivations(train)
        kept = inputs.clone()
        weights.append(model.fit(train, [0.5, 2.0], preactivations=inputs if given else None).weights)
        assert torch.equal(inputs, kept)
    assert torch.equal(*weights)


@pytest.mark.parametrize("shape", [(60, 23), (23, 60), (2, 3, 60, 23), (2, 3, 23, 60)])
def test_the_exact_gram_matrix_is_the_same_in_blocks(shape, generator, monkeypatch):
    """Columns that nearly coincide: the float32 Gram matrix is too coarse and is formed again in float64."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., 1:] = x[..., :1] + 1e-3 * x[..., 1:]
    y = torch.randn(shape[:-1], generator=generator, dtype=torch.float64)
    paths = []
    for rows in (7, 2048):
        monkeypatch.setattr(ridge, "ROWS", rows)
        paths.append(ridge.ridge_path(x.float(), y, [1e-5, 1e-8]))
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-9 * paths[0].abs().max().item())
    exact = ridge.ridge_path(x.float().double(), y, [1e-5, 1e-8])
    torch.testing.assert_close(paths[0], exact, rtol=1e-7, atol=1e-7 * exact.abs().max().item())


PROBE = r"""
import re, sys, torch
from pathlib import Path
from icl_lib import models, prompts, ridge, tasks

kind, dtype, count, n, width = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
models.PRIMAL_FROM = 1e9

def sweep(n, width, dim=16):
    generator = torch.Generator().manual_seed(0)
    drawn = tasks.TaskPrior(dim).sample(n, generator=generator)
    train = prompts.sample_summaries(drawn, dim, target="relu", noise=0.1, generator=generator)
    penalties = [n * 0.1] + [n * 1e-12] * (count - 1)
    if kind == "linear":
        return lambda: models.LinearTransformer(True).fit(train, [n * 0.1] * count)
    def work():
        model = models.RandomTransformer(dim, width, "relu", generator=generator, dtype=dtype)
        (model.hermite_twin(4) if kind == "twin" else model).fit(train, penalties)
    return work

def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

sweep(64, 64)()
work = sweep(n, width)
before = peak()
work()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak of memory")
@pytest.mark.parametrize(
    "kind, dtype, count, n, width",
    [
        ("random", "float32", 2, 2200, 2200),
        ("random", "float64", 2, 2200, 2200),
        ("twin", "float32", 2, 2200, 2200),
        ("random", "float32", 2, 1000, 5000),
        ("random", "float32", 13, 1200, 1200),
        ("linear", "float64", 2, 2500, 1),
    ],
)
def test_no_more_is_taken_than_estimated(kind, dtype, count, n, width):
    """The estimate is for the worst case, and no more than about twice what these problems take."""
    arguments = [kind, dtype, *map(str, (count, n, width))]
    root = Path(models.__file__).parents[1]
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    kinds = {"float32": torch.float32, "float64": torch.float64}
    need = training_memory(16, n, width, dtype=kinds[dtype], penalties=count)
    if kind == "linear":
        need = ridge.solve_bytes(n, torch.float64, count)
    taken = int(probe.stdout)
    assert 0.4 * need < taken < need + 40e6  # libraries have buffers of their own


def test_the_main_experiment_fits_into_24_gigabytes_at_160_dimensions_and_not_at_320():
    sizes = {dim: training_memory(dim, dim**2 // 2, dim**2 // 2, penalties=5) / 1e9 for dim in (80, 160, 320)}
    assert sizes[80] < 1 and 7 < sizes[160] < 8 < 24 < 100 < sizes[320] < 130
    by_hand = 4 * 12800 * (160 * 161 + 12800) + 32 * 12800**2 + 8 * 2048 * 12800
    assert training_memory(160, 12800, 12800) == by_hand
    assert training_memory(160, 12800, 12800, dtype=torch.float64) > by_hand


def test_too_large_a_model_is_refused_before_it_is_made(generator):
    state = generator.get_state()
    with pytest.raises(
        MemoryError, match=r"a first layer of shape \(51200, 102720\) needs about 21 GB, and memory .* 16 GB"
    ):
        RandomTransformer(320, 51200, "relu", generator=generator, dtype=torch.float32, memory=16e9)
    assert torch.equal(generator.get_state(), state)


def test_too_large_a_training_set_is_refused_before_anything_is_computed(generator, monkeypatch):
    train = draw(300, generator)
    need = training_memory(4, 300, 50, dtype=torch.float64)
    for budget in (need, 10 * need):
        model = RandomTransformer(4, 50, "relu", generator=torch.Generator().manual_seed(2), memory=budget)
        free = RandomTransformer(4, 50, "relu", generator=torch.Generator().manual_seed(2))
        assert torch.equal(model.fit(train, 1.0).weights, free.fit(train, 1.0).weights)
    tight = RandomTransformer(4, 50, "relu", generator=generator, memory=need - 1)
    inputs = tight.preactivations(train)
    monkeypatch.setattr(RandomTransformer, "_seen", None)
    for model in (tight, tight.hermite_twin(2)):
        with pytest.raises(MemoryError, match="a random Transformer with 50 neurons and 300 prompts needs about"):
            model.fit(train, 1.0)
    model = RandomTransformer(4, 50, "relu", generator=generator, memory=need)
    with pytest.raises(MemoryError):  # given pre-activations exist besides
        model.fit(train, 1.0, preactivations=inputs)
    with pytest.raises(MemoryError):  # so does the decomposition that penalty 0 takes
        model.fit(train, 0.0)


def test_linear_transformer_and_ridge_keep_their_budgets(generator):
    for n in (12, 300):  # dual and primal
        train = draw(n, generator)
        need = ridge.solve_bytes(min(n, 20), torch.float64, 1) + 24 * 20 * n
        gamma = LinearTransformer(memory=need).fit(train, 1.0).gamma
        assert torch.equal(gamma, LinearTransformer().fit(train, 1.0).gamma)
        with pytest.raises(MemoryError, match=f"a linear Transformer with 20 weights and {n} prompts needs about"):
            LinearTransformer(memory=need - 1).fit(train, 1.0)
    x, y = torch.randn(5, 30, 8, generator=generator), torch.randn(5, 30, generator=generator)
    need = ridge.ridge_bytes(x.shape, x.dtype, [1.0])
    assert torch.equal(ridge.ridge_path(x, y, [1.0], memory=need), ridge.ridge_path(x, y, [1.0]))
    with pytest.raises(MemoryError, match=r"ridge regression on features of shape \(5, 30, 8\) needs about"):
        ridge.ridge_path(x, y, [1.0], memory=need - 1)


@pytest.mark.parametrize("memory", [0, -1.0, float("nan"), float("inf")])
def test_bad_budgets_are_refused(memory, generator):
    train = draw(9, generator)
    for call in (
        lambda: RandomTransformer(4, 3, "relu", generator=generator, memory=memory),
        lambda: LinearTransformer(memory=memory).fit(train, 1.0),
        lambda: ridge.ridge_path(train.query, train.answer, [1.0], memory=memory),
    ):
        with pytest.raises(ValueError, match="memory is"):
            call()


def test_bad_sizes_are_refused():
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="is 0, expected an integer"):
            training_memory(*arguments)
    with pytest.raises(ValueError, match="penalties is 0"):
        training_memory(1, 1, 1, penalties=0)
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        training_memory(1, 1, 1, dtype=torch.float16)


def test_the_page_shows_the_estimates():
    page = (Path(__file__).parents[1] / "book/running-at-scale.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d ]+) \| ([\d.]+) GB \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for dim, n, shown in rows:
        n = int(n.replace(" ", ""))
        places = len(shown.partition(".")[2])
        assert n == int(dim) ** 2 // 2 and f"{training_memory(int(dim), n, n) / 1e9:.{places}f}" == shown
