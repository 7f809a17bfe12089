"""Two disputes of the literature on gradients that are guessed, each settled by one command on small nets and digits.

    python scripts/disputes.py coordinates     # coordinates or random directions? docs/coordinates_or_directions.md
    python scripts/disputes.py guesses         # are local guesses enough?         docs/local_guesses.md
    python scripts/disputes.py coordinates --seeds 0,1,2,3,4,5,6,7 --out /tmp/pages

Four minutes each. All settings of a dispute see the same samples in the same number of updates and choose their
learning rate out of one list, by validation accuracy of the first seed; the other seeds run at the chosen one. Tables,
intervals and verdict are computed from the runs. Runs are cells of a tracked sweep: asked again, they are read from the
store. The third dispute, whether feedback scales, has scripts/scaling_laws.py.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from questions import Setting, Settings, accuracy, compared, difference, shown_difference

from onward.app import assemble
from onward.compare.statistics import estimate
from onward.launch import run_jobs
from onward.launch.job import FINISHED, JobResult
from onward.samples import composed
from onward.tracking import history

ROOT = Path(__file__).resolve().parents[1]
WIDE = 116
COSINE = "mean cosine"  # with the exact gradient, of a unit, over the updates at which it was measured


@dataclass(frozen=True)
class Dispute:
    """A claim against a claim, the settings that are run, and how they answer.

    Attributes:
        page: name of the page in docs/.
        claims: who says what, and how it is put to the test; paragraphs.
        settings: overrides by name; the first is what differences are taken to.
        rates: learning rates to choose from.
        columns: title and figure of a setting, beside accuracy and difference.
        verdict: the answer in one sentence, from the runs.
        findings: the figures behind it, a paragraph each.
    """

    page: str
    title: str
    claims: Sequence[str]
    settings: Mapping[str, Sequence[str]]
    common: Sequence[str]
    rates: Sequence[str]
    columns: Mapping[str, Callable[[Setting], str]]
    verdict: Callable[[Settings], str]
    findings: Callable[[Settings], list[str]]
    limits: str


# ---------------------------------------------------------------------- figures


def flops(setting: Setting) -> float:
    """Of one update."""
    return setting.mean("cost/flops")


def cosines(setting: Setting, units: Sequence[str]) -> list[float]:
    """Mean cosine with the exact gradient, over updates and seeds, of those of the units that have one."""
    return [setting.mean(key) for unit in units if (key := f"{COSINE}/{unit}") in next(iter(setting.metrics.values()))]


def are(name: str, settings: Settings, reference: str) -> str:
    """:func:`compared` of a name in the plural."""
    return compared(name, settings, reference).replace(f"{name} is ", f"{name} are ")


def better(a: Setting, b: Setting) -> int:
    """1 where a's accuracy is above b's by more than the interval, -1 below, 0 where neither is shown."""
    _, low, high = difference(a, b)
    if low is None:
        return 0
    return int(low > 0) - int(high < 0)


# ---------------------------------------------------------------------- coordinates or random directions

QUERIES = (17, 65)
NET = ("model=cnn", "model.channels=[4,8]", "model.readout=flatten")


def coordinates(queries: int) -> str:
    return f"{queries - 1} coordinates"


def directions(queries: int) -> str:
    return f"{queries - 1} directions"


def parameters(words: Sequence[str]) -> int:
    """Of the net that these overrides build."""
    return sum(p.numel() for p in assemble(composed(*words, "tracking=off", "probe=none")).engine.model.parameters())


def explained(setting: Setting) -> float:
    """Share of a unit's squared gradient that the estimate explains: squared cosine, over units, updates and seeds."""
    found = [v for m in setting.metrics.values() for k, v in m.items() if k.startswith("mean squared cosine/")]
    return mean(found)


def laws(queries: int, d: int) -> tuple[float, float]:
    """What so many queries explain on average: drawn coordinates ``m / d``, random directions ``m / (m + d + 1)``."""
    m = queries - 1
    return m / d, m / (m + d + 1)


