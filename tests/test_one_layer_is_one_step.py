"""Steps and masks; the whole layer of linear attention: its excess loss, its best minimum, and the one that traps."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import optimize
from torch import Tensor
from torch.autograd.functional import hessian
from zscore import assert_mean

from icl_lib.asymptotics import linear_attention_optimum
from icl_lib.constructions import gradient_descent
from icl_lib.models import population_error
from icl_lib.tasks import TaskPrior

D = torch.float64
SPECTRUM, LENGTH, RHO = torch.tensor([0.2, 0.5, 1.0, 1.5, 3.0], dtype=D), 12, 0.3
SIGMA, DIM = SPECTRUM.diag(), 5
BEST, LEAST = linear_attention_optimum(SIGMA, LENGTH, RHO)


def distance(p: Tensor, q: Tensor, sigma: Tensor, step: Tensor) -> Tensor:
    """Mean squared difference of the predictions of a layer from those of a step; normal tasks with C = I."""
    p1, p2, q1, q2 = p[:DIM, None], p[DIM], q[:DIM], q[DIM:]
    power = sigma.trace() + RHO
    moment = (1 + 1 / LENGTH) * sigma @ sigma + power / LENGTH * sigma
    off = (p2 * q1 + p1 @ q2).mT - step
    odd = (sigma @ off @ moment @ off.mT).trace()
    squares = (1 + 1 / LENGTH) * sigma @ p1 @ p1.mT @ sigma + p1.mT @ sigma @ p1 / LENGTH * sigma
    mixed = (power * sigma + 2 / LENGTH * sigma @ sigma) @ p1
    labels = (1 + 2 / LENGTH) * (power**2 + 2 * (sigma @ sigma).trace())
    even = q1.mT @ squares @ q1 + 2 * p2 * q1.mT @ mixed @ q2 + p2**2 * labels * q2.mT @ q2
    return odd + (sigma @ even).trace()


def excess(z: Tensor, sigma: Tensor = SIGMA, best: Tensor = BEST) -> Tensor:
    """Excess error of a layer with all weights in one vector."""
    return distance(z[: DIM + 1], z[DIM + 1 :].reshape(DIM + 1, DIM), sigma, best)


def slope(z: Tensor, *setting: Tensor) -> Tensor:
    """Gradient of the excess error."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(excess(z, *setting), z)[0]


def descend(z: Tensor, *setting: Tensor) -> Tensor:
    """The minimum to which a start leads: BFGS on the exact loss, then Newton's method across the scale of P and Q."""

    def both(x):
        point = torch.from_numpy(x)
        return excess(point, *setting).item(), slope(point, *setting).numpy()

    z = torch.from_numpy(optimize.minimize(both, z.numpy(), jac=True, method="BFGS").x)
    for _ in range(3):
        curvature = hessian(lambda point: excess(point, *setting), z)
        z = z - torch.linalg.pinv(curvature, rtol=1e-9, hermitian=True) @ slope(z, *setting)
    return z


def starts(generator, runs, *, second=None):
    """All weights random and small, but for a head start of P_2, or for a start on the second pathway."""
    p = 0.1 * torch.randn(runs, DIM + 1, generator=generator, dtype=D)
    q = 0.1 * torch.randn(runs, DIM + 1, DIM, generator=generator, dtype=D)
    if second is None:
        p[:, DIM] = 1
    else:
        p[:, :DIM], p[:, DIM], q[:, DIM] = 0, 0.3, 0
        p[:, DIM - 1], q[:, DIM, DIM - 1] = second, -second
    return torch.cat([p, q.flatten(1)], dim=1)


def test_masks(generator):
    """Layers with matrices are steps; other masks agree for one layer and not for two."""
    x = torch.randn(20, LENGTH, DIM, generator=generator, dtype=D)
    y, query = torch.randn(20, LENGTH, generator=generator, dtype=D), torch.randn(20, DIM, generator=generator, dtype=D)
    matrices = [*0.2 * torch.randn(6, DIM, DIM, generator=generator, dtype=D)]
    w = torch.zeros(20, DIM, dtype=D)
    for m, matrix in enumerate(matrices, 1):
        w = w + torch.einsum("de,nle,nl->nd", matrix, x, y - torch.einsum("nld,nd->nl", x, w)) / LENGTH
        network = gradient_descent(DIM, LENGTH, matrices[:m])
        for mask in ("context", "all", "causal"):
            masked = replace(network, layers=tuple(replace(layer, mask=mask) for layer in network.layers))
            gap = (masked(x, y, query) - (w * query).sum(-1)).abs().max()
            assert gap < 1e-12 if mask == "context" or m == 1 else gap > 1e-2


