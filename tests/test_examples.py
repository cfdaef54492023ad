"""The scripts for a cluster do on this machine what they say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import os, sys
import torch
from icl_lib import sweeps


def experiment(*, x, seed):
    return {"mean": x * torch.randn(9, generator=torch.Generator().manual_seed(seed)).mean(), "process": os.getpid()}


if __name__ == "__main__":
    frame = sweeps.run(experiment, {"x": [1.0, 2.0]}, 3, store=sys.argv[1])
    print(*(value.hex() for value in frame["mean"]), sweeps.status(experiment, {"x": [1.0, 2.0]}, 3, store=sys.argv[1]))
    print(os.getpid() in set(frame["process"]))
"""

pytestmark = [pytest.mark.slow]


def run(*arguments: object) -> list[str]:
    command = [sys.executable, *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_script_runs_unchanged_on_a_dask_cluster_and_shares_its_store(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "experiment.py").write_text(SCRIPT)
    example = (ROOT / "examples/slurm_sweep.py", "--local", tmp_path / "experiment.py")
    *there, own = run(*example, tmp_path / "there")
    assert own == "False" and "True" == run(tmp_path / "experiment.py", tmp_path / "here")[-1]
    *here, own = run(tmp_path / "experiment.py", tmp_path / "there")  # found in the store, not computed again
    assert own == "False" and here == there == run(tmp_path / "experiment.py", tmp_path / "here")[:-1]


def test_the_job_of_a_slurm_worker_is_what_was_asked_for() -> None:
    pytest.importorskip("dask_jobqueue")
    wanted = ["--memory", "8GB", "--walltime", "04:00:00", "--partition", "long", "--directive=--gres=gpu:1"]
    job = run(ROOT / "examples/slurm_sweep.py", *wanted, "--show", "experiment.py")
    for line in ("--mem=8G", "-t 04:00:00", "-p long", "--gres=gpu:1", "--cpus-per-task=1"):
        assert f"#SBATCH {line}" in job
    assert "export OMP_NUM_THREADS=1" in job and any("--nthreads 1" in line for line in job)
