"""Questions about forward-only rules, each answered by one command from runs made for it.

    python scripts/questions.py                               # all of them, on small data: ten minutes
    python scripts/questions.py collaboration                 # or: sparsity, hybrid, heads, memory
    python scripts/questions.py hybrid --data mnist --epochs 5 --seeds 0,1,2
    python scripts/questions.py --markdown docs/questions.md  # with questions named: their sections alone

Every setting gets the same learning rates, epochs and seeds; the rate with the best mean validation accuracy is
shown, and its test accuracy is compared with the reference's, seed by seed. Runs are cells of a tracked sweep: asked
again, they are read from the store.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import exchange

from onward.compare.statistics import estimate, paired
from onward.launch import run_jobs
from onward.launch.job import FINISHED, JobResult

RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
ACCURACY = "test/accuracy"
MEMORY = "How much memory does each really save?"
WIDTHS = "model.widths=[200,200,200]"


@dataclass(frozen=True)
class Setting:
    """What ran under a name: one metrics dictionary per seed, at the rate that validation chose, and at all rates."""

    rate: str
    by_rate: Mapping[str, Mapping[int, Mapping[str, float]]]

    @property
    def metrics(self) -> Mapping[int, Mapping[str, float]]:
        return self.by_rate[self.rate]

    def mean(self, key: str) -> float:
        return estimate([m[key] for m in self.metrics.values()]).mean

    def by_seed(self, key: str) -> dict[int, float]:
        return {seed: m[key] for seed, m in self.metrics.items()}


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Question:
    """A question, the settings that answer it, and how.

    Attributes:
        settings: overrides by name; the first is what the others are compared with.
        columns: title and figure of a setting; beside accuracy and difference, which every question has.
        answer: sentences from the settings as they ran.
    """

    text: str
    settings: Mapping[str, Sequence[str]]
    answer: Callable[[Settings], str]
    columns: Mapping[str, Callable[[Setting], str]]
    common: Sequence[str] = ()
    data: str = "digits"
    epochs: int = 10


# ---------------------------------------------------------------------- figures


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def accuracy(setting: Setting) -> str:
    found = estimate(list(setting.by_seed(ACCURACY).values()))
    return percent(found.mean) if found.low is None else f"{percent(found.mean)} ± {percent(found.mean - found.low)}"


def difference(setting: Setting, reference: Setting) -> tuple[float, float | None, float | None]:
    """Mean of the differences in points, and the ends of its 95 % interval."""
    found = paired(setting.by_seed(ACCURACY), reference.by_seed(ACCURACY)).difference
    return 100 * found.mean, *(None if end is None else 100 * end for end in (found.low, found.high))


def shown_difference(setting: Setting, reference: Setting) -> str:
    mean, low, high = difference(setting, reference)
    return f"{mean:+.2f}" if low is None else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def compared(name: str, settings: Settings, reference: str) -> str:
    """Whether one setting is more accurate than another, in words."""
    mean, low, high = difference(settings[name], settings[reference])
    interval = "one seed" if low is None else f"95 % interval {low:+.2f} to {high:+.2f}"
    if low is None or low <= 0 <= high:
        return f"{name} against {reference}: no difference shown ({mean:+.2f} points, {interval})"
    return f"{name} is {'better' if mean > 0 else 'worse'} than {reference} ({mean:+.2f} points, {interval})"


def by_block(key: str) -> Callable[[Setting], str]:
    """A figure of every block; ``{}`` in the key is the block's number."""
    def cells(setting: Setting) -> str:
        first = next(iter(setting.metrics.values()))
        blocks = [i for i in range(64) if key.format(i) in first]
        return " / ".join(percent(setting.mean(key.format(i))) for i in blocks)
    return cells


def marginal(setting: Setting) -> str:
    """What each block adds to the accuracy of the blocks before it, in points."""
    first = next(iter(setting.metrics.values()))
    reached = [setting.mean(f"{ACCURACY}/up_to_block{i}") for i in range(64) if f"{ACCURACY}/up_to_block{i}" in first]
    return " / ".join(f"{100 * (b - a):+.2f}" for a, b in zip(reached, reached[1:], strict=False))


def sparsity(setting: Setting, rate: str) -> float:
    """Mean over blocks and seeds."""
    found = [value for metrics in setting.by_rate[rate].values() for key, value in metrics.items()
             if key.startswith("ensembles/") and key.endswith("/sparsity")]
    return sum(found) / len(found)