def test_errors_of_three_steps(generator):
    """The formula for the error of a step, for the best, the best plain and the Newton step, at three lengths."""
    prior, eye = TaskPrior(DIM), torch.eye(DIM, dtype=D)
    for length in (4, 16, 64):
        moment = (1 + 1 / length) * SIGMA @ SIGMA + (SIGMA.trace() + RHO) / length * SIGMA
        best, _ = linear_attention_optimum(SIGMA, length, RHO)
        plain = (SIGMA @ SIGMA).trace() / (SIGMA @ moment).trace()
        errors = []
        for matrix in (best, plain * eye, SIGMA.inverse(), 1.01 * plain * eye, 0.99 * plain * eye):
            gamma = torch.cat([matrix / DIM, torch.zeros(DIM, 1, dtype=D)], dim=1)
            options = {"noise": math.sqrt(RHO), "covariance": DIM * SIGMA}
            errors.append(population_error(gamma, prior, length, **options).item())
            risk = RHO + (SIGMA - 2 * SIGMA @ matrix @ SIGMA + SIGMA @ matrix @ moment @ matrix.mT).trace().item()
            assert errors[-1] == pytest.approx(risk, rel=1e-12)
        assert errors[0] < errors[1] < min(errors[3:]) and errors[0] < errors[2]


def test_excess_is_distance(generator):
    """Loss of a random layer less that of the best step, sampled with examples drawn one by one."""
    p = 0.3 * torch.randn(DIM + 1, generator=generator, dtype=D)
    q = 0.3 * torch.randn(DIM + 1, DIM, generator=generator, dtype=D)
    ratios = []
    for _ in range(12):
        x = SPECTRUM.sqrt() * torch.randn(8000, LENGTH + 1, DIM, generator=generator, dtype=D)
        task = torch.randn(8000, DIM, 1, generator=generator, dtype=D)
        y = x @ task + math.sqrt(RHO) * torch.randn(8000, LENGTH + 1, 1, generator=generator, dtype=D)
        tokens, query, answer = torch.cat([x, y], -1)[:, :LENGTH], x[:, -1], y[:, -1, 0]
        layer = torch.einsum("r,ntr,ntc,cd,nd->n", p, tokens, tokens, q, query) / LENGTH
        step = torch.einsum("nd,de,nte,nt->n", query, BEST, tokens[..., :DIM], tokens[..., DIM]) / LENGTH
        loss = (layer - answer) ** 2 - (step - answer) ** 2
        ratios.append(loss.mean() / distance(p, q, SIGMA, BEST))
    assert_mean(torch.stack(ratios), 1.0)
    plain = torch.cat([torch.zeros(DIM, dtype=D), torch.ones(1, dtype=D)]), torch.cat([BEST.mT, torch.zeros(1, DIM)])
    assert distance(*plain, SIGMA, BEST).abs() < 1e-14  # the best step as a layer
    assert distance(torch.zeros(DIM + 1, dtype=D), q, SIGMA, BEST) == pytest.approx(SIGMA.trace().item() + RHO - LEAST)


def test_minimisation_of_the_exact_loss(generator):
    """From head starts all weights are moved until the slope is 0: the best step, plain for equal variances only."""
    for sigma, equal in ((SIGMA, False), (SIGMA.trace() / DIM * torch.eye(DIM, dtype=D), True)):
        best, _ = linear_attention_optimum(sigma, LENGTH, RHO)
        for start in starts(generator, 8):
            z = descend(start, sigma, best)
            assert excess(z, sigma, best).abs() < 1e-12
            matrix = (z[DIM] * z[DIM + 1 : -DIM].reshape(DIM, DIM) + torch.outer(z[:DIM], z[-DIM:])).mT
            torch.testing.assert_close(matrix, best, rtol=0, atol=1e-7)
            rates = matrix.diagonal()
            assert (rates.max() / rates.min() < 1 + 1e-6) if equal else (rates.max() / rates.min() > 4)


def test_a_bad_minimum(generator):
    """A start on the second pathway leads to a minimum that is isolated but for the scale of P against Q."""
    for start in starts(generator, 8, second=1.0):
        z = descend(start)
        bends = torch.linalg.eigvalsh(hessian(excess, z))
        assert slope(z).abs().max() < 1e-10
        assert excess(z).item() == pytest.approx(1.81304, abs=1e-4)
        assert abs(bends[0]) < 1e-10 * bends[-1] < 1e-6 < bends[1]
        scaled = torch.cat([2 * z[: DIM + 1], z[DIM + 1 :] / 2])
        assert excess(scaled).item() == pytest.approx(excess(z).item())
