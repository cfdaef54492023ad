"""The reduced predictor and its rival: exact algebra, the drive, growth, and who wins, on seeds of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from icl_lib import training
from icl_lib.dynamics import LinearDynamics
from icl_lib.sweeps import deviation_limit
from tests.zscore import assert_mean

D = torch.float64
DIM, LENGTH, TASKS, RATE = 4, 64, 16, 0.05
FLAT = LinearDynamics(torch.ones(DIM), LENGTH, n_tasks=TASKS, learning_rate=RATE / TASKS)


def instance(length: int, g: torch.Generator, dim: int = 3) -> tuple[Tensor, Tensor]:
    """A task and a prompt of inputs, the query last."""
    return tuple(torch.randn(size, generator=g, dtype=D) for size in ((dim, dim), (dim, length + 1)))  # type: ignore


def literal(value: Tensor, query: Tensor, w: Tensor, x: Tensor) -> Tensor:
    z = torch.cat([x, torch.cat([w @ x[:, :-1], torch.zeros(len(w), 1, dtype=D)], 1)])
    return training.attention_output(z, value, query, x.shape[1] - 1)[len(w) :, -1]


def reduced_weights(g: torch.Generator) -> tuple[Tensor, Tensor]:
    value, query = torch.randn(2, 6, 6, generator=g, dtype=D)
    value[3:, :3], query[3:, :3] = 0.0, 0.0
    return value, query


@pytest.mark.parametrize("length", [1, 2, 3, 10, 500])
def test_reduced_predictor_at_any_length(length: int, generator: torch.Generator) -> None:
    for _ in range(8):
        value, query = reduced_weights(generator)
        w, x = instance(length, generator)
        sample = x[:, :-1] @ x[:, :-1].T / length
        expected = value[3:, 3:] @ w @ sample @ query[:3, :3] @ x[:, -1]
        torch.testing.assert_close(literal(value, query, w, x), expected, rtol=1e-11, atol=1e-11)


def test_odd_sets_keep_the_blocks_at_zero(generator: torch.Generator) -> None:
    for _ in range(8):
        for signs, still in (((1, -1), True), ((1,), False)):
            value, query = (x.requires_grad_() for x in reduced_weights(generator))
            for w, x in (instance(5, generator) for _ in range(3)):
                for sign in signs:
                    (literal(value, query, sign * w, x) - sign * w @ x[:, -1]).square().sum().backward()
            assert value.grad is not None and query.grad is not None
            drive = max(value.grad[3:, :3].abs().max().item(), query.grad[3:, :3].abs().max().item())
            other = min(value.grad[3:, 3:].abs().max().item(), query.grad[:3, :3].abs().max().item())
            assert (drive < 1e-12 * other) if still else (drive > 1e-3 * other)


def aligned(
    runs: int, dim: int, size: float, dtype: torch.dtype = torch.float32, second: float = 0.0
) -> tuple[Tensor, Tensor]:
    eye = torch.eye(dim, dtype=dtype).expand(runs, dim, dim)
    return training.join_blocks(size * eye, size * eye, second * eye, second * eye)


@pytest.mark.parametrize("generic", [False, True])
def test_drive(generic: bool, generator: torch.Generator) -> None:
    """Step by step the drive of Q_2 is the third moment of the set; its mean square is 15 / K, or that of W W'W."""
    dim, k = 2, 16
    rows = []
    for _ in range(24):
        w = torch.randn(k, dim, *([dim] if generic else []), generator=generator, dtype=D)
        full = w if generic else torch.diag_embed(w)
        options: dict[str, Any] = {
            "covariance": torch.eye(dim),
            "length": 200,
            "learning_rate": 1.0,
            "n_steps": 1,
            "batch": 32,
        }
        path = training.train(w, *aligned(1, dim, 0.02), **options, generator=generator)
        found = path.q2[-1, 0].double() / 0.02
        rows.append(found.diagonal() - (full @ full.mT @ full).sum(0).diagonal())
    assert_mean(torch.stack(rows), 0.0)
    w = torch.randn(16, 4_000, dim, dim, generator=generator, dtype=D)
    w = w if generic else torch.diag_embed(w[..., 0])
    cubes = (w @ w.mT @ w).diagonal(dim1=-2, dim2=-1).square().mean((1, 2))
    assert_mean(cubes, 5 * dim**2 + 6 * dim + 4 if generic else 15.0)


