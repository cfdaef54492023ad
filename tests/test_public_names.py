"""Public names: they exist, are documented, keep their parameters, import lightly, and leave global state alone."""

import ast
import importlib
import inspect
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import icl_lib

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "icl_lib").glob("*.py"))
PUBLIC = [(module, name) for module in icl_lib.__all__ for name in importlib.import_module(f"icl_lib.{module}").__all__]

# What others rely on: parameters before the star, after it, and whether there is a default (=).
PROMISED = {
    "asymptotics.marchenko_pastur_resolvent": "x kappa",
    "asymptotics.linear_attention_errors": "* alpha kappa tau rho lam",
    "asymptotics.bayes_ridge_error": "alpha rho",
    "asymptotics.dmmse_error": "* dim n_tasks alpha rho",
    "asymptotics.linear_attention_optimum": "covariance length noise_variance task_covariance=",
    "constructions.Attention": "query key value activation= mask=",
    "constructions.FeedForward": "first second",
    "constructions.Network": "layers template readout start slots",
    "constructions.Network.states": "self inputs labels query",
    "constructions.gradient_descent": "dim length rates * start= shrink=",
    "constructions.softmax_descent": "dim length rates * sharpness",
    "constructions.proximal_descent": "dim length rate steps * ridge= lasso= bound=",
    "constructions.model_selection": "dim n_train n_valid penalties * rate steps gap bound=",
    "models.population_error": "gamma tasks length * noise covariance=",
    "models.dmmse": "prompts pool * noise",
    "asymptotics.random_transformer_error": (
        "* dim length n_prompts width penalty activation target noise norm_samples="
    ),
    "asymptotics.linear_transformer_error": ("* dim length n_prompts penalty target noise intercept= norm_samples="),
    "asymptotics.optimal_penalty": "error low= high=",
    "hermite.polynomials": "x degree",
    "hermite.expand": "activation degree kinks=",
    "hermite.Expansion.polynomial": "self x",
    "hermite.Expansion.activate": "self x * generator",
    "hermite.gaussian_mean": "function kinks=",
    "hermite.activation": "name_or_function kinks=",
    "ridge.ridge": "features targets penalty",
    "ridge.ridge_path": "features targets penalties * memory=",
    "tasks.TaskPrior": "dim covariance= n_tasks= sphere=",
    "tasks.TaskPrior.sample": "self n * generator device= dtype=",
    "tasks.TaskPrior.fresh": "self",
    "tasks.spiked_covariance": "dim strength direction=",
    "tasks.power_law_covariance": "dim exponent",
    "prompts.sample_summaries": "tasks length * target noise covariance= scaling= generator",
    "prompts.sample_prompts": "tasks length * target noise covariance= scaling= generator",
    "prompts.summary_moments": "dim length * target noise",
    "prompts.Summaries": "query summary answer trace",
    "prompts.Source": "prior target noise covariance= share=",
    "prompts.sample_mixture": "sources n length * scaling= generator",
    "prompts.Prompts": "inputs labels query answer scaling trace",
    "models.LinearTransformer": "intercept= * memory=",
    "models.LinearTransformer.fit": "self summaries penalty",
    "models.LinearTransformer.predict": "self summaries",
    "models.RandomTransformer": "dim width activation * generator dtype= memory=",
    "models.training_memory": "dim n_prompts width * dtype= penalties=",
    "models.RandomTransformer.fit": "self summaries penalty * preactivations=",
    "models.RandomTransformer.predict": "self summaries * preactivations=",
    "models.RandomTransformer.hermite_twin": "self degree",
    "models.RandomTransformer.gradient": "self summaries * readout",
    "models.RandomTransformer.gradient_step": "self summaries rate * readout=",
    "models.HermiteTwin": "parent degree",
    "dynamics.LinearDynamics": "eigenvalues length n_tasks= learning_rate=",
    "dynamics.LinearDynamics.half_time": "self a0",
    "dynamics.LinearDynamics.logistic": "self t a0",
    "dynamics.LinearDynamics.modes": "self t p0 q0",
    "dynamics.LinearDynamics.flow": "self t p0 q0",
    "dynamics.LinearDynamics.loss": "self p q",
    "dynamics.LinearDynamics.paper_loss": "self a",
    "dynamics.LinearDynamics.minimum": "self",
    "dynamics.SeparateHeads": "eigenvalues length",
    "dynamics.SeparateHeads.flow": "self t v0 k0 q0",
    "dynamics.population_loss": "p q * covariance length tasks n_tasks= query_covariance= noise=",
    "dynamics.population_gradient": "p q law",
    "training.train": (
        "tasks value query * covariance length learning_rate n_steps batch generator every= noise= frozen="
    ),
    "training.attention_output": "prompt value query length",
    "training.join_blocks": "p2 q1 p1= q2=",
    "training.sample_covariances": "dim length shape= * generator dtype=",
    "training.antithetic_tasks": "n_tasks dim * generator",
    "spectral.effective_rank": "matrix skip=",
    "spectral.product_rank": "left right skip=",
    "spectral.subspace_distance": "matrix reference",
    "spectral.frequency_count": "table",
    "spectral.loss_autocorrelation": "losses lags",
    "spectral.curvature": "losses window=",
    "sequences.Repeats": "n_tokens= length= shortest= longest= shuffled= batch= held_out=",
    "sequences.Repeats.sample": "self n * generator",
    "sequences.Repeats.sets": "self * generator",
    "sequences.ModularAddition": "modulus= share= shuffled= ordered=",
    "sequences.ModularAddition.sets": "self * generator",
    "transformers.Architecture": "layers= heads= dim= width= scale=",
    "transformers.initial_weights": "task architecture * generators dtype=",
    "transformers.logits": "weights tokens",
    "transformers.answer_logits": "weights tokens",
    "transformers.attention_factors": "weights circuit summed=",
    "transformers.attention_patterns": "weights tokens",
    "transformers.head_scores": "patterns tokens",
    "transformers.train": (
        "task architecture * generators n_steps learning_rate weight_decay= warm_up= every= hold= dtype= store="
    ),
    "transformers.emergence_window": "steps accuracy threshold=",
    "models.icl_error": "predictions answers",
}


