"""Sweeps give the same numbers with any number of workers, after any kill, and never a stale or damaged one."""

import errno
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_lib import sweeps

GRID = {"scale": [0.1, 2.0], "size": [3, 40]}


def experiment(*, scale, size, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = scale * torch.randn(size, size, generator=generator, dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(matrix @ matrix.T)
    return {
        "top": spectrum[-1],
        "mean": spectrum.mean().item(),
        "size_seen": np.int64(size),
        "kind": "ridge",
        "ok": True,
    }


def logged(*, x, seed, log, fail_at=None):
    """Note the call in an append-only file, so that repeated evaluations show, whichever process makes them."""
    with open(log, "a") as file:
        file.write(f"{x} {seed}\n")
    if x == fail_at:
        raise KeyError("no such matrix")
    return x + seed / 7


def calls(log):
    return Counter(Path(log).read_text().splitlines()) if Path(log).exists() else Counter()


def files(store):
    return sorted(Path(store).glob("*.json"))


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    return True


slow = pytest.mark.slow  # more than three seconds: `make test-slow` runs these


# The table.


def test_rows_follow_the_grid_and_then_the_seeds():
    frame = sweeps.run(lambda a, b, seed: 100 * a + 10 * b + seed, {"a": [2, 1], "b": [4, 3]}, [7, 5])
    assert list(frame.columns) == ["a", "b", "seed", "value"]
    assert frame["value"].tolist() == [247, 245, 237, 235, 147, 145, 137, 135]
    assert frame.index.tolist() == list(range(8))


def test_mapping_gives_columns_and_points_may_be_listed():
    points = [{"a": 1, "kind": "relu"}, {"kind": "tanh", "a": 3}]
    frame = sweeps.run(lambda a, kind, seed: {"twice": 2 * a, "name": kind.upper()}, points, 2)
    assert list(frame.columns) == ["a", "kind", "seed", "twice", "name"]
    assert frame["twice"].tolist() == [2, 2, 6, 6] and frame["name"].tolist() == ["RELU", "RELU", "TANH", "TANH"]


def test_an_empty_grid_is_one_point():
    assert sweeps.run(lambda seed: seed**2, {}, 3)["value"].tolist() == [0, 1, 4]


def test_numpy_and_torch_scalars_arrive_as_plain_python():
    seen = []

    def note(seed, **point):
        seen.append((seed, *point.values()))
        return torch.tensor(1.5)

    grid = {"a": np.array([1, 2]), "b": torch.tensor([0.5]), "c": [np.float32(0.25)], "d": [np.str_("x")], "e": [None]}
    frame = sweeps.run(note, grid, np.arange(1))
    assert seen == [(0, 1, 0.5, 0.25, "x", None), (0, 2, 0.5, 0.25, "x", None)]
    assert [type(value) for value in seen[0]] == [int, int, float, float, str, type(None)]
    assert frame["value"].tolist() == [1.5, 1.5]
    assert sweeps.run(note, {"a": [math.inf]}, torch.tensor(1))["a"].tolist() == [math.inf]


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"a": "relu"}, r"grid\['a'\] is 'relu', expected a list"),
        ({"a": 3}, r"grid\['a'\] is 3, expected a list"),
        ({"a": torch.tensor(3)}, "expected a list"),
        ({"a": []}, "at least one point"),
        ([], "at least one point"),
        (5, "at least one point"),
        ("ab", "at least one point"),
        ([{"a": 1}, {"b": 1}], "the same names in every point"),
        ({"a": [[1, 2]]}, r"grid\['a'\] is \[1, 2\], expected a number"),
        ({"a": [1j]}, r"grid\['a'\] is 1j"),
        ({"a": [torch.ones(2)]}, r"grid\['a'\]"),
        ({"a": [math.nan]}, r"grid\['a'\] is nan"),
        ({"seed": [1]}, "other than 'seed'"),
        ({3: [1]}, r"grid\[3\]"),
        ({"a": [1, 1]}, "distinct points"),
    ],
)
def test_bad_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        sweeps.run(lambda **_: 0.0, grid, 2)


@pytest.mark.parametrize("seeds", [0, -1, [], [1, 1], [0.5], "ab", 2.0, True, None, [True]])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds is"):
        sweeps.run(lambda seed: 0.0, {}, seeds)


@pytest.mark.parametrize("n_jobs", [0, True])
def test_bad_number_of_workers_is_refused(n_jobs):
    with pytest.raises(ValueError, match="n_jobs is"):
        sweeps.run(lambda seed: 0.0, {}, 1, n_jobs=n_jobs)


@pytest.mark.parametrize(
    "result, message",
    [
        (None, "is None, expected a number or a mapping"),
        ({}, "expected a number or a mapping"),
        ({1: 2.0}, "expected a number or a mapping"),
        ([1.0], r"'value' at point \{'a': 1\}, seed 0 is \[1.0\]"),
        ({"curve": [1.0, 2.0]}, "the result 'curve'"),
        ({"a": 2.0}, r"columns \['a'\], which are names of the grid"),
        ({"seed": 2}, r"columns \['seed'\]"),
    ],
)
def test_bad_result_is_refused(tmp_path, result, message):
    with pytest.raises(ValueError, match=message):
        sweeps.run(lambda a, seed: result, {"a": [1]}, 1)


