"""Write docs/ from what is on disk: a page per rule, an index to choose from, models, data, hardware.

    python scripts/docs.py           # write
    python scripts/docs.py --check   # exit 1 and name the pages that are stale

Everything stated is measured or read here: the audit runs, one update is metered, every model and data
layout is tried, and reported and obtained figures come from conf/experiment/. Pages depend on the checkout
and the pinned packages alone; no time or path of this machine is in them. docs/benchmark.md, which has
times, is written by scripts/benchmark.py and kept, and docs/scaling_laws.md by scripts/scaling_laws.py.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import inspect
import json
import logging
import pkgutil
import statistics
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf

import onward.hardware
from onward.algo import base
from onward.catalogue import config_dir, header, options, summary
from onward.compare.recorded import difference, figures, in_words, twins
from onward.compare.records import less_is_better
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes, step_cost
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Unsupported
from onward.hardware import formats
from onward.model.mlp import mlp
from onward.samples import FAMILIES, composed, family, model, optimizer, rule

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "one update of an MLP 64-128-128-128-10 at batch 64, with the rule's own optimizer"
KEPT = {"alignment.md", "benchmark.md", "benchmark_sweep.md", "compare.md", "continual.md",
        "coordinates_or_directions.md", "federated.md", "hardware_bits.md", "hardware_matrix.md", "hardware_noise.md",
        "local_guesses.md", "questions.md", "scaling_laws.md", "server.md", "sweeps.md"}
#: pages that scripts/hardware.py has written, or will
CURVES = {"hardware_noise.md": "accuracy against noise", "hardware_bits.md": "accuracy against bits"}
KEPT_FOLDER = "comparison/"  # an example that scripts/compare.py wrote
NOT_RUN = "not run yet"

LOCALITY = {
    "block": "an update depends on its own block and those before it",
    "broadcast": "an update depends also on the output error, which comes through no other block's weights",
    "global": "an update depends also on blocks after its own",
}


@lru_cache
def reference_engine(name: str, depth: int = 3, width: int = 128) -> tuple[Engine, Batch]:
    """The rule on the net its cost card is measured on."""
    spec = DataSpec("digits", "image", (1, 8, 8), Classification(10), 1, 1, 1, (0.0, 1.0))
    learner = rule(name)
    torch.manual_seed(0)
    net = mlp(learner.input_spec(spec), [width] * depth)
    stack = learner.setup(net, spec)
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(64, 1, 8, 8, generator=g), torch.randint(0, 10, (64,), generator=g), total=64)
    engine = Engine(learner, stack, spec, optimizer(name), total_steps=10)
    settle(engine, batch)
    return engine, batch


def settle(engine: Engine, batch: Batch) -> None:
    """Have the rule choose in float64 what it chooses once, so that no page hangs on a processor's rounding."""
    if not engine.rule.chosen_once:
        return
    exact = copy.deepcopy(engine)
    exact.model.double()
    exact.rule.double()
    exact.train_step(replace(batch, x=batch.x.double()))
    chosen, buffers = dict(exact.rule.named_buffers()), dict(engine.rule.named_buffers())
    for name in engine.rule.chosen_once:
        buffers[name].copy_(chosen[name])