# ---------------------------------------------------------------------- answers


def answer_collaboration(settings: Settings) -> str:
    said = [compared(name, settings, "none") for name in ("earlier blocks", "all other blocks")]
    parts = [f"{name}: by block {by_block(ACCURACY + '/block{}')(s)}, each block after the first adds {marginal(s)}"
             for name, s in settings.items()]
    return "; ".join(said) + ". Alone and together: " + "; ".join(parts) + "."


def answer_sparsity(settings: Settings) -> str:
    rates = [rate for rate in RATES if all(rate in s.by_rate for s in settings.values())]
    found = {rate: [sparsity(s, rate) for s in settings.values()] for rate in rates}
    sparser = [rate for rate, (rule, _, neither) in found.items() if rule > neither]
    objective = [rate for rate in sparser if 2 * found[rate][1] >= found[rate][0] + found[rate][2]]
    said = "; ".join(f"{rate}: {' / '.join(f'{value:.2f}' for value in values)}" for rate, values in found.items())
    return (f"Hoyer sparsity ({' / '.join(settings)}), mean over blocks, by learning rate: {said}. Forward-Forward is "
            f"sparser than backprop on cross-entropy at {len(sparser)} of {len(rates)} rates; at {len(objective)} of "
            "those the objective alone makes at least half of the difference.")


def answer_hybrid(settings: Settings) -> str:
    return "; ".join([compared("hybrid blocks", settings, "backprop"),
                      compared("hybrid blocks", settings, "backprop, same heads"),
                      compared("every layer alone", settings, "hybrid blocks")]) + "."


def answer_heads(settings: Settings) -> str:
    return ("Mono-Forward's update is that of deep supervision whose heads' gradients stop at their own block: they "
            "are equal to rounding (tests/oracle/test_mono_forward.py). What stopping costs: "
            + "; ".join([compared("Mono-Forward", settings, "deep supervision"),
                         compared("Mono-Forward", settings, "backprop"),
                         compared("Mono-Forward", settings, "random blocks")]) + ".")


QUESTIONS = {
    "collaboration": Question(
        "Does layer collaboration help Forward-Forward, and where?",
        {"none": ["algo.gamma=none"], "earlier blocks": ["algo.gamma=earlier"],
         "all other blocks": ["algo.gamma=others"]},
        answer_collaboration, {"by block": by_block(ACCURACY + "/block{}"), "each block adds": marginal},
        ["algo=ff_layer_collaboration", "algo.readout=layers", "model=mlp", WIDTHS]),
    "sparsity": Question(
        "Is the sparsity of Forward-Forward due to its objective or to its rule?",
        {"Forward-Forward": ["algo=forward_forward"], "backprop on goodness": ["algo=backprop_on_goodness"],
         "backprop on cross-entropy": ["algo=backprop"]},
        answer_sparsity, {"Hoyer sparsity by block, %": by_block("ensembles/{}/sparsity"),
                          "a class's ensemble, % of units": by_block("ensembles/{}/size")},
        ["probe=ensembles", "probe.ensembles.every=20", "model=mlp", WIDTHS], epochs=20),
    "hybrid": Question(
        "Does block-hybrid Scalable Forward-Forward beat backprop, also when backprop has the same heads?",
        {"backprop": ["algo=backprop"], "hybrid blocks": ["algo=scalable_forward_forward"],
         "every layer alone": ["algo=scalable_forward_forward", "model.granularity=layer"],
         "backprop, same heads": ["algo=deep_supervision", "algo.goodness=auxiliary"]},
        answer_hybrid, {}, ["model=resnet", "schedule=cosine"]),
    "heads": Question(
        "Is Mono-Forward more than deep supervision with stopped gradients?",
        {"backprop": ["algo=backprop"], "Mono-Forward": ["algo=mono_forward"],
         "deep supervision": ["algo=deep_supervision"],
         "random blocks": ["algo=frozen_trunk", "algo.features=all"]},
        answer_heads, {}, ["model=mlp", WIDTHS], data="mnist1d", epochs=20),
}


# ---------------------------------------------------------------------- runs