# Workers.


@pytest.fixture(scope="module")
def serial():
    return sweeps.run(experiment, GRID, 3)


@pytest.mark.parametrize("n_jobs", [1, pytest.param(4, marks=slow), pytest.param(2, marks=slow)])
def test_same_bits_for_any_number_of_workers_and_when_resumed(serial, n_jobs, tmp_path):
    assert same(sweeps.run(experiment, GRID, 3, n_jobs=n_jobs), serial)
    assert same(sweeps.run(experiment, GRID, 3, n_jobs=n_jobs, store=tmp_path), serial)
    for victim in files(tmp_path)[::2]:
        victim.unlink()
    assert same(sweeps.run(experiment, GRID, 3, n_jobs=n_jobs, store=tmp_path), serial)
    assert same(sweeps.run(experiment, GRID, 3, store=tmp_path), serial)
    assert len(files(tmp_path)) == 12


def test_evaluations_run_on_one_torch_thread_and_the_number_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert sweeps.run(lambda seed: torch.get_num_threads(), {}, 1)["value"].tolist() == [1]
        assert sweeps.run(lambda seed: torch.get_num_threads(), {}, 2, n_jobs=2)["value"].tolist() == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_evaluations_in_threads_stay_on_one_torch_thread():
    """Those that end early do not give their neighbours more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def threads(seed):
        time.sleep(0.02 * seed)
        torch.ones(2) + 1
        return torch.get_num_threads()

    try:
        with joblib.parallel_config(backend="threading", n_jobs=2):
            assert sweeps.run(threads, {}, 4)["value"].tolist() == [1] * 4
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_backend_of_the_caller_is_used():
    def thread(seed):
        return threading.current_thread() is threading.main_thread()

    assert sweeps.run(thread, {}, 2)["value"].tolist() == [True, True]
    with joblib.parallel_config(backend="threading", n_jobs=2):
        assert sweeps.run(thread, {}, 2)["value"].tolist() == [False, False]


def test_closures_and_lambdas_reach_the_workers():
    factor = 3
    assert sweeps.run(lambda a, seed: factor * a + seed, {"a": [1, 2]}, 2, n_jobs=2)["value"].tolist() == [3, 4, 6, 7]


# Interruption.

SCRIPT = '''
"""One driver of a sweep, to be killed."""
import os, sys, time
import torch
from icl_lib import sweeps

LOG = os.environ["SWEEP_LOG"]
SIZES = {9, "a", (2, "b")}


def experiment(*, x, seed):
    with open(os.environ["SWEEP_LOG"], "a") as log:
        log.write(f"{x} {seed}\\n")
    time.sleep(0.03)
    draws = x * torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"mean": draws.mean(), "peak": draws.max(), "odd": 9 in SIZES, "kind": "s" in {"r", "s", "t"}}


if __name__ == "__main__":
    frame = sweeps.run(experiment, {"x": [0.1, 0.2, 0.3, 0.7]}, 6, store=sys.argv[1], n_jobs=eval(sys.argv[2]))
    for row in frame.to_dict("records"):
        print(*(value.hex() if isinstance(value, float) else value for value in row.values()))
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The driver beside a copy of the library, so that its results do not depend on edits made meanwhile."""
    folder = tmp_path_factory.mktemp("script")
    shutil.copytree(Path(sweeps.__file__).parent, folder / "icl_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "driver.py").write_text(SCRIPT)
    return folder / "driver.py"


def launch(script, store, log, n_jobs=None):
    command = [sys.executable, "-W", "error", str(script), str(store), str(n_jobs)]
    environment = os.environ | {"SWEEP_LOG": str(log)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", errors
    return output


def wait_for(store, enough, process):
    """Until the store holds enough results or the process ends."""
    deadline = time.monotonic() + 120
    while len(files(store)) < enough and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    output = finish(launch(script, folder / "store", folder / "log"))
    assert len(output.splitlines()) == 24 and set(calls(folder / "log").values()) == {1}
    return output


@slow
@pytest.mark.parametrize("n_jobs, kills", [(None, [1, 9]), (2, [7])])
def test_killed_run_loses_nothing_and_repeats_nothing(script, uninterrupted, tmp_path, n_jobs, kills):
    store, log = tmp_path / "store", tmp_path / "log"
    kept, finished, before = {}, set(), Counter()
    for enough in [*kills, None]:
        process = launch(script, store, log, n_jobs if enough else None)
        if enough:
            wait_for(store, enough, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            assert enough <= len(files(store)) < 24
        else:
            assert finish(process) == uninterrupted
        new = calls(log) - before
        assert set(new.values()) == {1} and not finished & set(new)
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept, before = {path: path.read_bytes() for path in files(store)}, calls(log)
        documents = [json.loads(content) for content in kept.values()]
        finished = {f"{document['point']['x']} {document['seed']}" for document in documents}
    assert len(finished) == 24
    if n_jobs is None:  # nothing is left to compute
        assert finish(launch(script, store, log)) == uninterrupted and calls(log) == before


@slow
@pytest.mark.parametrize("n_jobs", [None, 2])
def test_ctrl_c_leaves_a_usable_store(script, uninterrupted, tmp_path, n_jobs, listens):
    """A terminal sends the signal to the driver and to its workers."""
    store = tmp_path / "store"
    process = launch(script, store, tmp_path / "log", n_jobs)
    wait_for(store, 5, process)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    finished = {path: path.stat().st_mtime_ns for path in files(store)}
    assert process.returncode != 0 and output == "" and 5 <= len(finished) < 24
    last = errors.splitlines()[-1]
    assert last.startswith("KeyboardInterrupt: stopped; ") and last.endswith("and the same call goes on from there"), (
        last
    )
    assert 5 <= int(last.split()[2]) <= len(finished) and f" of 24 results are kept in {store}, " in last
    assert {path.suffix for path in store.iterdir()} == {".json", ".txt"}
    time.sleep(0.3)
    assert len(files(store)) == len(finished)  # no worker goes on
    assert finish(launch(script, store, tmp_path / "log")) == uninterrupted
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())


@pytest.fixture
def listens():
    """Ctrl-C is heard, also if the tests run in the background of a shell, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_says_what_is_kept(tmp_path, listens):
    def interrupted(seed, log):
        with open(log, "a") as file:
            file.write(f"{seed}\n")
        if seed == 3 and len(Path(log).read_text()) == 8:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return seed / 7

    function = functools.partial(interrupted, log=str(tmp_path / "log"))
    with pytest.raises(
        KeyboardInterrupt, match=r"^stopped; 3 of 5 results are kept in .*store, and the same call goes"
    ):
        sweeps.run(function, {}, 5, store=tmp_path / "store")
    assert sweeps.run(function, {}, 5, store=tmp_path / "store")["value"].tolist() == [seed / 7 for seed in range(5)]
    assert calls(tmp_path / "log") == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 1}
    (tmp_path / "log").write_text("0\n1\n2\n")
    with pytest.raises(KeyboardInterrupt, match="^stopped; nothing is kept without a store$"):
        sweeps.run(function, {}, [3])


@slow
def test_killed_worker_is_reported_and_loses_nothing(tmp_path):
    def fragile(x, seed, log):
        if x == 2.5 and seed == 1 and not Path(f"{log} dead").exists():
            time.sleep(0.3)
            Path(f"{log} dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return logged(x=x, seed=seed, log=log)

    log, store = str(tmp_path / "log"), tmp_path / "store"
    sweep = functools.partial(
        sweeps.run, functools.partial(fragile, log=log), {"x": [1, 2.5, 4, 7]}, 5, store=store, n_jobs=2
    )
    with pytest.raises(RuntimeError, match="a worker process died, killed .*; [0-9]+ of 20 results are kept") as raised:
        sweep()
    kept = {path: path.read_bytes() for path in files(store)}
    assert f"{len(kept)} of 20" in str(raised.value) and 0 < len(kept) < 20
    finished = [f"{entry['point']['x']} {entry['seed']}" for entry in map(json.loads, kept.values())]
    frame = sweep()
    assert all(path.read_bytes() == content for path, content in kept.items()) and len(files(store)) == 20
    assert all(calls(log)[pair] == 1 for pair in finished)
    assert same(frame, sweeps.run(functools.partial(logged, log=str(tmp_path / "other")), {"x": [1, 2.5, 4, 7]}, 5))


@slow
def test_two_drivers_share_a_store(script, uninterrupted, tmp_path):
    drivers = [launch(script, tmp_path / "store", tmp_path / f"log {driver}") for driver in range(2)]
    assert [finish(driver) for driver in drivers] == [uninterrupted, uninterrupted]
    names = {path.suffix for path in (tmp_path / "store").iterdir()}
    assert len(files(tmp_path / "store")) == 24 and names == {".json", ".txt"}


def overtaken(seed, log, store):
    """At seed 0, another run on the same store gets ahead of this one."""
    with open(log, "a") as file:
        file.write(f"{seed}\n")
    if seed == 0:
        sweeps.run(functools.partial(overtaken, log=log, store=store), {}, [1, 2], store=store)
    return seed / 3


def test_what_another_run_has_stored_meanwhile_is_not_computed(tmp_path):
    function = functools.partial(overtaken, log=str(tmp_path / "log"), store=str(tmp_path))
    assert sweeps.run(function, {}, 4, store=tmp_path)["value"].tolist() == [0.0, 1 / 3, 2 / 3, 1.0]
    assert calls(tmp_path / "log") == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_results_are_stored_as_they_are_found(tmp_path):
    def count(seed, store):
        return len(files(store))

    stored = sweeps.run(functools.partial(count, store=str(tmp_path)), {}, 5, store=tmp_path)
    assert stored["value"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_error_names_point_and_seed_and_keeps_what_is_finished(tmp_path, n_jobs):
    log, store = str(tmp_path / "log"), tmp_path / "store"
    failing = functools.partial(logged, log=log, fail_at=3)
    first = "8" if n_jobs is None else "[89]"  # of two workers either may be first to fail
    message = rf"logged failed at point \{{'x': 3\}}, seed {first}: KeyError: 'no such matrix'"
    with pytest.raises(RuntimeError, match=message) as raised:
        sweeps.run(failing, {"x": [1, 2, 3, 4]}, [8, 9], store=store, n_jobs=n_jobs)
    assert raised.value.__cause__ is not None
    documents = [json.loads(path.read_text()) for path in files(store)]
    done = {f"{document['point']['x']} {document['seed']}" for document in documents}
    assert n_jobs == 2 or done == {"1 8", "1 9", "2 8", "2 9"}
    assert not any(pair.startswith("3") for pair in done)
    before = calls(log)
    with pytest.raises(RuntimeError, match="seed 8"):
        sweeps.run(failing, {"x": [1, 2, 3, 4]}, [8, 9], store=store)
    assert not done & set(calls(log) - before)


# The store: nothing damaged or stale is believed.


@pytest.fixture
def filled(tmp_path):
    """A store of one sweep, the sweep, its log and its table."""
    store, log = tmp_path / "store", tmp_path / "log"

    def sweep():
        return sweeps.run(functools.partial(logged, log=str(log)), {"x": [1, 2.5]}, 2, store=store)

    frame = sweep()
    assert sum(calls(log).values()) == len(files(store)) == 4
    return store, sweep, log, frame


def damage(content):
    document = json.loads(content)
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    yield content + b" "
    yield b"\x00" * len(content)
    yield b"\xff\xfe"
    yield b"[" * 100_000
    yield b"{}"
    yield b"null"
    yield b"[1, 2]"
    yield b'{"result": 3}'
    yield b'{"result": {"value": 1.0}}'
    yield content.replace(b'"value": ', b'"value": 1')
    yield json.dumps(document | {"result": {"value": 99.0}}).encode()
    yield json.dumps(document | {"seed": 17}).encode()
    yield json.dumps(document, indent=1).encode()
    for position in range(0, 8 * len(content), 499):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        yield bytes(flipped)


def test_damaged_files_are_computed_again(filled):
    store, sweep, log, frame = filled
    victim = files(store)[1]
    content = victim.read_bytes()
    for count, damaged in enumerate(damage(content), start=1):
        victim.write_bytes(damaged)
        assert same(sweep(), frame)
        assert victim.read_bytes() == content
        assert sum(calls(log).values()) == 4 + count, damaged[:200]
    assert count > 20


def test_no_flipped_bit_goes_unnoticed(filled):
    store, sweep, _, _ = filled
    victim = files(store)[0]
    content = victim.read_bytes()
    document = json.loads(content)
    header = {key: document[key] for key in document if key not in ("result", "checksum")}
    assert sweeps._read(store, header) == document["result"]
    for position in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        victim.write_bytes(flipped)
        assert sweeps._read(store, header) is None


def test_a_result_under_the_name_of_another_is_not_believed(filled):
    store, sweep, log, frame = filled
    first, second = files(store)[:2]
    first.write_bytes(second.read_bytes())
    (store / "notes.json").write_text("something else")
    (store / f"{first.name}.1234.tmp").write_text("left by a kill")
    assert same(sweep(), frame) and sum(calls(log).values()) == 5


def test_a_larger_sweep_computes_only_what_is_new(filled):
    store, sweep, log, frame = filled
    function = functools.partial(logged, log=str(log))
    larger = sweeps.run(function, [{"x": 3}, {"x": 2.5}, {"x": 1}], [1, 0, 5], store=store)
    assert sum(calls(log).values()) == 4 + 5
    assert larger.query("x < 3 and seed < 2")["value"].tolist() == frame["value"].tolist()[::-1]


def test_equal_numbers_of_different_kind_are_different_points(tmp_path):
    grid = [{"x": 1}, {"x": 1.0}, {"x": True}, {"x": "1"}]
    frame = sweeps.run(lambda x, seed: type(x).__name__, grid, 1, store=tmp_path)
    assert same(sweeps.run(lambda x, seed: type(x).__name__, grid, 1, store=tmp_path), frame)
    assert frame["value"].tolist() == ["int", "float", "bool", "str"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats() | st.floats(width=16), min_size=1, max_size=10), st.text(), st.integers())
def test_results_come_back_to_the_last_bit(numbers, text, integer):
    def give(seed):
        return {"number": numbers[seed], "text": text, "integer": integer}

    with tempfile.TemporaryDirectory() as store:
        frames = [sweeps.run(give, {}, len(numbers), store=path) for path in (None, store, store)]
    packed = [[struct.pack("d", number) for number in frame["number"]] for frame in frames]
    expected = [struct.pack("d", math.nan if number != number else number) for number in numbers]
    assert packed == [expected] * 3
    assert all(set(frame["text"]) == {text} and set(frame["integer"]) == {integer} for frame in frames)


def define(source, name="experiment", **names):
    """A function as a notebook cell defines it."""
    namespace = {"__name__": "notebook", **names}
    exec(source, namespace)
    return namespace[name]


BASE = """
import math, torch
from torch.nn.functional import relu
dim, activations, device, dtype = 3, {"relu": relu}, torch.device("cpu"), torch.float64
class Model:
    bias = 1
    def __init__(self, width): self.width = width
    @property
    def size(self): return self.width
    @staticmethod
    def draw(n): return n + 1
    def predict(self, x): return x + 1
def helper(x): return inner(x) + 1
def inner(x): return 2 * x
def experiment(x, seed, power=2, *, shift=1):
    try:
        y = [helper(v) for v in (x, dim)][0] ** power + shift + Model(3).predict(x)
    except ZeroDivisionError:
        y = math.inf
    return y + (0 if x in {1, 2} else seed) + len(activations) + (dtype == device)
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("y = math.inf", "y = math.nan"),
        ("+ shift", "- shift"),
        ("power=2", "power=3"),
        ("shift=1", "shift=2"),
        ("{1, 2}", "{1, 3}"),
        ("dim, activations, device, dtype = 3", "dim, activations, device, dtype = 4"),
        ("torch.float64", "torch.float32"),
        ('"cpu"', '"meta"'),
        ('{"relu": relu}', '{"rectifier": relu}'),
        ("functional import relu", "functional import gelu as relu"),
        ("(v) for v in", "(-v) for v in"),
        ("inner(x) + 1", "inner(x) + 2"),
        ("return 2 * x", "return 3 * x"),
        ("return x + 1", "return x + 2"),
        ("return n + 1", "return n + 2"),
        ("return self.width", "return -self.width"),
        ("self.width = width", "self.width = 2 * width"),
        ("bias = 1", "bias = 2"),
        ("ZeroDivisionError", "ValueError"),
    ],
)
def test_any_change_of_the_function_counts(old, new):
    assert BASE.count(old) == 1
    base, changed = (sweeps._identity(define(source)) for source in (BASE, BASE.replace(old, new)))
    assert base["fingerprint"] != changed["fingerprint"]