@contextmanager
def collected() -> Iterator[None]:
    """No garbage is collected inside, so that what lives there does not depend on when."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@lru_cache
def cost(name: str) -> dict[str, float]:
    with collected():
        return step_cost(*reference_engine(name))


def peak(name: str, depth: int) -> int:
    """Peak live bytes of a second update at some depth, width 64, SGD (no optimizer temporaries)."""
    engine, batch = reference_engine(name, depth, 64)
    engine = Engine(engine.rule, engine.model, engine.spec, lambda p: torch.optim.SGD(p, lr=1e-3), total_steps=10)
    engine.train_step(batch)
    with collected(), LiveBytes() as live:
        engine.train_step(batch)
    return live.peak


@lru_cache
def growth(name: str) -> float:
    """Peak memory of 8 blocks over that of 4."""
    return peak(name, 8) / peak(name, 4)


def growth_text(name: str) -> str:
    return "constant" if growth(name) == 1 else f"× {growth(name):.2f}"


def runs_on(name: str) -> list[list[str]]:
    """A row per model, a cell per data layout: yes, empty where the model reads no such data, or a footnote."""
    rows, reasons = [], []
    for model_name in options("model"):
        row = [model_name]
        for family_name in FAMILIES:
            spec, _ = family(family_name)
            learner = rule(name)
            try:
                reason = learner.supports(model(model_name, learner.input_spec(spec)), spec, None)
            except (Unsupported, ConfigError) as e:
                reason = str(e)
            if reason is None:
                row.append("yes")
            elif reads(model_name, family_name) is False:
                row.append("")
            else:
                reason = reason.replace(f"data={family_name}", "this data")
                if reason not in reasons:
                    reasons.append(reason)
                row.append(f"no [{reasons.index(reason) + 1}]")
        rows.append(row)
    return rows + [[f"[{i + 1}] {r}"] for i, r in enumerate(reasons)]


@lru_cache
def reads(model_name: str, family_name: str) -> bool:
    """Whether the model reads this layout at all, whatever the rule."""
    try:
        model(model_name, family(family_name)[0])
    except (Unsupported, ConfigError):
        return False
    return True


def choices(node: dict) -> dict[str, str]:
    """The groups that a config's defaults list chooses."""
    entries = [entry for entry in node.get("defaults", []) if isinstance(entry, dict)]
    return {key.removeprefix("override ").strip().lstrip("/"): option for entry in entries
            for key, option in entry.items()}


@lru_cache
def experiments() -> list[dict]:
    """Replications on disk: what the source reports beside what was obtained here."""
    standard = choices(yaml.safe_load((config_dir() / "train.yaml").read_text(encoding="utf-8")))
    found = []
    for name in options("experiment"):
        path = config_dir() / "experiment" / f"{name}.yaml"
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        chosen = standard | choices(node)
        found.append({"name": name, "title": summary(path), **{k: chosen[k] for k in ("algo", "model", "data")},
                      "reported": node.get("reported") or {}, "obtained": node.get("obtained") or {}})
    return found


def figure(entry: dict, nothing: str) -> str:
    """A reported or obtained figure as one cell."""
    seeds, failed = entry.get("seeds", []), len(entry.get("failed_seeds", []))
    note = f" ({counted(len(seeds))}{f', {failed} failed' if failed else ''})" if seeds else ""
    return f"{entry['figure']}{note}" if entry else nothing


def counted(seeds: int) -> str:
    return f"{seeds} seed{'s' if seeds > 1 else ''}"


def beside(entry: dict) -> list[str]:
    """Reported and obtained, two cells."""
    return [figure(entry["reported"], "none"), figure(entry["obtained"], NOT_RUN)]


def prose(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, 110, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(r)} |" for r in rows)]


