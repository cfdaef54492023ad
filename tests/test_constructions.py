"""Weights written by hand against the algorithms they are: to rounding error, and where they stop being exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Lasso

from icl_lib import asymptotics
from icl_lib.constructions import (
    Attention,
    FeedForward,
    Network,
    gradient_descent,
    model_selection,
    proximal_descent,
    softmax_descent,
)
from icl_lib.ridge import ridge

D = torch.float64
EXACT = {"rtol": 0, "atol": 1e-12}
DIM, LENGTH = 4, 9
RATES = [0.3, 0.7, 0.1, 0.5]


def prompts(generator, *batch, dim=DIM, length=LENGTH, noise=0.3):
    """Inputs, labels and queries of linear tasks."""
    x = torch.randn(*batch, length, dim, generator=generator, dtype=D)
    task, query = torch.randn(2, *batch, dim, generator=generator, dtype=D)
    y = (x @ task[..., None])[..., 0] + noise * torch.randn(*batch, length, generator=generator, dtype=D)
    return x, y, query


def descend(x, y, steps, w, penalty=0.0, threshold=0.0):
    """Iterates of proximal gradient descent; a step is a number or a matrix."""
    iterates = [w.expand(*y.shape[:-1], w.shape[-1])]
    for step in steps:
        w = iterates[-1]
        gradient = (x.mT @ ((x @ w[..., None])[..., 0] - y)[..., None])[..., 0] + penalty * w
        gradient = gradient @ step.mT if isinstance(step, torch.Tensor) else step * gradient
        w = w - gradient / y.shape[-1]
        iterates.append(torch.sign(w) * (w.abs() - threshold).clamp_min(0))
    return torch.stack(iterates)


@pytest.mark.parametrize("started", [False, True])
def test_layers_are_steps_of_gradient_descent(started, generator):
    x, y, query = prompts(generator, 5)
    start = torch.randn(DIM, generator=generator, dtype=D) if started else torch.zeros(DIM, dtype=D)
    network = gradient_descent(DIM, LENGTH, RATES, start=start if started else None)
    iterates = descend(x, y, RATES, start)
    states = network.states(x, y, query)
    assert states.shape == (5, 5, LENGTH + 1, DIM + 1) and len(network.layers) == 4
    torch.testing.assert_close(states[..., -1, :] @ network.readout, (iterates * query).sum(-1), **EXACT)
    torch.testing.assert_close(network(x, y, query), (iterates[-1] * query).sum(-1), **EXACT)
    moved = torch.einsum("nld,knd->knl", x, iterates - start)
    torch.testing.assert_close(states[..., :-1, DIM], y - moved, **EXACT)
    assert torch.equal(states[..., network.slots["x"]], states[:1, ..., :DIM].expand(5, -1, -1, -1))


def test_the_weights_of_one_layer_are_those_of_the_paper():
    """W_K = W_Q = [[I, 0], [0, 0]], W_V = [[0, 0], [W_0, -I]] and P = eta / N."""
    start = torch.tensor([1.0, -2.0], dtype=D)
    (layer,) = gradient_descent(2, 10, [0.5], start=start).layers
    assert torch.equal(layer.key, torch.eye(3, dtype=D)[None, :2])
    assert torch.equal(layer.query, 0.5 * layer.key)
    assert torch.equal(layer.value[0], torch.tensor([[0, 0, 0], [0, 0, 0], [0.1, -0.2, -0.1]], dtype=D))
    assert (layer.activation, layer.mask) == ("linear", "context")


@given(
    st.integers(1, 5), st.integers(1, 12), st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=4), st.integers(0, 99)
)
def test_gradient_descent_in_any_size(dim, length, rates, seed):
    x, y, query = prompts(torch.Generator().manual_seed(seed), dim=dim, length=length)
    x = x / x.norm()
    expected = descend(x, y, rates, torch.zeros(dim, dtype=D))[-1] @ query
    torch.testing.assert_close(gradient_descent(dim, length, rates)(x, y, query), expected, **EXACT)
    exact = proximal_descent(dim, length, 0.4, 3, ridge=0.2, lasso=0.1)(x, y, query)
    expected = descend(x, y, [0.4] * 3, torch.zeros(dim, dtype=D), 0.2, 0.4 * 0.1 / (2 * length))[-1] @ query
    torch.testing.assert_close(exact, expected, **EXACT)


def test_a_matrix_preconditions_and_the_best_layer_is_such_a_step(generator):
    x, y, query = prompts(generator, 3)
    matrices = [torch.randn(DIM, DIM, generator=generator, dtype=D) / DIM for _ in range(2)]
    iterates = descend(x, y, matrices, torch.zeros(DIM, dtype=D))
    torch.testing.assert_close(
        gradient_descent(DIM, LENGTH, matrices)(x, y, query), (iterates[-1] * query).sum(-1), **EXACT
    )
    best, _ = asymptotics.linear_attention_optimum(torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1])), LENGTH, 0.09)
    expected = torch.einsum("nd,de,nle,nl->n", query, best, x, y) / LENGTH
    torch.testing.assert_close(gradient_descent(DIM, LENGTH, [best])(x, y, query), expected, **EXACT)


def test_gradient_descent_plus_plus(generator):
    """Inputs shrink along their singular vectors, and the residuals with them."""
    x, y, query = prompts(generator)
    eta, gamma, steps = 0.5, 0.02, 5
    network = gradient_descent(DIM, LENGTH, [eta] * steps, shrink=gamma)
    a, r, q, guess = x.clone(), y.clone(), query.clone(), torch.zeros((), dtype=D)
    for _ in range(steps):
        step = a.mT @ r * eta / LENGTH
        r, guess = r - a @ step, guess + q @ step
        a, q = a - gamma * a @ a.mT @ a, q - gamma * q @ a.mT @ a
    torch.testing.assert_close(network(x, y, query), guess, **EXACT)
    left, s, _ = torch.linalg.svd(x, full_matrices=False)
    factor = torch.ones_like(s)
    for _ in range(steps):
        factor, s = factor * (1 - eta * s**2 / LENGTH), s * (1 - gamma * s**2)
    last = network.states(x, y, query)[-1]
    torch.testing.assert_close(left.mT @ last[:-1, DIM], factor * (left.mT @ y), **EXACT)
    torch.testing.assert_close(torch.linalg.svdvals(last[:-1, :DIM]), s.sort(descending=True).values, **EXACT)


def test_a_causal_mask_gives_one_step_but_not_two(generator):
    """The query alone sees all examples; their own residuals are those of other regressions."""
    x, y, query = prompts(generator, 5)
    for rates, exact in (([0.5], True), ([0.5, 0.5], False)):
        network = gradient_descent(DIM, LENGTH, rates)
        causal = replace(network, layers=tuple(replace(layer, mask="causal") for layer in network.layers))
        gap = (causal(x, y, query) - network(x, y, query)).abs().max()
        assert gap < 1e-12 if exact else gap > 1e-2


def test_two_softmax_heads_descend_on_centred_inputs(generator):
    x, y, query = prompts(generator, 20)
    centred = x - x.mean(1, keepdim=True)
    expected = (descend(centred, y, RATES, torch.zeros(DIM, dtype=D))[-1] * query).sum(-1)
    errors = [
        (softmax_descent(DIM, LENGTH, RATES, sharpness=sharpness)(x, y, query) - expected).abs().max().item()
        for sharpness in (4e-3, 2e-3, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=1e-3) and errors[1] / errors[2] == pytest.approx(4, rel=1e-3)
    assert errors[2] < 1e-4
    plain = (descend(x, y, RATES, torch.zeros(DIM, dtype=D))[-1] * query).sum(-1)
    assert (plain - expected).abs().max() > 0.01


def test_ridge_and_lasso_in_context(generator):
    x, y, query = prompts(generator, 5)
    for ridge_penalty, lasso in ((0.0, 0.0), (3.0, 0.0), (0.0, 2.0), (1.5, 1.0)):
        network = proximal_descent(DIM, LENGTH, 0.3, 6, ridge=ridge_penalty, lasso=lasso)
        iterates = descend(x, y, [0.3] * 6, torch.zeros(DIM, dtype=D), ridge_penalty, 0.3 * lasso / (2 * LENGTH))
        states = network.states(x, y, query)
        w = states[:: 2 if lasso else 1][:7, ..., network.slots["w"]]
        torch.testing.assert_close(w, iterates[:, :, None].expand_as(w), **EXACT)  # in every token
        torch.testing.assert_close(network(x, y, query), (iterates[-1] * query).sum(-1), **EXACT)
        if lasso:
            assert network.layers[1].first.shape[0] == 4 * DIM


def test_many_steps_reach_ridge_and_the_lasso(generator):
    x, y, query = prompts(generator, length=20)
    rate = 20 / torch.linalg.matrix_norm(x, 2).item() ** 2
    one = proximal_descent(DIM, 20, rate, 400, ridge=2.0)(x, y, query)
    torch.testing.assert_close(one, ridge(x, y, 2.0) @ query, rtol=0, atol=1e-10)
    network = proximal_descent(DIM, 20, rate, 400, lasso=30.0)
    w = network.states(x, y, query)[-1, -1, network.slots["w"]]
    expected = Lasso(alpha=30.0 / 40, fit_intercept=False, tol=1e-12).fit(x.numpy(), y.numpy()).coef_
    torch.testing.assert_close(w, torch.from_numpy(expected), rtol=0, atol=1e-8)
    assert 0 < (w == 0).sum() < DIM


def test_a_small_bound_lets_the_query_in(generator):
    x, y, query = prompts(generator)
    exact = proximal_descent(DIM, LENGTH, 0.3, 5)(x, y, query)
    for bound, same in ((100.0, True), (0.01, False)):
        guess = proximal_descent(DIM, LENGTH, 0.3, 5, bound=bound)(x, y, query)
        assert ((guess - exact).abs() < 1e-12).item() == same


PENALTIES, N_TRAIN, N_VALID = [0.1, 4.0, 60.0], 12, 8


def select(x, y, query, steps, rate, gap):
    """Post-ICL validation computed directly: fit on the first examples, validate on the others, choose, predict."""
    fits = torch.stack(
        [
            descend(x[..., :N_TRAIN, :], y[..., :N_TRAIN], [rate] * steps, torch.zeros(DIM, dtype=D), p)[-1]
            for p in PENALTIES
        ]
    )  # (models, n, d)
    losses = ((torch.einsum("nld,knd->knl", x, fits) - y)[..., N_TRAIN:] ** 2).mean(-1)
    chosen = (1 - (losses[:, None] - losses).relu().sum(1) / gap).relu()
    return fits, losses, chosen, (chosen * (fits * query).sum(-1)).sum(0)


def test_model_selection_is_post_icl_validation(generator):
    x, y, query = prompts(generator, 40, length=N_TRAIN + N_VALID, noise=1.0)
    network = model_selection(DIM, N_TRAIN, N_VALID, PENALTIES, rate=0.2, steps=30, gap=1e-3)
    fits, losses, chosen, expected = select(x, y, query, 30, 0.2, 1e-3)
    last = network.states(x, y, query)[-1, :, -1]
    torch.testing.assert_close(last[:, network.slots["w"]], fits.movedim(0, 1).flatten(1), **EXACT)
    torch.testing.assert_close(last[:, network.slots["loss"]], losses.T, **EXACT)
    clear = losses.sort(0).values.diff(dim=0)[0] > 1e-3
    assert clear.sum() > 30
    best = torch.nn.functional.one_hot(losses.argmin(0), 3).to(D)
    assert torch.equal(last[clear][:, network.slots["chosen"]], best[clear])
    torch.testing.assert_close(last[:, network.slots["chosen"]], chosen.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(network(x, y, query)[clear], expected[clear], **EXACT)
    assert len(set(losses.argmin(0).tolist())) == 3  # every model is the best one somewhere


def test_masks_and_activations_of_the_evaluator(generator):
    """The evaluator against one written token by token."""
    tokens = torch.randn(2, 5, 3, generator=generator, dtype=D)
    q, k = torch.randn(2, 2, 4, 3, generator=generator, dtype=D)
    v = torch.randn(2, 3, 3, generator=generator, dtype=D)
    for activation in ("linear", "relu", "softmax"):
        for mask, seen in (
            ("all", lambda i, j: True),
            ("context", lambda i, j: j < 4),
            ("causal", lambda i, j: j <= i),
        ):
            expected = tokens.clone()
            for n in range(2):
                for i in range(5):
                    for h in range(2):
                        visible = [j for j in range(5) if seen(i, j)]
                        scores = torch.stack([(q[h] @ tokens[n, i]) @ (k[h] @ tokens[n, j]) for j in visible])
                        weights = {"linear": scores, "relu": scores.relu(), "softmax": scores.softmax(0)}[activation]
                        expected[n, i] += sum(w * (v[h] @ tokens[n, j]) for w, j in zip(weights, visible, strict=True))
            torch.testing.assert_close(Attention(q, k, v, activation, mask)(tokens), expected, **EXACT)
    layer = FeedForward(torch.eye(3, dtype=D), -torch.eye(3, dtype=D))
    assert torch.equal(layer(tokens), tokens.clamp_max(0))


def test_single_precision_and_leading_axes(generator):
    x, y, query = prompts(generator, 2, 3)
    for network in (gradient_descent(DIM, LENGTH, RATES), proximal_descent(DIM, LENGTH, 0.3, 4, ridge=1.0)):
        exact = network(x, y, query)
        slim = network(x.float(), y.float(), query.float())
        assert exact.shape == slim.shape == (2, 3) and slim.dtype == torch.float32
        torch.testing.assert_close(slim.double(), exact, rtol=0, atol=1e-4)
        torch.testing.assert_close(network(x[1, 2], y[1, 2], query[1, 2]), exact[1, 2], **EXACT)
        assert isinstance(network, Network)