def test_what_does_not_change_the_function_does_not_count():
    moved = "\n\n# a comment\nunused = object()\n" + BASE
    function = define(BASE)
    identity = sweeps._identity(function)
    assert sweeps._identity(define(moved)) == identity
    for seed in range(200):  # nor does the specialisation of bytecode that runs often
        function(2, seed)
    assert sweeps._identity(function) == identity


def test_changed_function_is_computed_again(tmp_path):
    one, two = (define(f"def experiment(seed): return seed + {shift}") for shift in (1, 2))
    assert sweeps.run(one, {}, 2, store=tmp_path)["value"].tolist() == [1, 2]
    assert sweeps.run(two, {}, 2, store=tmp_path)["value"].tolist() == [2, 3]
    assert sweeps.run(one, {}, 2, store=tmp_path)["value"].tolist() == [1, 2]
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("what", ["icl-lib", "numpy", "scipy", "torch", "sources"])
def test_changed_library_computes_again(filled, monkeypatch, what):
    store, sweep, log, frame = filled
    monkeypatch.setitem(sweeps._versions(), what, "99.9")
    assert same(sweep(), frame) and sum(calls(log).values()) == 8


def test_a_worker_with_another_version_stores_nothing(filled, monkeypatch):
    store, *_ = filled
    header = {"versions": dict(sweeps._versions())}
    monkeypatch.setitem(sweeps._versions(), "torch", "1.0")
    with pytest.raises(RuntimeError, match=r"a worker has another version of \['torch'\]"):
        sweeps._evaluate(never, {}, 0, store, header)
    assert len(files(store)) == 4