def ask(question: Question, fixed: Sequence[str], seeds: Sequence[int]) -> Settings:
    """Every setting at every rate and seed; the rate that is best on validation.

    Raises:
        SystemExit: a run that did not finish: an answer from what is left would not be one.
    """
    cells = [(name, rate, seed) for name in question.settings for rate in RATES for seed in seeds]
    results = run_jobs([[*question.settings[name], f"optimizer.lr={rate}", f"seed={seed}"]
                        for name, rate, seed in cells], [*question.common, *fixed])
    for (name, rate, seed), result in zip(cells, results, strict=True):
        if result.status != FINISHED and not result.diverged:
            sys.exit(f"error: {name}, optimizer.lr={rate}, seed={seed} ended {result.status}: {result.reason}")
    of: dict[str, dict[str, dict[int, JobResult]]] = {}
    for (name, rate, seed), result in zip(cells, results, strict=True):
        of.setdefault(name, {}).setdefault(rate, {})[seed] = result
    return {name: chosen(rates) for name, rates in of.items()}


def chosen(rates: Mapping[str, Mapping[int, JobResult]]) -> Setting:
    whole = {rate: runs for rate, runs in rates.items() if all(run.status == FINISHED for run in runs.values())}
    best = max(whole, key=lambda rate: estimate([run.value for run in whole[rate].values()]).mean)
    return Setting(best, {rate: {seed: run.metrics for seed, run in runs.items()} for rate, runs in whole.items()})


def report(key: str, data: str | None, epochs: int | None, seeds: Sequence[int]) -> list[str]:
    question = QUESTIONS[key]
    data, epochs = data or question.data, epochs or question.epochs
    settings = ask(question, [f"data={data}", f"trainer.max_epochs={epochs}"], seeds)
    reference = next(iter(question.settings))
    head = ["", "lr", "test accuracy, %", f"difference to {reference}", *question.columns]
    rows = [[name, s.rate, accuracy(s), "" if name == reference else shown_difference(s, settings[reference]),
             *(figure(s) for figure in question.columns.values())] for name, s in settings.items()]
    return [f"`python scripts/questions.py {key}`: data={data}, {epochs} epochs, seeds "
            f"{', '.join(map(str, seeds))}, learning rate by validation among {', '.join(RATES)}; mean ± 95 % "
            "interval.", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}",
            *(f"| {' | '.join(row)} |" for row in rows), "", question.answer(settings)]


def memory_report() -> list[str]:
    """Peak bytes of a step as it is metered, at two depths."""
    rules = ("backprop", "forward_forward", "ff_layer_collaboration", "mono_forward", "scalable_forward_forward",
             "counter_current", "pepita", "pepita algo.update=time_local", "noprop_ct", "deep_supervision")
    depths = (4, 16)
    results = run_jobs([[*f"algo={rule}".split(), f"model.widths=[{','.join(['256'] * depth)}]"] for rule in rules
                        for depth in depths],
                       ["data.batch_size=512", "trainer.max_steps=3", "trainer.max_epochs=1", "optimizer=sgd",
                        "optimizer.lr=1e-4", "probe=cost"])
    peaks = iter(result.metrics.get("cost/peak_bytes") for result in results)
    rows = [(rule, [next(peaks) for _ in depths]) for rule in rules]
    base = dict(rows)["backprop"]
    lines = ["`python scripts/questions.py memory`: peak live bytes of one update, MLP of width 256, batch 512, SGD, "
             "beside the weights.", "",
             "| rule | 4 blocks | backprop / rule | 16 blocks | backprop / rule | 16 over 4 |",
             "|---|---|---|---|---|---|"]
    for rule, found in rows:
        if None in found:
            lines.append(f"| {rule} | not on this net | | | | |")
            continue
        cells = [f"{mine:,.0f} | {other / mine:.2f}" for mine, other in zip(found, base, strict=True)]
        lines.append(f"| {rule} | {' | '.join(cells)} | {found[1] / found[0]:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, "memory", []], help="default: all")
    parser.add_argument("--data", help="default: the question's own")
    parser.add_argument("--epochs", type=int, help="of every run (default: the question's own)")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--markdown", type=Path, help="write the answers into a page; others there are kept")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for key in args.questions or [*QUESTIONS, "memory"]:
        title = MEMORY if key == "memory" else QUESTIONS[key].text
        body = "\n".join(memory_report() if key == "memory" else report(key, args.data, args.epochs, seeds))
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.markdown:
            exchange(args.markdown, "# Questions about forward-only rules", {title: body})


if __name__ == "__main__":
    main()
