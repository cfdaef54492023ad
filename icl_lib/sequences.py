"""What small Transformers are trained on: sequences of tokens with answers, and controls without anything to learn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number

__all__ = ["Examples", "ModularAddition", "Repeats"]


@dataclass(frozen=True)
class Examples:
    """Sequences with their answers.

    Args:
        tokens: what the model reads, shape ``(..., n, length)``.
        targets: the right answers at the last positions, shape ``(..., n, answers)``.
        scored: which answers count for the accuracy, shape ``(..., n, answers)``; the loss takes them all.

    Source: [this book, "Emergence"]
    """

    tokens: Int[Tensor, "*batch n length"]
    targets: Int[Tensor, "*batch n answers"]
    scored: Bool[Tensor, "*batch n answers"]


@dataclass(frozen=True)
class Repeats:
    """Sequences that repeat P distinct random tokens; the answer at position t is the token at t + 1.

    P is uniform from ``shortest`` to ``longest``, since one period could be solved by position alone. The accuracy
    counts the positions from P on, where the token has been seen before, with what came after it.

    Args:
        n_tokens: number of tokens to choose from.
        length: number of tokens T that the model reads.
        shortest, longest: range of the period P.
        shuffled: put the tokens of each sequence in random order: the control, with nothing to copy.
        batch: number of fresh sequences of a training step.
        held_out: number of sequences of the held-out set.

    Raises:
        ValueError: for sizes below 1, or periods that do not fit the number of tokens or the length.

    Source: [Olsson et al. 2022, repeated random sequences; setting: this book, "Emergence"]
    """

    n_tokens: int = 16
    length: int = 24
    shortest: int = 5
    longest: int = 10
    shuffled: bool = False
    batch: int = 32
    held_out: int = 128

    def __post_init__(self) -> None:
        for name in ("n_tokens", "length", "shortest", "longest", "batch", "held_out"):
            _check.integer(name, getattr(self, name))
        most = min(self.n_tokens, self.length - 1)
        if not self.shortest <= self.longest <= most:
            raise ValueError(f"longest is {self.longest}, expected an integer from {self.shortest} to {most}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of input tokens, of output tokens and of positions."""
        return self.n_tokens, self.n_tokens, self.length

    def sample(self, n: int, *, generator: torch.Generator) -> Examples:
        """Draw n sequences.

        Args:
            n: number of sequences.
            generator: source of randomness; the sequences live on its device.

        Raises:
            ValueError: for n below 1.
        """
        _check.integer("n", n)
        device = _check.random("generator", generator).device
        order = torch.rand(n, self.n_tokens, generator=generator, device=device).argsort(-1)
        period = torch.randint(self.shortest, self.longest + 1, (n, 1), generator=generator, device=device)
        place = torch.arange(self.length + 1, device=device) % period
        if self.shuffled:
            place = place.gather(1, torch.rand(place.shape, generator=generator, device=device).argsort(-1))
        tokens = order.gather(1, place)
        scored = torch.arange(self.length, device=device) >= period
        return Examples(tokens[:, :-1], tokens[:, 1:], scored)

    def sets(self, *, generator: torch.Generator) -> dict[str, Examples]:
        """The held-out set. There is no training set: every step draws fresh sequences."""
        return {"held_out": self.sample(self.held_out, generator=generator)}


@dataclass(frozen=True)
class ModularAddition:
    """Sums modulo p, read from the sequence a, b, =, with the unordered pairs split into training and held-out ones.

    Pairs of equal numbers are split alike. If ordered pairs are split instead, a + b = b + a leaks held-out sums.

    Args:
        modulus: p, at least 3.
        share: part of the pairs that is trained on, above 0 and below 1.
        shuffled: permute the sums among the unordered pairs: the control, with nothing to generalise.
        ordered: split ordered pairs: the published way, which leaks.

    Raises:
        ValueError: for a modulus below 3, or a share that leaves one of the two sets empty.

    Source: [Nanda et al. 2023, task; split of unordered pairs: this book, "Grokking"]
    """

    modulus: int = 31
    share: Number = 0.7
    shuffled: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        pairs = _check.integer("modulus", self.modulus, least=3) * (self.modulus - 1) // 2
        if not 0 < round(_check.number("share", self.share) * pairs) < pairs:
            raise ValueError(f"share is {self.share}, expected a number above 0 and below 1 that leaves pairs to both")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of input tokens, of output tokens and of positions."""
        return self.modulus + 1, self.modulus, 3

    def sets(self, *, generator: torch.Generator) -> dict[str, Examples]:
        """Draw the split: the training set and the held-out set, unless ordered each with both orders of its pairs.

        Args:
            generator: source of randomness; the sets live on its device.
        """
        device = _check.random("generator", generator).device
        p, residues = self.modulus, torch.arange(self.modulus, device=device)
        sums = (residues[:, None] + residues) % p
        a, b = torch.triu_indices(p, p, device=device)
        if self.shuffled:
            sums[a, b] = sums[b, a] = sums[a, b][torch.randperm(len(a), generator=generator, device=device)]
        training = torch.zeros_like(sums, dtype=torch.bool)
        if self.ordered:
            order = torch.randperm(p * p, generator=generator, device=device)
            training.view(-1)[order[: round(self.share * p * p)]] = True
        else:
            for a, b in (torch.triu_indices(p, p, 1, device=device), (residues, residues)):
                chosen = torch.randperm(len(a), generator=generator, device=device)[: round(self.share * len(a))]
                training[a[chosen], b[chosen]] = training[b[chosen], a[chosen]] = True
        sets = {}
        for name, mask in (("train", training), ("held_out", ~training)):
            targets = sums[mask][:, None]
            tokens = torch.cat([mask.nonzero(), torch.full_like(targets, p)], -1)
            sets[name] = Examples(tokens, targets, torch.ones_like(targets, dtype=torch.bool))
        return sets