def test_captured_and_bound_values_count(tmp_path):
    def make(factor):
        def times(seed):
            return factor * (seed + 1)

        return times

    for factor in (2, 3, 2):
        assert sweeps.run(make(factor), {}, 2, store=tmp_path)["value"].tolist() == [factor, 2 * factor]
    assert len(files(tmp_path)) == 4
    for power in (2, 3):
        bound = functools.partial(lambda x, power, seed: x**power + seed, power=power)
        assert sweeps.run(bound, {"x": [2]}, 1, store=tmp_path)["value"].tolist() == [2**power]
    assert len(files(tmp_path)) == 6


def test_decorators_from_elsewhere_are_looked_through(tmp_path):
    source = "import torch, functools\n@torch.no_grad()\ndef experiment(seed): return helper() + {}\n@functools.cache\n"
    source += "def helper(): return {}"
    marks = {sweeps._identity(define(source.format(a, b)))["fingerprint"] for a, b in itertools.product((1, 2), (3, 4))}
    assert len(marks) == 4


def test_functions_of_installed_packages_count_by_name_and_version(tmp_path):
    assert sweeps._identity(sweeps.deviation_limit)["function"] == "icl_lib.sweeps.deviation_limit"
    one, two = (functools.partial(math.pow, base) for base in (2.0, 3.0))
    assert sweeps._identity(one)["fingerprint"] != sweeps._identity(two)["fingerprint"]


