"""What the three comparisons share: a learning rate for each loss, several seeds, a table and a verdict."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Scores = Mapping[str, float]
"""By the name of a measure; the first one chooses the learning rate, and higher is better in all."""
Trial = Callable[[str, float, int, bool], tuple[Scores, Scores]]
"""``trial(loss, rate, seed, quick)``: scores on validation and on test data. At a rate of 0 nothing is learned."""
Results = dict[str, dict[str, list[float]]]
"""By loss and measure, the scores of the seeds on test data."""


def train(model: nn.Module, rate: float, steps: int, loss_of_batch: Callable[[], Tensor]) -> None:
    """Adam with a rate that falls to 0; a rate of 0 takes no step."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps if rate else 0):
        optimizer.zero_grad()
        loss_of_batch().backward()
        optimizer.step()
        schedule.step()


def compare(trial: Trial, usual: list[str], ranking: list[str], rates: list[float], seeds: int, quick: bool) -> Results:
    """Train with each loss at each rate with each seed; print test scores at the rate that was best on validation data.

    All losses have the same rates to choose from, and for a seed the same data, first weights and batches.
    """
    seeds, rates = (1, rates[1:2]) if quick else (seeds, rates)
    print(f"seeds: {seeds}; learning rates: {', '.join(f'{rate:g}' for rate in rates)}\n")
    results: Results = {}
    for loss in ["untrained", *usual, *ranking]:
        choices = [0.0] if loss == "untrained" else rates
        tried = {rate: [trial(loss, rate, seed, quick) for seed in range(seeds)] for rate in choices}
        measures = list(tried[choices[0]][0][0])
        best = max(tried, key=lambda rate: sum(validation[measures[0]] for validation, _ in tried[rate]))
        results[loss] = {measure: [test[measure] for _, test in tried[best]] for measure in measures}
        if len(results) == 1:
            print(f"| loss | learning rate | {' | '.join(measures)} |\n| --- | ---: |{' ---: |' * len(measures)}")
        cells = [f"{statistics.mean(values):.3f} ± {spread(values):.3f}" for values in results[loss].values()]
        print(f"| {loss} | {f'{best:g}' if best else ''} | {' | '.join(cells)} |", flush=True)
    print("\n" + verdict(results, usual, ranking))
    return results


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(results: Results, usual: list[str], ranking: list[str]) -> str:
    """What differs from the better of the usual losses by more than twice the standard error of the difference."""
    found = []
    for measure in results[usual[0]]:
        rival = max(usual, key=lambda loss: statistics.mean(results[loss][measure]))
        for loss in ranking:
            apart = [ours - theirs for ours, theirs in zip(results[loss][measure], results[rival][measure])]
            mean, error = statistics.mean(apart), spread(apart) / len(apart) ** 0.5
            seen = len(apart) > 1 and abs(mean) > 2 * error
            relation = ("ahead of" if mean > 0 else "behind") if seen else "no difference seen from"
            found.append(f"{loss}: {relation} {rival} in {measure} ({mean:+.3f} ± {error:.3f})")
    return "; ".join(found) + "."


def main(trial: Trial, usual: list[str], ranking: list[str], rates: list[float], about: str | None) -> None:
    """The command line of a comparison."""
    arguments = argparse.ArgumentParser(description=about)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--quick", action="store_true", help="few steps, one seed and one learning rate")
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    compare(trial, usual, ranking, rates, asked.seeds, asked.quick)