def parameters(function: object) -> str:
    words, keyword_only = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        words.append(parameter.name + ("" if parameter.default is parameter.empty else "="))
    return " ".join(words)


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module}.{name}" for module, name in PUBLIC])
def test_public_names_exist_and_are_documented(module: str, name: str) -> None:
    value = getattr(importlib.import_module(f"icl_lib.{module}"), name)
    if not callable(value):
        assert name.isupper()
        return
    text = inspect.getdoc(value)
    assert text and "Source: [" in text
    assert not text.startswith(f"{name}(")  # the docstring that a dataclass makes up


@pytest.mark.parametrize("path", PROMISED)
def test_promised_names_keep_their_parameters(path: str) -> None:
    module, *rest = path.split(".")
    value = importlib.import_module(f"icl_lib.{module}")
    for name in rest:
        value = getattr(value, name)
    assert parameters(value) == PROMISED[path]


def test_promised_fields() -> None:
    expansion = icl_lib.hermite.expand("relu", 2)
    assert (expansion.coefficients.shape, expansion.degree) == ((3,), 2)
    assert isinstance(expansion.residual, float) and isinstance(expansion.second_moment, float)
    names = "relu tanh gelu erf sigmoid softplus sign step abs sin identity"
    assert set(icl_lib.hermite.ACTIVATIONS) == set(names.split())
    moments = icl_lib.prompts.summary_moments(2, 2, target="relu", noise=0.1)
    assert all(isinstance(value, float) for value in (moments.beta, moments.gamma, moments.trace))


def test_the_package_lists_its_modules() -> None:
    assert set(icl_lib.__all__) <= set(dir(icl_lib))
    assert {path.stem for path in SOURCES if not path.stem.startswith("_")} == set(icl_lib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = icl_lib.nothing


@pytest.mark.parametrize("found, message", [("2.3.1+cu121", "finds 2.3.1"), (None, "there is none"), ("2.10.0", "")])
def test_too_old_a_torch_is_named_at_import(monkeypatch: pytest.MonkeyPatch, found: str | None, message: str) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("importlib.metadata.version", version)
    with (
        pytest.raises(ImportError, match=f"^icl_lib needs torch 2.4 or newer, and {message}")
        if message
        else nullcontext()
    ):
        importlib.reload(icl_lib)


@pytest.mark.parametrize("statement", ["import icl_lib", "import icl_lib.models"])
def test_imports_are_light(statement: str) -> None:
    """Nothing heavy beyond what torch itself loads."""
    heavy = {"pandas", "scipy", "matplotlib", "joblib", "tqdm"}
    program = f"import sys, torch; own = set(sys.modules); {statement}; print(*({heavy} & sys.modules.keys() - own))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


def calls(path: Path) -> list[str]:
    """Dotted names of everything that a source file calls."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [ast.unparse(node.func) for node in nodes]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_leave_global_state_alone(path: Path) -> None:
    found = calls(path)
    for name in found:
        last = name.split(".")[-1]
        assert last not in ("cuda", "seed", "set_default_dtype", "set_default_device", "use_deterministic_algorithms")
        assert not name.startswith(("np.random.", "numpy.random.", "random.")), name
        assert last != "manual_seed" or name.split(".")[0] in ("generator", "torch.Generator"), name
        assert name not in ("torch.manual_seed", "warnings.filterwarnings", "warnings.simplefilter"), name
    if path.stem != "chapter":  # its closing lines are output of the notebook
        assert "print" not in found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_random_numbers_come_from_generators(path: Path) -> None:
    draws = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "_standard_gamma"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in draws}:
            assert "generator" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


def test_the_library_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    tasks = icl_lib.tasks.TaskPrior(3, n_tasks=4).sample(8, generator=generator)
    train = icl_lib.prompts.sample_summaries(tasks, 4, target="relu", noise=0.1, generator=generator)
    model = icl_lib.models.RandomTransformer(3, 5, "relu", generator=generator).fit(train, 1.0)
    model.hermite_twin(2).fit(train, 1.0).predict(train)
    assert torch.equal(torch.random.get_rng_state(), before)