@pytest.mark.parametrize("what", [torch.ones(2), object(), np.ones(3), np.random.default_rng(0).normal])
def test_store_refuses_what_it_cannot_follow(tmp_path, what):
    def captures(seed):
        return float(what is None)

    reads = define("def experiment(seed): return helper()\ndef helper(): return float(weights is None)", weights=what)
    bound = functools.partial(lambda seed, weights: 0.0, weights=what)
    for function, name in ((captures, "what"), (reads, "helper: weights"), (bound, "weights")):
        assert sweeps.run(function, {}, 1)["value"].tolist() == [0.0]
        with pytest.raises(ValueError, match=rf"{name} is .*functools.partial"):
            sweeps.run(function, {}, 1, store=tmp_path)
    assert files(tmp_path) == []


def test_store_refuses_callable_objects(tmp_path):
    class Experiment:
        def __call__(self, seed):
            return 0.0

    for function in (Experiment(), Experiment().__call__):
        with pytest.raises(ValueError, match="expected a function of a module"):
            sweeps.run(function, {}, 1, store=tmp_path)


def never(seed):
    raise AssertionError("evaluated, although the store cannot be written to")


def test_unwritable_store_is_reported_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    for store in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"store .*{store.name} cannot be made") as raised:
            sweeps.run(never, {}, 2, store=store)
        assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)