def coordinates_verdict(settings: Settings) -> str:
    signs = [better(settings[coordinates(q)], settings[directions(q)]) for q in QUERIES]
    cheaper = [flops(settings[directions(q)]) / flops(settings[coordinates(q)]) for q in QUERIES]
    price = f"and cost {min(cheaper):.1f} to {max(cheaper):.1f} times fewer FLOPs"
    if len(set(signs)) > 1:
        said = {1: "coordinates are better", 0: "neither is shown to be better", -1: "random directions are better"}
        return ("It depends on the number of queries: " + "; ".join(
            f"at {q} of them {said[sign]}" for q, sign in zip(QUERIES, signs, strict=True))
            + f". Coordinates leave what is below them as it was, {price}.")
    if signs[0] > 0:
        return f"Coordinates: at equal queries they are better at every budget, {price}."
    if signs[0] < 0:
        return f"Random directions: at equal queries they are better at every budget, though coordinates {price[4:]}."
    return f"Neither per query: no difference is shown at any budget. Coordinates win per FLOP, {price}."


def coordinates_findings(settings: Settings) -> list[str]:
    d = parameters([*NET, "data=digits"])
    said = "; ".join(are(coordinates(q), settings, directions(q)) for q in QUERIES)
    law = " and ".join(f"{100 * laws(q, d)[0]:.1f} % and {100 * laws(q, d)[1]:.1f} % at {q} queries" for q in QUERIES)
    shares = "; ".join(f"{name} {100 * explained(settings[name]):.1f} %" for q in QUERIES
                       for name in (coordinates(q), directions(q)))
    return [f"At equal queries: {said}.",
            f"Of the squared gradient of all {d:,} parameters, coordinates and directions explain {law} by the laws "
            f"above. Measured within units, mean over units: {shares}. While m is far below d the laws are the same: a "
            "mask drawn at random carries no more information than as many random directions, and the gap grows to a "
            "factor of two where every coordinate is asked (tests/learn/test_deepzero_and_federated.py measures both)."]


COORDINATES = Dispute(
    page="coordinates_or_directions.md",
    title="Coordinates or random directions?",
    claims=[
        "DeepZero [440] (Chen et al. 2024, arXiv 2310.02025) says that finite differences along single coordinates "
        "train better than estimates along random directions. The benchmark of zeroth-order fine-tuning [413] (Zhang "
        "et al. 2024, arXiv 2402.11592) uses random directions throughout.",
        f"Both train one small CNN at {' and at '.join(map(str, QUERIES))} queries an update, the one at theta "
        "included: coordinates drawn anew at every update, equal shares of every tensor; Rademacher directions, "
        "one-sided. Of the squared gradient of d parameters, m coordinates should explain m / d and m normal "
        "directions m / (m + d + 1), on average.",
    ],
    settings={
        **{name(q): words for q in QUERIES for name, words in (
            (directions, ["algo=zeroth_order", "algo.mode=forward", f"algo.directions={q - 1}"]),
            (coordinates, ["algo=deepzero", f"algo.budget={q}", "algo.shares=uniform"]))},
        "backprop": ["algo=backprop"],
    },
    common=[*NET, "data=digits", "trainer.max_epochs=5", "data.batch_size=64", "schedule=cosine", "optimizer=adam",
            "probe=alignment", "probe.alignment.every=10"],
    rates=("3e-3", "1e-2", "3e-2", "1e-1", "3e-1"),
    columns={"gradient explained": lambda s: f"{100 * explained(s):.1f} %",
             "queries": lambda s: f"{s.mean('cost/queries'):.0f}", "FLOPs": lambda s: f"{flops(s):.2e}"},
    verdict=coordinates_verdict,
    findings=coordinates_findings,
    limits="A net of a few hundred parameters and a hundred updates: a good share of the coordinates can be asked "
           "here. It says nothing against random directions where parameters are millions and queries two, the "
           "setting of [413]. Masks chosen by a pruning score, which DeepZero adds, are `algo.shares=zo_grasp`.",
)


# ---------------------------------------------------------------------- are local guesses enough

GUESS = ("algo=local_guess", "algo.auxiliary=cnn", "algo.width=16")
BLOCKS = tuple(f"block{i}" for i in range(5))
LOCAL, CHANCE, EXACT = "local guesses", "random activities", "backprop"
FREE = ("networks as drawn", "networks drawn anew")


def closed(settings: Settings) -> tuple[float, float | None, float | None]:
    """Share of the gap between random directions and backprop that local guesses close: mean, ends of the interval."""
    mine, chance, exact = (settings[name].by_seed("test/accuracy") for name in (LOCAL, CHANCE, EXACT))
    found = estimate([(mine[s] - chance[s]) / (exact[s] - chance[s]) for s in mine])
    return found.mean, found.low, found.high


