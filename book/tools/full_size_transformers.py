"""Train the small Transformers of the chapters on macroscopic measures, and store all measures with provenance.

One row a recorded step, seed and run. `make paper` calls this after `full_size.py`. The runs of a variant are trained
together, stacked; the state of each training is kept in `.icl_store`, so that an interrupted call resumes.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from full_size import DATA, ROOT, record
from torch import Tensor

from icl_lib import spectral, transformers
from icl_lib.sequences import Examples, ModularAddition, Repeats
from icl_lib.transformers import Architecture, Trajectory

SMALL = {"n_steps": 1500, "learning_rate": 3e-3, "weight_decay": 0.01}
SUMS = {"n_steps": 2400, "learning_rate": 1e-2, "weight_decay": 2.0, "warm_up": 10}
PUBLISHED = {"n_steps": 6000, "learning_rate": 1e-3, "weight_decay": 1.0, "warm_up": 10, "every": 100}
ONE = Architecture(layers=1, heads=4, dim=48, width=128)
WIDE = Architecture(layers=1, heads=4, dim=128, width=512)

# By experiment and run: task, sizes, how to train, seeds. The fresh runs test what was found on the others.
RUNS: dict[str, dict[str, tuple[Any, Architecture, dict[str, Any], range]]] = {
    "emergence": {
        "2 layers": (Repeats(), Architecture(scale=0.05), SMALL, range(12)),
        "1 layer": (Repeats(), Architecture(layers=1, scale=0.05), SMALL, range(12)),
        "2 layers, fresh": (Repeats(), Architecture(scale=0.05), SMALL, range(12, 24)),
        "1 layer, fresh": (Repeats(), Architecture(layers=1, scale=0.05), SMALL, range(12, 24)),
        "shuffled": (Repeats(shuffled=True), Architecture(scale=0.05), SMALL, range(12)),
        "held": (Repeats(), Architecture(scale=0.05), SMALL | {"hold": 150}, range(12)),
        "larger start": (Repeats(), Architecture(), SMALL, range(12)),
        "1 layer, larger start": (Repeats(), Architecture(layers=1), SMALL, range(12)),
        "held at start": (Repeats(), Architecture(scale=0.05), SMALL | {"hold": 0}, range(12)),
        "4 heads": (Repeats(), Architecture(heads=4, scale=0.05), SMALL, range(12)),
    },
    "grokking": {
        "sums": (ModularAddition(), ONE, SUMS, range(12)),
        "shuffled": (ModularAddition(shuffled=True), ONE, SUMS, range(12)),
        "published size": (ModularAddition(113, 0.3, ordered=True), WIDE, PUBLISHED, range(1)),
    },
}


def head_tables(run: Trajectory, circuits: tuple[str, ...]) -> dict[str, Tensor]:
    """Means over the heads of a layer, (times, runs): rank, marginalised rank, distance to the end and to half-time."""
    columns = {}
    for circuit in circuits:
        left, right = transformers.attention_factors(run.weights, circuit)
        tables = {"rank": spectral.product_rank(left, right), "marginal": spectral.product_rank(left, right, 2)}
        for name, t in {"end": -1, "half": len(run.steps) // 2}.items():
            reference = left[t].double() @ right[t].double()
            # the row space of a product is that of its right factor
            tables[f"distance_{name}"] = spectral.subspace_distance(right, reference)
        for name, table in tables.items():
            for layer in range(left.shape[2]):
                columns[f"{circuit.lower()}{layer}_{name}"] = table[:, :, layer].mean(-1)
    return columns


def copying(run: Trajectory) -> dict[str, Tensor]:
    """Scores of the best previous-token head of the first layer and of the best induction head of the last one.

    Also the accuracy without that first head, and without the other heads of its layer. All on 128 fresh repeated
    sequences, which are the same everywhere; shape (times, runs).
    """
    test = Repeats().sample(128, generator=torch.Generator().manual_seed(1000))
    runs = run.weights["output"].shape[1]
    tokens = test.tokens.expand(runs, -1, -1)
    rows = []
    for time_ in range(len(run.steps)):
        weights = {name: table[time_] for name, table in run.weights.items()}
        previous, induction = transformers.head_scores(transformers.attention_patterns(weights, tokens), tokens)
        best = torch.nn.functional.one_hot(previous[:, 0].argmax(-1), previous.shape[-1])  # (runs, heads)
        row = {"previous": previous[:, 0].amax(-1), "induction": induction[:, -1].amax(-1)}
        for name, off in (("without_previous", best), ("without_others", 1 - best)):
            output = weights["output"].clone()
            output[:, 0] *= (1 - off)[..., None, None]
            guess = transformers.logits(weights | {"output": output}, tokens).argmax(-1)
            row[name] = ((guess == test.targets) & test.scored).sum((1, 2)) / test.scored.sum()
        rows.append(row)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def circuit(run: Trajectory, task: ModularAddition) -> dict[str, Tensor]:
    """What the key frequencies, those above an equal share of the embedding's power, do; shape (times, runs).

    Their number; the held-out accuracy with nothing else left in the embedding besides its mean, without them, and
    without as many of the strongest others; the part of the held-out logits, less their means, that cosines of these
    frequencies explain with amplitudes from the training pairs, and the same for as many of the strongest others.
    """
    p = task.modulus
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p), torch.tensor([p]))
    sums = pairs[:, :2].sum(-1) % p
    angles = 2 * torch.pi * torch.outer(torch.arange(1, p // 2 + 1), torch.arange(p)).double() / p
    offsets = (sums[:, None] + torch.arange(p)) % p
    seeds = run.weights["embed"].shape[1]
    rows = []
    for seed in range(seeds):
        a, b, _ = run.sets["held_out"].tokens[seed].T
        held = torch.zeros(p, p, dtype=torch.bool).index_put((a, b), torch.tensor(True)).flatten()
        for time_ in range(len(run.steps)):
            weights = {name: table[time_, seed : seed + 1].double() for name, table in run.weights.items()}
            waves = torch.fft.rfft(weights["embed"][0, :p], dim=0)
            power = waves[1:].abs().square().sum(-1)
            key = power > power.mean()
            others = ~key & (power >= power.masked_fill(key, 0).topk(int(key.sum())).values[-1])

            def answers(stay: Tensor, weights: dict[str, Tensor] = weights, waves: Tensor = waves) -> Tensor:
                rows = torch.fft.irfft(waves * torch.cat([stay.new_ones(1), stay])[:, None], n=p, dim=0)
                embed = torch.cat([rows, weights["embed"][0, p:]])[None]
                return transformers.answer_logits(weights | {"embed": embed}, pairs[None])[0]

            row = {"keys": key.sum().double()}
            for name, stay in (("only_keys", key), ("without_keys", ~key), ("without_others", ~others)):
                row[name] = (answers(stay).argmax(-1) == sums)[held].double().mean()
            logits = answers(torch.ones_like(key))
            by_offset = (logits - logits.mean(-1, keepdim=True)).gather(1, offsets)
            amplitude = 2 * by_offset[~held].mean(0) @ angles.cos().T / p
            for name, chosen in (("explained", key), ("explained_others", others)):
                rest = by_offset[held] - amplitude[chosen] @ angles[chosen].cos()
                row[name] = 1 - rest.square().sum() / by_offset[held].square().sum()
            rows.append(row)
    return {name: torch.stack([row[name] for row in rows]).view(seeds, -1).mT for name in rows[0]}


def measures(run: Trajectory, task: Repeats | ModularAddition) -> dict[str, Tensor]:
    """All columns of a table, (times, runs) each; the curvature of the loss follows from the loss."""
    if isinstance(task, Repeats):
        columns = {"accuracy": run.accuracy["held_out"], "loss": run.loss["held_out"]} | copying(run)
        return columns | head_tables(run, ("QK",))
    columns = {f"{name}_accuracy": table for name, table in run.accuracy.items()}
    columns |= {f"{name}_loss": table for name, table in run.loss.items()}
    columns["frequencies"] = spectral.frequency_count(run.weights["embed"][:, :, :-1])  # not of the equals sign
    summed = transformers.attention_factors(run.weights, "OV", summed=True)
    columns["ov_summed_rank"] = spectral.product_rank(*summed)[..., 0]
    columns |= circuit(run, task)
    return columns | head_tables(run, ("QK", "OV"))


def store(experiment: str, device: str) -> None:
    """Train every run of an experiment, and write its table and where it comes from."""
    started, frames = time.time(), []
    settings: dict[str, dict[str, Any]] = {}
    for name, (task, architecture, how, seeds) in RUNS[experiment].items():
        begun = time.time()
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        slug = re.sub(r"\W+", "-", f"{experiment} {name} {device}")
        file = ROOT / ".icl_store" / "transformers" / f"{slug}.pt"
        run = transformers.train(task, architecture, generators=generators, **how, store=file)
        parts = (run.weights, run.loss, run.accuracy)
        weights, loss, accuracy = ({key: table.cpu() for key, table in part.items()} for part in parts)
        sets = {key: Examples(*(x.cpu() for x in vars(part).values())) for key, part in run.sets.items()}
        columns = measures(Trajectory(run.steps.cpu(), weights, loss, accuracy, sets), task)
        index: dict[str, Any] = {"run": name, "seed": torch.tensor(seeds).repeat(len(run.steps))}
        index["step"] = run.steps.cpu().repeat_interleave(len(seeds))
        frames.append(pd.DataFrame(index | {key: table.flatten().double().numpy() for key, table in columns.items()}))
        settings[name] = {"task": {"name": type(task).__name__} | asdict(task), "architecture": asdict(architecture)}
        settings[name] |= {"training": how, "seeds": [seeds.start, seeds.stop - 1], "rows": len(frames[-1])}
        print(f"{experiment}, {name}: {len(seeds)} seeds in {time.time() - begun:.0f} s", flush=True)
    table = pd.concat(frames)
    losses = {name: table[name].map("{:.6g}".format) for name in columns if name.endswith("loss")}  # compared closely
    table.assign(**losses).to_csv(DATA / f"{experiment}.csv", index=False, float_format="%.4g")
    about = {"function": f"{Path(__file__).name}:{measures.__name__}", "sizes": settings, "device": device}
    command = f"{Path(__file__).name} --only {experiment} --device {device}"
    about |= record(command, int(table.seed.nunique()), len(table), started)
    about["seconds_of_last_call"] = about.pop("seconds")  # trainings found in the store take none
    (DATA / f"{experiment}.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(RUNS), help="one of the two experiments")
    parser.add_argument("--device", default="cpu", help="for instance cuda, whose streams of random numbers differ")
    options = parser.parse_args()
    for chosen in [options.only] if options.only else RUNS:
        store(chosen, options.device)