def full_after(count):
    def fsync(_):
        nonlocal count
        count -= 1
        if count < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


def test_full_store_is_reported_at_once_and_keeps_what_is_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_after(0))
    with pytest.raises(OSError, match="cannot be written to: No space left") as raised:
        sweeps.run(never, {}, 2, store=tmp_path)
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", full_after(3))
    with pytest.raises(OSError, match="cannot be written to: No space left"):
        sweeps.run(lambda seed: float(seed), {}, 5, store=tmp_path)
    assert sorted(json.loads(path.read_text())["seed"] for path in files(tmp_path)) == [0, 1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".txt"}


@pytest.fixture
def small_files():
    """Files may not grow beyond 300 bytes: a disk that is full in the middle of a result."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_result_is_never_left_behind(tmp_path, small_files):
    with pytest.raises(OSError, match="cannot be written to: File too large") as raised:
        sweeps.run(lambda seed: seed / 7, {}, 2, store=tmp_path)
    assert raised.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["README.txt"]


@slow
def test_full_store_is_reported_by_the_workers(script, tmp_path):
    store = tmp_path / "store"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); exec({script.read_text()!r})"
    (script.parent / "limited.py").write_text(limited)
    process = launch(script.parent / "limited.py", store, tmp_path / "log", 2)
    _, errors = process.communicate(timeout=120)
    assert (
        process.returncode == 1 and f"OSError: [Errno 27] store {store} cannot be written to: File too large" in errors
    )
    assert [path.name for path in store.iterdir()] == ["README.txt"]


@pytest.fixture
def somebody_else():
    """For as long as a test needs it, the superuser, who may write anywhere, is somebody else."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.fixture
def read_only(tmp_path):
    """A store that all can read and nobody but the superuser can write to."""
    function = functools.partial(logged, log=str(tmp_path / "log"))
    with tempfile.TemporaryDirectory() as store:
        sweeps.run(function, {"x": [1]}, 2, store=store)
        os.chmod(store, 0o555)
        yield store
        os.chmod(store, 0o700)


def test_read_only_store_is_reported_before_anything_is_computed_and_can_be_looked_at(read_only, somebody_else):
    before = {path: path.read_bytes() for path in Path(read_only).iterdir()}
    with pytest.raises(OSError, match=f"store {read_only} cannot be written to: Permission denied") as raised:
        sweeps.run(never, {"x": [1]}, 3, store=read_only)
    assert raised.value.errno == errno.EACCES
    assert {path: path.read_bytes() for path in Path(read_only).iterdir()} == before
    assert sweeps.status(never, {}, 3, store=read_only)["missing"].tolist() == [3]


def test_store_may_be_relative_to_a_directory_that_the_function_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweeps.run(lambda seed: os.chdir(os.sep) or 1.0, {}, 2, store="results/here")
    assert len(files(tmp_path / "results" / "here")) == 2


# Status.


def counts(table):
    return table[["done", "missing", "damaged"]].to_numpy().tolist()