def guesses_verdict(settings: Settings) -> str:
    above, below = better(settings[LOCAL], settings[CHANCE]), better(settings[EXACT], settings[LOCAL])
    first = {1: "Local guesses are better than random directions", 0: "Local guesses are not shown to be better than "
             "random directions", -1: "Local guesses are worse than random directions"}[above]
    share, low, high = closed(settings)
    gap = f"they close {100 * share:.0f} % of the gap to backprop"
    gap += "" if low is None else f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    last = "not enough: backprop stays better" if below > 0 else "enough here: backprop is not shown to be better"
    return f"{first}, and {last}; {gap}."


def guesses_findings(settings: Settings) -> list[str]:
    rows = [are(LOCAL, settings, CHANCE), are(LOCAL, settings, EXACT),
            are(CHANCE, settings, "frozen blocks")]
    free = "; ".join(are(LOCAL, settings, name) for name in FREE)
    guessed = {name: mean(cosines(settings[name], BLOCKS[:-1])) for name in (LOCAL, *FREE, CHANCE, "random weights")}
    order = ", ".join(f"{name} {value:.3f}" for name, value in sorted(guessed.items(), key=lambda item: -item[1]))
    price = [flops(settings[name]) / flops(settings[EXACT]) for name in (LOCAL, CHANCE)]
    return ["; ".join(rows) + ".",
            f"What a trained auxiliary network adds to the guess: {free}. What the slope of the loss adds to the local "
            f"loss: {are(LOCAL, settings, 'local losses alone')}.",
            f"Mean cosine with the exact gradient over the four blocks that have to guess: {order}.",
            f"The price: an update by local guesses takes {price[0]:.1f} times the FLOPs of backprop's, one by random "
            f"activities {price[1]:.1f} times. Neither passes a derivative from one block to another."]


GUESSES = Dispute(
    page="local_guesses.md",
    title="Are local guesses enough?",
    claims=[
        "Baydin et al. [37] (2022, arXiv 2202.08587) train by the slope along one random direction, and see "
        "\"gradients without backpropagation\". Fournier et al. [32] (2023, arXiv 2306.06968) find that random "
        "directions fail on larger nets, and guess along the gradient of a block's own auxiliary loss instead.",
        "All train one CNN of five blocks. *Local guesses*: the slope of the loss along the gradient of an auxiliary "
        "network's loss; *networks as drawn* and *drawn anew*: the same with auxiliary networks that are not trained; "
        "*random activities*: a random direction for every sample at the block's output; *random weights*: one random "
        "direction of all weights; *local losses alone*: the auxiliary gradient itself, the loss is not asked. In the "
        "guesses by block the last block and the readout have their exact gradient. *Frozen blocks*: the readout alone "
        "learns.",
    ],
    settings={
        LOCAL: list(GUESS),
        FREE[0]: [*GUESS, "algo.guess=fixed_ntk"],
        FREE[1]: [*GUESS, "algo.guess=ntk"],
        CHANCE: ["algo=local_guess", "algo.guess=random"],
        "random weights": ["algo=forward_gradient"],
        "local losses alone": [*GUESS, "algo.target=local"],
        "frozen blocks": ["algo=frozen_trunk"],
        EXACT: ["algo=backprop"],
    },
    common=["model=cnn", "model.channels=[8,8,8,8,8]", "model.pooling=[none,none,none,max,max]", "model.norm=group",
            "model.readout=flatten", "data=digits", "trainer.max_epochs=5", "data.batch_size=64", "schedule=cosine",
            "optimizer=momentum", "probe=alignment", "probe.alignment.every=20"],
    rates=("3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1"),
    columns={"cosine, block by block": lambda s: " / ".join(f"{c:.2f}" for c in cosines(s, BLOCKS)) or "no update",
             "FLOPs": lambda s: f"{flops(s):.2e}"},
    verdict=guesses_verdict,
    findings=guesses_findings,
    limits="A small net, five epochs of 8 x 8 digits: four blocks guess 512 numbers a sample each at most. Guessing at "
           "random grows worse with that number, guessing along a local gradient need not; what ResNet-8 gives on "
           "CIFAR-10 is among the [experiments](experiments.md).",
)

DISPUTES = {"coordinates": COORDINATES, "guesses": GUESSES}


# ---------------------------------------------------------------------- runs


