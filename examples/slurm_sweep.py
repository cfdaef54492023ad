"""Run a Python script with all its sweeps on a Slurm cluster; with --local, on processes of this machine.

    python examples/slurm_sweep.py --workers 20 --memory 8GB --walltime 04:00:00 experiment.py [its options]

The script stays as it is: every `sweeps.run` in it that does not set `n_jobs` uses the workers, one job and one core
each. Give its stores a path that all nodes see. Start this in a login session that lasts (tmux, say) or in a small job.
Needs `pip install "icl-lib[cluster]"` in an environment that all nodes see.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import joblib
from dask.distributed import Client, LocalCluster

THREADS = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}  # the same bits on every machine


def slurm(options: argparse.Namespace) -> Any:
    """A cluster whose workers are Slurm jobs."""
    from dask_jobqueue import SLURMCluster

    return SLURMCluster(
        cores=1,
        processes=1,
        memory=options.memory,
        walltime=options.walltime,
        queue=options.partition,
        account=options.account,
        job_extra_directives=options.directive,
        job_script_prologue=[f"export {name}={value}" for name, value in THREADS.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="number of jobs; the sweep starts when all of them run")
    parser.add_argument("--memory", default="4GB", help="of each; see icl_lib.models.training_memory")
    parser.add_argument("--walltime", default="01:00:00", help="of each; a job that ends is lost, not its results")
    parser.add_argument("--partition", help="of the cluster; its default if missing")
    parser.add_argument("--account", help="to which the time is charged")
    parser.add_argument("--directive", action="append", default=[], help='more for Slurm: "--gres=gpu:1", say')
    parser.add_argument("--local", action="store_true", help="try it on this machine, without Slurm")
    parser.add_argument("--show", action="store_true", help="print the script of a job, and submit nothing")
    parser.add_argument("script", help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the script")
    options = parser.parse_args()
    os.environ.update(THREADS)
    cluster = (
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) if options.local else slurm(options)
    )
    with cluster, Client(cluster) as client:
        if options.show:
            print(cluster.job_script())
            return
        cluster.scale(options.workers)
        client.wait_for_workers(options.workers)
        sys.argv = [options.script, *options.arguments]
        sys.path.insert(0, str(Path(options.script).resolve().parent))
        with joblib.parallel_config(backend="dask"):
            runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