def test_status_counts_what_is_done_missing_and_damaged(filled):
    store, _, log, _ = filled
    function = functools.partial(logged, log=str(log))
    grid = {"x": [2.5, 1, 3]}
    before = {path: path.read_bytes() for path in store.iterdir()}
    table = sweeps.status(function, grid, 3, store=store)
    assert list(table.columns) == ["x", "done", "missing", "damaged"] and table["x"].tolist() == [2.5, 1, 3]
    assert counts(table) == [[2, 1, 0], [2, 1, 0], [0, 3, 0]]
    assert {path: path.read_bytes() for path in store.iterdir()} == before and sum(calls(log).values()) == 4
    victim = next(path for path in files(store) if b'"point": {"x": 1}' in path.read_bytes())
    for damaged in damage(victim.read_bytes()):
        victim.write_bytes(damaged)
        assert counts(sweeps.status(function, grid, 3, store=store)) == [[2, 1, 0], [1, 1, 1], [0, 3, 0]]
        assert victim.read_bytes() == damaged
    sweeps.run(function, grid, 3, store=store)
    assert counts(sweeps.status(function, grid, 3, store=store)) == [[3, 0, 0]] * 3
    assert counts(sweeps.status(functools.partial(function, fail_at=9), grid, 3, store=store)) == [[0, 3, 0]] * 3


def test_status_of_no_store_makes_none(tmp_path):
    assert counts(sweeps.status(never, {}, [4, 7], store=tmp_path / "none")) == [[0, 2, 0]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["done", "missing", "damaged"])
def test_status_refuses_its_own_names_in_the_grid(tmp_path, name):
    with pytest.raises(ValueError, match=rf"grid has the names \['{name}'\], expected no name among"):
        sweeps.status(never, {name: [1]}, 2, store=tmp_path)


def test_status_refuses_what_run_refuses(tmp_path):
    for arguments in ((never, [], 1), (never, {}, 0), (functools.partial(never, x=object()), {}, 1)):
        with pytest.raises(ValueError):
            sweeps.status(*arguments, store=tmp_path)


# A Dask cluster: a real one, of processes on this machine.


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as local,
        distributed.Client(local) as client,
        joblib.parallel_config(backend="dask"),
    ):
        yield client


@slow
def test_a_dask_cluster_gives_the_same_bits(serial, cluster, tmp_path):
    factor = 3
    assert sweeps.run(lambda a, seed: factor * a + seed, {"a": [1, 2]}, 2)["value"].tolist() == [3, 4, 6, 7]
    assert sweeps.run(lambda seed: os.getpid(), {}, 8)["value"].isin(cluster.run(os.getpid).values()).all()
    assert same(sweeps.run(experiment, GRID, 3), serial)
    assert same(sweeps.run(experiment, GRID, 3, store=tmp_path), serial)
    assert same(sweeps.run(experiment, GRID, 3, store=tmp_path, n_jobs=1), serial) and len(files(tmp_path)) == 12


def unhurried(*, x, seed, log):
    time.sleep(0.1)
    return logged(x=x, seed=seed, log=log)


@slow
def test_a_dask_cluster_survives_the_death_of_a_worker(cluster, tmp_path):
    """Dask gives the evaluations of the dead worker to others, and those that it had stored are not made again."""
    log, store, grid = str(tmp_path / "log"), tmp_path / "store", {"x": [0.1, 2, 3.5]}
    stored = []

    def kill():
        while len(files(store)) < 7:
            time.sleep(0.002)
        os.kill(min(cluster.run(os.getpid).values()), signal.SIGKILL)
        stored.extend(files(store))

    killer = threading.Thread(target=kill)
    killer.start()
    frame = sweeps.run(functools.partial(unhurried, log=log), grid, 8, store=store)
    killer.join()
    before = [f"{entry['point']['x']} {entry['seed']}" for entry in (json.loads(path.read_text()) for path in stored)]
    assert 7 <= len(before) < 24 == len(files(store)) == len(calls(log))
    assert all(calls(log)[pair] == 1 for pair in before)
    assert sum(calls(log).values()) <= 24 + 2  # the worker died in one evaluation, or just after it
    assert same(frame, sweeps.run(functools.partial(logged, log=str(tmp_path / "serial")), grid, 8, n_jobs=1))
    assert counts(sweeps.status(functools.partial(unhurried, log=log), grid, 8, store=store)) == [[8, 0, 0]] * 3


# Progress.