def plain(value):
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def axes(name: str) -> list[list[str]]:
    """The rule's own keys, defaults and the comment beside them in its YAML."""
    text = (config_dir() / "algo" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    notes = {line.split(":")[0].strip(): line.split("#", 1)[1].strip()
             for line in text if line.startswith("  ") and ":" in line and "#" in line}
    return [[f"`algo.{k}`", f"`{json.dumps(plain(v))}`", notes.get(k, "").replace("|", "\\|")]
            for k, v in composed(f"algo={name}").algo.items() if not k.startswith("_")]


def ratio(name: str, key: str) -> str:
    base = cost("backprop")[key]
    return f"{cost(name)[key] / base:.2f}" if base else "-"


def tier(learner: base.Rule) -> str:
    """The tier's name and what it promises."""
    cls = getattr(base, type(learner).tier, None)
    promise = inspect.getdoc(cls).partition("\n")[0] if cls else "The rule drives every unit itself."
    return f"{type(learner).tier}: {promise}"


def audit_lines(name: str) -> tuple[str, list[str]]:
    """What the audit calls the rule, and its two matrices side by side."""
    found = audit(*reference_engine(name))
    free, held = found["free"].tolist(), found["held"].tolist()
    wide = 2 * len(free) + 2
    lines = [f"{'':11}{'as it is':{wide + 4}}error held fixed".rstrip()]
    for i, (row, fixed) in enumerate(zip(free, held, strict=True)):
        unit = f"block {i}" if i + 1 < len(free) else "readout"
        marks = [" ".join("X" if x else "." for x in cells) for cells in (row, fixed)]
        lines.append(f"{unit:11}{marks[0]:{wide + 4}}{marks[1]}")
    return classify(**found), lines


def cost_rows(name: str) -> list[list[str]]:
    """A row per meter: this rule, backprop, the ratio."""
    mine, other = cost(name), cost("backprop")
    meters = {"flops": "FLOPs of matrix products", "peak_bytes": "peak live bytes",
              "saved_bytes": "bytes kept by autograd"}
    rows = [[text, f"{mine[k]:,.0f}", f"{other[k]:,.0f}", ratio(name, k)] for k, text in meters.items()]
    counts = {"forward_passes": "executions per unit", "jvp_passes": "executions in forward mode",
              "queries": "queries of the loss"}
    rows += [[text, f"{mine[k]:.1f}".removesuffix(".0"), f"{other[k]:.1f}".removesuffix(".0"), ""]
             for k, text in counts.items()]
    return [*rows, ["peak live bytes, 8 blocks over 4", growth_text(name), growth_text("backprop"), ""]]


def published_lines(name: str) -> list[str]:
    """The source's figures in words, then every experiment with this rule."""
    info = rule(name).info
    lines = [*prose(f"Published: {info.reported}."), ""] if info.reported else []
    mine = [e for e in experiments() if e["algo"] == name]
    if mine:
        lines += [*table(["experiment", "model", "data", "reported", "obtained here"], [
            [f"[{e['name']}](../experiments.md#{e['name']})", e["model"], e["data"], *beside(e)] for e in mine]), ""]
    return lines or ["No figure is published for this form, and no experiment is on disk.", ""]


def rule_page(name: str) -> str:
    learner = rule(name)
    info = learner.info
    source = f"src/{type(learner).__module__.replace('.', '/')}.py"
    cfg = composed(f"algo={name}")
    audited, matrices = audit_lines(name)
    rows = runs_on(name)
    return "\n".join([
        f"# {info.title}", "",
        summary(config_dir() / "algo" / f"{name}.yaml") + ".", "",
        *prose(f"Source: {info.authors} ({info.year}), <{info.url}>. Code: [`{source}`](../../{source})."), "",
        "```bash", header(config_dir() / "algo" / f"{name}.yaml")[1], "```", "",
        "```math", info.equation.replace(", \\quad ", ",\n\\quad "), "```", "",
        *prose(f"**Where it differs from its source.** {info.differs}"), "",
        "## What it is", "",
        *table(["", ""], [["tier", tier(learner)],
                          ["locality, declared", f"{info.locality}: {LOCALITY[info.locality]}"],
                          ["locality, audited", audited], ["passes per update", info.passes],
                          *([["control", "yes: not a proposal, something to compare with"]] if info.control else [])]),
        "",
        *prose("The audit perturbs one unit (row) and marks the units whose update changes (column, in the same "
               "order): as it is, and with the output error held fixed."), "",
        "```text", *matrices, "```", "",
        "## What it costs", "",
        *prose(f"Measured: {REFERENCE}; for the last row width 64 and SGD. An execution counts once whatever its "
               "batch."), "",
        *table(["", "this rule", "backprop", "ratio"], cost_rows(name)), "",
        "## Axes", "",
        *([*table(["key", "default", ""], axes(name)), ""] if axes(name) else ["None of its own.", ""]),
        f"Optimizer: `{cfg.optimizer._target_}`, learning rate `{cfg.optimizer.lr}`.", "",
        "## Where it runs", "",
        *table(["model", *FAMILIES], [r for r in rows if len(r) > 1]), "",
        *[line for r in rows if len(r) == 1 for line in (*prose(r[0]), "")],
        "An empty cell: the model does not read such data, whatever the rule.", "",
        "## Published and obtained", "", *published_lines(name)])


def index_page() -> str:
    rules = {n: rule(n).info for n in options("algo")}
    proposals = [n for n, info in rules.items() if not info.control]

    def links(names) -> str:
        return ", ".join(f"[{n}](rules/{n}.md)" for n in names) or "none"

    needs = {
        "Memory must not grow with depth": (n for n in proposals if growth(n) == 1),
        "No autograd: updates in closed form (dense nets)": (n for n in proposals if not cost(n)["saved_bytes"]),
        "No signal may come from later blocks": (n for n in proposals if rules[n].locality == "block"),
        "Only the output error may be broadcast": (n for n in proposals if rules[n].locality == "broadcast"),
        "No reverse mode: forward passes alone": (n for n in proposals if rule(n).tier == "Perturbation"),
        "Only the loss can be measured": (n for n in proposals if rule(n).tier == "Perturbation"
                                          and not cost(n)["jvp_passes"]),
        "Controls to compare with": (n for n, info in rules.items() if info.control),
    }
    mnist = {n: ["<br>".join(cells) for cells in zip(*found, strict=True)] for n in rules
             if (found := [beside(e) for e in experiments() if e["algo"] == n and e["data"] == "mnist"])}
    rows = [[f"[{n}](rules/{n}.md)", info.title + (" (control)" if info.control else ""), info.locality, info.passes,
             ratio(n, "flops"), ratio(n, "peak_bytes"), growth_text(n), *mnist.get(n, ["", ""])]
            for n, info in rules.items()]
    return "\n".join([
        "# Choose a learning rule", "",
        *prose("Every line is measured or audited by `python scripts/docs.py`; each rule's page says how."), "",
        "## By what you need", "",
        *[line for need, names in needs.items() for line in prose(f"- **{need}**: {links(names)}", "  ")], "",
        "## All rules", "",
        *prose(f"FLOPs and peak bytes are ratios to backprop of {REFERENCE}. Depth: peak bytes of 8 blocks over "
               "those of 4. MNIST: test accuracy the source reports, and what its experiment gave here; sizes and "
               "epochs differ, [experiments](experiments.md) says how."), "",
        *table(["rule", "title", "locality", "passes per update", "FLOPs", "peak bytes", "depth", "MNIST reported",
                "MNIST obtained"], rows), "",
        "Locality is what a block's update depends on:", "", *[f"- **{k}**: {text}" for k, text in LOCALITY.items()],
        "", "See also: [models](models.md), [data](data.md), [hardware](hardware.md), "
        "[experiments](experiments.md), [comparisons](compare.md), [questions answered by runs](questions.md), "
        "[alignment of feedback](alignment.md), [tasks one after another](continual.md), [coordinates or random "
        "directions](coordinates_or_directions.md), [local guesses](local_guesses.md), [scaling "
        "laws](scaling_laws.md), [federated clients](federated.md), [sweeps and searches](sweeps.md), [a tracking "
        "server](server.md), [speed and memory](benchmark.md), [speed of sweeps](benchmark_sweep.md).", ""])


def group_page(title: str, group: str, text: str) -> str:
    lines = {n: header(config_dir() / group / f"{n}.yaml") for n in options(group)}
    rows = [[f"`{group}={n}`", first, f"`{second}`"] for n, (first, second, *_) in lines.items()]
    return "\n".join([title, "", *prose(text), "", *table(["choice", "", "command"], rows), ""])


def models_page() -> str:
    page = group_page("# Models", "model", "Sizes come from the data. A block is what a local rule may train alone.")
    rows = [[n, *("yes" if reads(n, f) else "" for f in FAMILIES)] for n in options("model")]
    schemes = group_page("## Fine-tuning schemes", "tuning", "What of a model exists as parameters and learns; "
                         "`pretrained=` gives it another run's weights first.")
    return "\n".join([page, "## Data they read", "", *table(["model", *FAMILIES], rows), "", schemes])


def hardware_page() -> str:
    for module in pkgutil.iter_modules(onward.hardware.__path__):
        importlib.import_module(f"onward.hardware.{module.name}")
    kinds = sorted(_formats(formats.NumberFormat), key=lambda cls: (cls.__module__ != formats.__name__, cls.__name__))
    rows = [[f"`{cls.__module__}.{cls.__name__}`",
             inspect.getdoc(cls).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|"),
             f"`{', '.join(inspect.signature(cls).parameters)}`"] for cls in kinds]
    return "\n".join([
        group_page("# Hardware", "hardware", "Real devices through Lightning, and emulated ones: a group each for "
                   "where a run happens, its number formats by tensor role, its noise, what it keeps for the backward "
                   "pass, and which weights take part. A setting that nothing in an update passes through is refused "
                   "before the run, unless `hardware.strict=false`. What each does to eight rules: [rules on emulated "
                   "hardware](hardware_matrix.md)" + "".join(f", [{title}]({page})" for page, title in CURVES.items()
                                                             if (ROOT / "docs" / page).is_file()) + "."),
        group_page("## Real devices", "hardware/runtime", "The part of a device that runs: `hardware.runtime`."),
        *(group_page(f"## {title}", f"hardware/{group}", line) for group, title, line in HARDWARE_GROUPS),
        "## Formats", "", "`hardware.numerics.<role>` is one of these, or null for exact.", "",
        *table(["format", "", "arguments"], rows), ""])


HARDWARE_GROUPS = (
    ("numerics", "Number formats", "The part that rounds, by tensor role: `hardware.numerics`."),
    ("noise", "Noise", "The part that is not exact: `hardware.noise`."),
    ("memory", "Memory", "What is kept for the backward pass, and how: `hardware.memory`."),
    ("sparsity", "Sparsity", "Which numbers take part in which pass: `hardware.sparsity`."),
    ("device", "Devices", "Where an operation is done: `hardware.device`."),
    ("cost", "Energy", "What operations would cost, in picojoules, for the metric `model/energy_j` and comparisons by "
                       "modelled joules: `hardware.cost`."),
)


def _formats(cls: type) -> list[type]:
    """Every public number format of the package."""
    below = [found for child in cls.__subclasses__() for found in _formats(child)]
    return [*([] if cls is formats.NumberFormat or not _public(cls) else [cls]), *below]


def _public(cls: type) -> bool:
    return cls.__module__.startswith("onward.") and not cls.__name__.startswith("_")


def data_page() -> str:
    from onward.data.files import FILES

    page = group_page("# Data", "data", "Three disjoint splits everywhere; nothing selects on test. Files are sought "
                      "in `data.root`, `ONWARD_DATA`, `/usr/share/datasets` and the user's cache, then downloaded "
                      "if `data.download=true`; hashes are of the decompressed content.")
    rows = [[f"{data}: {f.name}", f"<{f.address}>" + (f" has {f.replaced}" if f.replaced else ""), f"`{f.digest}`",
             f.terms]
            for data, files in FILES.items() for f in files.values()]
    methods = group_page("## Tasks one after another", "continual", "What is done against forgetting where "
                         "`data=split_*` or `permuted_*` give one task after another: [what runs "
                         "showed](continual.md).")
    files = ["## Published files", "", *table(["file", "address", "hash", "terms"], rows), ""]
    return page + "\n".join(["", methods, *files])


def experiment_lines(e: dict) -> list[str]:
    """One experiment in full."""
    made = e["obtained"]
    rows = [["rule", f"[{e['algo']}](rules/{e['algo']}.md)"], ["model, data", f"{e['model']}, {e['data']}"],
            ["reported", figure(e["reported"], "none")], ["its source", str(e["reported"].get("source", ""))],
            ["obtained", figure(made, NOT_RUN)]]
    if found := figures(made):
        metric, by_seed = found
        rows += [["every seed", ", ".join(f"{seed}: {a:.4f}" for seed, a in by_seed.items())],
                 ["seconds per seed", f"{made['seconds_per_seed']} on one CPU thread"],
                 ["made by", f"`{made['command']}` at `{made['commit']}`"]]
        rows += [[f"readout {k}", v] for k, v in made.get("other_readouts", {}).items()]
        curve = made.get("validation_curve_of_first_seed", {})
        if curve:
            rows += [[f"validation {metric} by epoch", ", ".join(f"{k}: {v:.4f}" for k, v in curve.items())]]
    return [f"### {e['name']}", "", f"{e['title']}.", "", "```bash", f"python train.py experiment={e['name']}", "```",
            "", *table(["", ""], rows), ""]


def obtained_mean(e: dict) -> tuple[str, float] | None:
    """The metric of an experiment and its mean over seeds; None if it was not run."""
    found = figures(e["obtained"])
    return None if found is None else (found[0], statistics.mean(found[1].values()))


def by_net_and_figure(e: dict) -> tuple:
    """Nets together, the best figure of each first, what was not run last."""
    found = obtained_mean(e)
    if found is None:
        return e["model"], True, 0.0, e["name"]
    metric, mean = found
    return e["model"], False, mean if less_is_better(metric) else -mean, e["name"]


def twin_rows(everything: list[dict]) -> list[list[str]]:
    """Experiments that name a twin, and how far they are from it."""
    of = {e["name"]: e for e in everything}
    rows = []
    for e in everything:
        for name in twins(e["reported"]):
            found = difference(e["obtained"], of[name]["obtained"])
            rows.append([e["data"], f"[{e['name']}](#{e['name']})", f"[{name}](#{name})",
                         in_words(found, figures(e["obtained"])[0]) if found else NOT_RUN])
    return sorted(rows, key=lambda row: (row[0], row[2], row[1]))


def experiments_page() -> str:
    everything = experiments()
    data = sorted({e["data"] for e in everything})
    made = {d: sum(e["data"] == d and bool(e["obtained"]) for e in everything) for d in data}
    tables = []
    for d in data:
        rows = [[e["model"], f"**{e['algo']}**" if rule(e["algo"]).info.control else e["algo"],
                 f"[{e['name']}](#{e['name']})", *beside(e)]
                for e in sorted((e for e in everything if e["data"] == d), key=by_net_and_figure)]
        tables += [f"## {d}", "", *table(["model", "rule", "experiment", "reported", "obtained"], rows), ""]
    return "\n".join(["# Experiments: reported and obtained", "", *prose(
        "`reported` is the source's figure, `obtained` what the command gave here: test accuracy (or what the data set "
        "is measured by) of the checkpoint that validation selected, mean and sample standard deviation over seeds, "
        "written into conf/experiment/ by `python scripts/reproduce.py`. Experiments are shorter or smaller than their "
        "sources where those take hours; the source's setting is named beside its figure. The settings were found "
        "with test figures in view and with unequal effort per rule: these runs show that a rule works, not which "
        "rule is better. **Bold** rules are controls. Rows of one net may differ in width, epochs and hardware, which "
        "the experiment says."), "",
        *prose(f"{sum(made.values())} of {len(everything)} were run: " + ", ".join(
            f"[{d}](#{d}) {made[d]} of {sum(e['data'] == d for e in everything)}" for d in data) + "."), "",
        *tables, "## Beside a twin", "", *prose(
            "The same net, data and budget under another rule, or without one thing: what was obtained minus what the "
            "twin got, paired by seed. Optimizer, learning rate and activation are each one's own."), "",
        *table(["data", "experiment", "twin", "difference"], twin_rows(everything)), "",
        "## Every experiment", "", *[line for e in everything for line in experiment_lines(e)]])


def pages() -> dict[str, str]:
    torch.set_num_threads(1)
    out = {f"rules/{n}.md": rule_page(n) for n in options("algo")}
    out["index.md"] = index_page()
    out["models.md"] = models_page()
    out["hardware.md"] = hardware_page()
    out["data.md"] = data_page()
    out["experiments.md"] = experiments_page()
    return out


def stale(wanted: dict[str, str], folder: Path) -> list[str]:
    """Pages that are missing, differ, or should not be there."""
    present = {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.md")}
    kept = {n: text for n, text in present.items() if n in KEPT or n.startswith(KEPT_FOLDER)}
    wanted = wanted | kept
    return sorted(n for n in wanted | present if wanted.get(n) != present.get(n))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder (default: docs/ of the checkout)")
    args = parser.parse_args()
    wanted = pages()
    changed = stale(wanted, args.out)
    if args.check:
        if changed:
            sys.exit(f"stale: {', '.join(changed)}; run python scripts/docs.py")
        return
    for name in changed:
        path = args.out / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    print(f"{len(wanted)} pages in {args.out}, {len(changed)} changed")


if __name__ == "__main__":
    logging.getLogger("onward").setLevel(logging.ERROR)  # warnings would be of the small samples measured here
    main()