@pytest.mark.parametrize("kind", ["diagonal", "symmetric", "generic"])
def test_growth_of_the_pathways(kind: str, generator: torch.Generator) -> None:
    """From multiples of the identity; each run has tasks of its own. The first pathway's rate is not the second's."""
    steps, runs = 12, 64
    law = LinearDynamics([1.0, 0.8, 0.6, 0.5], LENGTH, TASKS, RATE / TASKS) if kind == "diagonal" else FLAT
    tasks = training.antithetic_tasks(TASKS, DIM, generator=generator) if kind == "diagonal" else fresh(kind, runs)
    ends = final(aligned(runs, DIM, 1e-4, second=1e-4), tasks, steps, generator, 16, law)
    first, second = {"diagonal": (1, 1), "symmetric": (DIM + 1, DIM + 1), "generic": (DIM, 1)}[kind]
    expected = [(1 + rate / law.timescales) ** steps for rate in (first, first, second, second)]
    grown = torch.stack([x.diagonal(dim1=-2, dim2=-1).double() for x in ends], 1) / 1e-4
    assert_mean(grown, torch.stack(expected))
    if kind == "generic":
        with pytest.raises(AssertionError):
            assert_mean(grown[:, 2:], torch.stack(expected[:2]))


def fresh(kind: str, runs: int) -> Callable[[torch.Generator], Tensor]:
    """Random tasks of either sign, for each run its own, drawn anew at each step."""

    def tasks(g: torch.Generator) -> Tensor:
        half = torch.randn(runs, TASKS // 2, DIM, DIM, generator=g)
        half = (half + half.mT) / math.sqrt(2) if kind == "symmetric" else half
        return torch.cat([half, -half], 1)

    return tasks


def final(weights, tasks, steps, g, batch, law=FLAT, length=LENGTH):  # type: ignore[no-untyped-def]
    """P_2, Q_1, P_1, Q_2 after training."""
    path = training.train(
        tasks,
        *weights,
        covariance=law.eigenvalues.diag(),
        length=length,
        learning_rate=law.learning_rate,
        n_steps=steps,
        batch=batch,
        generator=g,
        every=steps,
    )
    return [x[-1] for x in (path.p2, path.q1, path.p1, path.q2)]


def start(c: float, runs: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    value, query = torch.randn(runs, DIM, 2 * DIM, generator=g), torch.randn(runs, 2 * DIM, DIM, generator=g)
    sides = 0.03 * torch.tensor([c, 1.0]).repeat_interleave(DIM) / max(c, 1)
    return value * sides, query * sides.flip(0)[:, None]


RATIOS = (0.25, 4.0)


RUNS = 200


@pytest.fixture(scope="module")
def races() -> tuple[Tensor, Tensor, Tensor]:
    """Weights at the start (4, ratios, runs, d), tasks, and who has the mode in the end: 1 for the second pathway."""
    g = torch.Generator().manual_seed(3)
    value, query = (torch.cat(x) for x in zip(*(start(c, RUNS, g) for c in RATIOS), strict=True))
    tasks = training.antithetic_tasks(TASKS, DIM, generator=g)
    p, q, p_, q_ = (x.diagonal(dim1=-2, dim2=-1) for x in final((value, query), tasks, 100, g, 4))
    shape = (len(RATIOS), RUNS, DIM)
    begin = torch.stack([x.reshape(shape) for x in diagonal_weights(value, query)])
    return begin, tasks, (p_ * q_ > p * q).double().view(shape)


def diagonal_weights(value: Tensor, query: Tensor) -> list[Tensor]:
    """Diagonals of P_2, Q_1, P_1, Q_2."""
    blocks = (value[..., DIM:], query[:, :DIM], value[..., :DIM], query[:, DIM:])
    return [x.diagonal(dim1=-2, dim2=-1).double() for x in blocks]


def test_share_of_the_pathways(races: tuple[Tensor, Tensor, Tensor]) -> None:
    """The arctangent holds; c / (1 + c) and c^2 / (1 + c^2) fail in the rise from c < 1 to c > 1."""
    shares = races[2].mean(-1).T
    assert_mean(shares, torch.tensor([2 / math.pi * math.atan(c) for c in RATIOS]))
    rise = shares[:, 1] - shares[:, 0]
    assert_mean(rise, 4 / math.pi * math.atan(4) - 1)
    for power in (1, 2):
        with pytest.raises(AssertionError):
            assert_mean(rise, (4**power - 1) / (4**power + 1))


def test_larger_amplitude_wins(races: tuple[Tensor, Tensor, Tensor]) -> None:
    """Always in the equations; in the simulation more often than the larger of p^2 + q^2, run by run."""
    (p, q, p_, q_), tasks, won = races
    larger, size = (p_ + q_).abs() > (p + q).abs(), p_**2 + q_**2 > p**2 + q**2
    margin = ((won == larger).double() - (won == size).double()).mean(2).flatten()
    assert margin.mean() > deviation_limit(1, len(margin)) * margin.std() / math.sqrt(len(margin))
    angle = torch.arange(2.5, 90, 5, dtype=D).deg2rad()[:, None].expand(-1, DIM)
    for sign in (1, -1):
        begin = 1e-3 * torch.stack([angle.cos(), angle.cos(), sign * angle.sin(), sign * angle.sin()])
        p, q, p_, q_ = four_weights(begin, tasks, 500)[-1]
        assert torch.equal(p_ * q_ > p * q, angle > math.pi / 4)


def test_symmetric_tasks_feed_both_pathways() -> None:
    """Without common eigenvectors, from equal starts: half of the runs; generic tasks, the control: none."""
    law, shares = LinearDynamics(torch.ones(DIM), LENGTH, TASKS, RATE / (2 * DIM * TASKS)), {}
    for kind in ("symmetric", "generic"):
        g = torch.Generator().manual_seed(4)
        p2, q1, p1, q2 = final(start(1.0, 24, g), fresh(kind, 24), 180, g, 4, law)
        both = [(x * y.mT).sum((1, 2)) for x, y in ((p2, q1), (p1, q2))]
        shares[kind] = (both[1] > both[0]).double()
    assert_mean(shares["symmetric"], 0.5)
    assert 0.5 - shares["generic"].mean() > 4 * math.sqrt(0.25 / 24)


def test_fixed_matrices_undo_the_transposition(generator: torch.Generator) -> None:
    """Symmetric tasks need P_1 = S^-1 and Q_2 = I, rotations of the plane a reflection; generic ones lose 1 / d^2."""
    s = torch.rand(3, generator=generator, dtype=D) + 0.5
    w = torch.randn(8, 3, 3, generator=generator, dtype=D)
    torch.testing.assert_close((1 / s).diag() @ s.diag() @ (w + w.mT).mT, w + w.mT)
    mirror = torch.tensor([1.0, -1.0], dtype=D).diag()
    v, u = torch.randn(2, 8, generator=generator, dtype=D)
    turn = torch.stack([v, -u, u, v], -1).view(8, 2, 2)
    torch.testing.assert_close((mirror / s[:2]) @ s[:2].diag() @ turn.mT @ mirror, turn)
    w = torch.randn(16, 4_000, 2, 2, generator=generator, dtype=D)
    for size in (0.5, 0.8, 0.3):  # P_1 = Q_2 with the square of the norm 2 size^2; 1 for the best
        norm = 2 * size**2
        assert_mean((w - size**2 * w.mT).square().sum((2, 3)).mean(1), 4 - 2 * norm + norm**2)


def four_weights(w: Tensor, tasks: Tensor, steps: int, law: LinearDynamics = FLAT) -> Tensor:
    """Discrete descent of p, q, and of the second pathway, from means over the tasks; all steps."""
    path = [w]
    for _ in range(steps):
        p, q, p_, q_ = (x[..., None, :] for x in w)  # (runs, 1, d)
        value, query = p_ + tasks * p, q + tasks * q_  # (runs, K, d)
        rest = tasks - value * query / law.limits
        change = [tasks * rest * query, rest * value, rest * query, tasks * rest * value]
        w = w + torch.stack([x.mean(-2) for x in change]) / law.timescales
        path.append(w)
    return torch.stack(path)


def test_course_of_the_pathways() -> None:
    """Run by run the equations from the own start are nearer than those from another run's, or half of the sum."""
    g = torch.Generator().manual_seed(5)
    weights, tasks = start(1.0, 24, g), training.antithetic_tasks(TASKS, DIM, generator=g)
    flow = four_weights(torch.stack(diagonal_weights(*weights)), tasks, 80)[-1]
    ends = [x.diagonal(dim1=-2, dim2=-1).double() for x in final(weights, tasks, 80, g, 8)]
    seen, own = (torch.stack([x[0] * x[1], x[2] * x[3]]) / FLAT.limits for x in (ends, flow))
    gaps = [(seen - x).square().mean((0, 2)) for x in (own, own.roll(1, 1), own.mean(0, keepdim=True))]
    for gap in gaps[1:]:
        gain = gap - gaps[0]
        assert gain.mean() > deviation_limit(2, len(gain)) * gain.std() / math.sqrt(len(gain))


def test_fixed_sets_leave_the_reduced_predictor() -> None:
    """Thirty-two modes, each with random tasks of its own, in long prompts: as many seeds."""
    dim, law = 32, LinearDynamics(torch.ones(32), LENGTH, n_tasks=TASKS, learning_rate=RATE / TASKS)
    g, found = torch.Generator().manual_seed(6), []
    half = torch.randn(TASKS, dim, generator=g, dtype=D)
    for tasks in (half, torch.cat([half[: TASKS // 2], -half[: TASKS // 2]])):
        p2, q1, p1, q2 = (x[0].diagonal() for x in final(aligned(1, dim, 0.05), tasks, 50, g, 8, law, length=4096))
        found.append(torch.maximum(p1.abs(), q2.abs()) / torch.maximum(p2.abs(), q1.abs()))
    excess = found[0] - found[1]
    assert excess.mean() > deviation_limit(1, dim) * excess.std() / math.sqrt(dim)