@pytest.mark.parametrize(
    "progress, terminal, shown", [(None, False, False), (None, True, True), (True, False, True), (False, True, False)]
)
def test_bar_appears_only_where_it_should(capsys, monkeypatch, progress, terminal, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    sweeps.run(lambda seed: 0.0, {}, 3, progress=progress)
    output = capsys.readouterr()
    assert output.out == "" and ("3/3" in output.err) == shown == bool(output.err)


def test_importing_the_module_loads_no_table_or_plotting_library():
    program = "import sys, icl_lib.sweeps; print(*{'pandas', 'joblib', 'scipy.stats', 'matplotlib'} & set(sys.modules))"
    root = Path(sweeps.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"


# Comparison with theory.


def test_summary_is_mean_and_standard_error():
    frame = pd.DataFrame({"a": [2, 2, 2, 1, 1], "kind": ["x"] * 5, "seed": [0, 1, 2, 0, 1], "error": [1.0, 2, 6, 4, 4]})
    table = sweeps.summarise(frame, ["a", "kind"], value="error")
    assert list(table.columns) == ["a", "kind", "mean", "se", "runs"]
    assert table["a"].tolist() == [2, 1] and table["mean"].tolist() == [3.0, 4.0] and table["runs"].tolist() == [3, 2]
    np.testing.assert_allclose(table["se"], [math.sqrt(7 / 3), 0.0], rtol=1e-15)
    assert list(sweeps.summarise(frame, "a", "error").columns) == ["a", "mean", "se", "runs"]


@pytest.mark.parametrize(
    "by, value, message",
    [
        ("b", "value", "distinct columns among"),
        ("a", "b", "distinct columns among"),
        ([], "value", "distinct columns among"),
        (["a", "a"], "value", "distinct columns among"),
        ("a", "a", "distinct columns among"),
        ("runs", "value", "named mean, se or runs"),
        (["a", "seed"], "value", "at least two runs"),
        ("a", "name", "expected numbers"),
        ("a", "gap", "gap holds nan"),
    ],
)
def test_bad_summaries_are_refused(by, value, message):
    columns = {
        "a": [1, 1],
        "seed": [0, 1],
        "runs": [1, 1],
        "value": [1.0, 2.0],
        "name": ["x", "y"],
        "gap": [1, math.nan],
    }
    with pytest.raises(ValueError, match=message):
        sweeps.summarise(pd.DataFrame(columns), by, value)


def test_largest_deviation():
    assert sweeps.largest_deviation([1.0, 2.0], [0.5, 0.1], [2.0, 2.1]) == 2.0
    tensors = (torch.tensor([[1.0]], requires_grad=True), torch.tensor([[0.25]]), torch.tensor([[0.0]]))
    assert sweeps.largest_deviation(*tensors) == 4.0


@pytest.mark.parametrize(
    "mean, se, theory, message",
    [
        ([1.0], [1.0, 2.0], [1.0], r"\(1,\), \(2,\), \(1,\)"),
        ([1.0, 2.0], [1.0, 2.0], 1.0, "expected one shape"),
        ([], [], [], "at least one point"),
        ([1.0], [0.0], [1.0], "positive standard errors"),
        ([math.nan], [1.0], [1.0], "mean holds nan"),
        ([1.0], [1.0], [math.inf], "theory holds inf"),
        (["x"], [1.0], [1.0], "mean is"),
    ],
)
def test_bad_deviations_are_refused(mean, se, theory, message):
    with pytest.raises(ValueError, match=message):
        sweeps.largest_deviation(mean, se, theory)


def test_limit_is_a_quantile_of_student():
    assert sweeps.deviation_limit(1, 2, 0.5) == pytest.approx(
        1.0, rel=2e-11
    )  # Cauchy quartile; scipy 1.11 misses 1e-11
    assert sweeps.deviation_limit(1, 10**9, 0.05) == pytest.approx(1.959963984540054, rel=1e-8)
    assert sweeps.deviation_limit(20, 8) == sweeps.deviation_limit(1, 8, 1e-3 / 20)
    assert sweeps.deviation_limit(20, 8) > sweeps.deviation_limit(10, 8) > sweeps.deviation_limit(10, 80)


def test_limit_is_exceeded_as_often_as_it_says():
    runs, points, trials, level = 5, 4, 4000, 0.05
    draws = np.random.default_rng(1).normal(size=(trials, points, runs))
    means, errors = draws.mean(-1), draws.std(-1, ddof=1) / math.sqrt(runs)
    limit = sweeps.deviation_limit(points, runs, level)
    alarms = sum(sweeps.largest_deviation(m, s, np.zeros(points)) > limit for m, s in zip(means, errors, strict=True))
    expected = 1 - (1 - level / points) ** points  # independent points
    assert abs(alarms / trials - expected) < 4 * math.sqrt(expected / trials)


@pytest.mark.parametrize("points, runs, level", [(0, 5, 0.1), (3, 1, 0.1), (3, 5, 0.0), (3, 5, 1.0), (3, 5, math.nan)])
def test_bad_limits_are_refused(points, runs, level):
    with pytest.raises(ValueError, match="expected points >= 1"):
        sweeps.deviation_limit(points, runs, level)


def test_sweep_summary_and_limit_work_together():
    def mean_of_squares(size, seed):
        return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).square().mean()

    table = sweeps.summarise(sweeps.run(mean_of_squares, {"size": [50, 100, 200]}, 20), by="size")
    limit = sweeps.deviation_limit(points=len(table), runs=20)
    assert sweeps.largest_deviation(table["mean"], table["se"], np.ones(3)) < limit
    assert sweeps.largest_deviation(table["mean"], table["se"], np.full(3, 1.3)) > limit