def ask(dispute: Dispute, seeds: Sequence[int]) -> Settings:
    """Every setting at the rate that is best on validation for the first seed, and all seeds there.

    Raises:
        SystemExit: a run that did not finish, or no rate at which a setting does.
    """
    fixed = [*dispute.common, "sweep.view=none"]
    grid = [(name, rate) for name in dispute.settings for rate in dispute.rates]
    runs = dict(zip(grid, run_jobs([words(dispute, *cell, seeds[0]) for cell in grid], fixed,
                                   name=f"{dispute.title} rates"), strict=True))
    best = {name: chosen(name, {rate: runs[name, rate] for rate in dispute.rates}) for name in dispute.settings}
    cells = [(name, seed) for name in best for seed in seeds[1:]]
    more = run_jobs([words(dispute, name, best[name], seed) for name, seed in cells], fixed,
                    name=f"{dispute.title} seeds") if cells else []
    found = {name: {seeds[0]: measured(runs[name, rate])} for name, rate in best.items()}
    for (name, seed), result in zip(cells, more, strict=True):
        if result.status != FINISHED:
            sys.exit(f"error: {name}, seed={seed} ended {result.status}: {result.reason}")
        found[name][seed] = measured(result)
    return {name: Setting(rate, {rate: found[name]}) for name, rate in best.items()}


def words(dispute: Dispute, name: str, rate: str, seed: int) -> list[str]:
    return [*dispute.settings[name], f"optimizer.lr={rate}", f"seed={seed}"]


def chosen(name: str, by_rate: Mapping[str, JobResult]) -> str:
    """The rate of the best validation accuracy; one that diverges is out."""
    for rate, run in by_rate.items():
        if run.status != FINISHED and not run.diverged:
            sys.exit(f"error: {name}, optimizer.lr={rate} ended {run.status}: {run.reason}")
    finished = [rate for rate, run in by_rate.items() if run.status == FINISHED]
    if not finished:
        sys.exit(f"error: {name} diverges at every rate")
    return max(finished, key=lambda rate: by_rate[rate].value)


def measured(result: JobResult) -> dict[str, float]:
    """A run's figures, and means over its course of the cosines that were measured."""
    return {**result.metrics, **dict(over_updates(history.series(Path(result.directory) / history.METRICS_FILE)))}


def over_updates(series: Mapping[str, Mapping[int, float]]) -> Iterator[tuple[str, float]]:
    for key, points in series.items():
        if key.startswith("align/") and key.endswith("/cosine"):
            unit = key.split("/")[1]
            yield f"{COSINE}/{unit}", mean(points.values())
            yield f"mean squared cosine/{unit}", mean(v * v for v in points.values())


# ---------------------------------------------------------------------- pages


def page(key: str, settings: Settings, seeds: Sequence[int], command: str) -> str:
    """The dispute, its verdict, and the runs."""
    dispute = DISPUTES[key]
    reference = next(iter(settings))
    head = ["", "lr", "test accuracy, %", f"difference to {reference}", *dispute.columns]
    rows = [[name, edge(s.rate, dispute.rates), accuracy(s),
             "" if name == reference else shown_difference(s, settings[reference]),
             *(figure(s) for figure in dispute.columns.values())] for name, s in settings.items()]
    how = (f"{', '.join(dispute.common)}; seeds {', '.join(map(str, seeds))}; learning rate by validation accuracy of "
           f"the first seed among {', '.join(dispute.rates)}, a star marks an end of that list; mean ± 95 % interval, "
           "differences seed by seed. FLOPs of one update.")
    return "\n".join([
        f"# {dispute.title}", "", f"Written by `{command}`.", "",
        *[line for text in dispute.claims for line in [*prose(text), ""]],
        "## Verdict", "", *prose(f"**{dispute.verdict(settings)}**"), "",
        *[line for text in dispute.findings(settings) for line in [*prose(text[0].upper() + text[1:]), ""]],
        "## Runs", "", *prose(how), "",
        f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows), "",
        "## What it does not say", "", *prose(dispute.limits), ""])


def edge(rate: str, rates: Sequence[str]) -> str:
    return f"{rate}*" if rate in (rates[0], rates[-1]) else rate


def prose(text: str) -> list[str]:
    return textwrap.wrap(text, WIDE, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dispute", choices=[*DISPUTES])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page (default: docs/)")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    settings = ask(DISPUTES[options.dispute], seeds)
    given = "" if options.seeds == parser.get_default("seeds") else f" --seeds {options.seeds}"
    text = page(options.dispute, settings, seeds, f"python scripts/disputes.py {options.dispute}{given}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / DISPUTES[options.dispute].page
    path.write_text(text, encoding="utf-8")
    print(text)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
