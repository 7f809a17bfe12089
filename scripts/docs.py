"""Write docs/ from what is on disk: a page per rule, an index to choose from, models, data, hardware.

    python scripts/docs.py           # write
    python scripts/docs.py --check   # exit 1 and name the pages that are stale

Everything stated is measured or read here: the audit runs, one update is metered, every model and data
layout is tried, and reported and obtained figures come from conf/experiment/.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

import torch
import yaml

from onward.catalogue import composed, conf_dir, header, options
from onward.data.spec import Batch, DataSpec
from onward.data.task import Classification
from onward.engine import Engine
from onward.engine.ledger import LiveBytes, step_cost
from onward.engine.locality import audit, classify
from onward.errors import ConfigError, Unsupported
from onward.model.mlp import mlp
from onward.samples import FAMILIES, family, model, optimizer, rule

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "MLP 64-128-128-128-10, batch 64, one update"


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
    return Engine(learner, stack, spec, optimizer(name), total_steps=10), batch


@lru_cache
def cost(name: str) -> dict[str, float]:
    return step_cost(*reference_engine(name))


def peak(name: str, depth: int) -> int:
    """Peak live bytes of a second update at some depth, width 64, SGD (no optimizer temporaries)."""
    engine, batch = reference_engine(name, depth, 64)
    engine = Engine(engine.rule, engine.model, engine.spec, lambda p: torch.optim.SGD(p, lr=1e-3), total_steps=10)
    engine.train_step(batch)
    with LiveBytes() as live:
        engine.train_step(batch)
    return live.peak


@lru_cache
def memory_growth(name: str) -> str:
    """How peak memory changes from 4 to 16 blocks."""
    a, b = peak(name, 4), peak(name, 16)
    return "constant in depth" if a == b else f"x {b / a:.1f} from 4 to 16 blocks"


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


def experiments() -> list[dict]:
    """Replications on disk: what the paper reports beside what was obtained here."""
    found = []
    for path in sorted((conf_dir() / "experiment").glob("*.yaml")):
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
        algo = next((v for d in node.get("defaults", []) if isinstance(d, dict)
                     for k, v in d.items() if k.replace("override", "").strip() == "/algo"), "forward_forward")
        found.append({"name": path.stem, "algo": algo, "reported": node.get("reported") or {},
                      "obtained": node.get("obtained") or {}})
    return found


def figure(entry: dict) -> str:
    """A reported or obtained figure as one cell."""
    if not entry:
        return "not run yet"
    text = str(entry.get("figure", entry.get("test_accuracy", "")))
    seeds = entry.get("seeds")
    if seeds:
        n = len(seeds) if isinstance(seeds, list) else int(seeds)
        text += f" ({n} seed{'s' if n > 1 else ''})"
    return text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(r)} |" for r in rows)]


def axes(name: str) -> list[list[str]]:
    """The rule's own keys, defaults and the comment beside them in its YAML."""
    text = (conf_dir() / "algo" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    notes = {line.split(":")[0].strip(): line.split("#", 1)[1].strip()
             for line in text if line.startswith("  ") and ":" in line and "#" in line}
    return [[f"`algo.{k}`", f"`{json.dumps(v)}`", notes.get(k, "").replace("|", "\\|")]
            for k, v in composed(f"algo={name}").algo.items() if not k.startswith("_")]


def ratio(name: str, key: str) -> str:
    base = cost("backprop")[key]
    return f"{cost(name)[key] / base:.2f}" if base else "-"


def rule_page(name: str) -> str:
    learner = rule(name)
    info = learner.info
    engine, batch = reference_engine(name)
    found = audit(engine, batch)
    seen = classify(**found)
    matrix = "\n".join(" ".join("X" if x else "." for x in row) + "    " + " ".join("X" if x else "." for x in held)
                       for row, held in zip(found["free"].tolist(), found["held"].tolist(), strict=True))
    c = cost(name)
    source = Path(sys.modules[type(learner).__module__].__file__).relative_to(ROOT)
    cfg = composed(f"algo={name}")
    lines = [
        f"# {info.title}", "",
        f"{header('algo', name)[0]}", "",
        f"Source: {info.authors} ({info.year}), <{info.url}>. Code: [`{source}`](../../{source}).", "",
        "```", f"python train.py algo={name} model=mlp", "```", "",
        "$$", info.equation, "$$", "",
        f"**Where it differs from its source.** {info.differs}", "",
        "## What it is", "",
        *table(["", ""], [["tier", type(learner).tier], ["locality, declared", info.locality],
                          ["locality, audited", seen], ["passes per update", info.passes],
                          ["control", "yes" if info.control else "no"]]), "",
        "The audit perturbs one unit (row; the readout is the last) and marks the units whose update changes "
        "(column): as it is, and with the output error held fixed.", "",
        "```", matrix, "```", "",
        "## What it costs", "", f"Measured: {REFERENCE}.", "",
        *table(["", "here", "of backprop"], [
            ["FLOPs of matrix products", f"{c['flops']:,.0f}", ratio(name, "flops")],
            ["peak live bytes", f"{c['peak_bytes']:,.0f}", ratio(name, "peak_bytes")],
            ["bytes kept by autograd", f"{c['saved_bytes']:,.0f}", ratio(name, "saved_bytes")],
            ["network executions", f"{c['forward_passes']:.1f} forward, {c['jvp_passes']:.1f} forward-mode", ""],
            ["loss queries", f"{c['queries']:.0f}", ""],
            ["peak memory", memory_growth(name), memory_growth("backprop")]]), "",
        "## Axes", "", *table(["key", "default", ""], axes(name)), "",
        f"Optimizer: `{cfg.optimizer._target_}`, learning rate `{cfg.optimizer.lr}`.", "",
        "## Where it runs", "",
    ]
    rows = runs_on(name)
    notes = [r[0] for r in rows if len(r) == 1]
    lines += [*table(["model", *FAMILIES], [r for r in rows if len(r) > 1]), "", *[f"{n}  " for n in notes], ""]
    lines += ["## Published and obtained", ""]
    if info.reported:
        lines += [f"Published: {info.reported}.", ""]
    mine = [e for e in experiments() if e["algo"] == name]
    if mine:
        lines += [*table(["experiment", "reported", "obtained here", "command"], [
            [e["name"], figure(e["reported"]), figure(e["obtained"]), f"`python train.py experiment={e['name']}`"]
            for e in mine]), ""]
    elif not info.reported:
        lines += ["No figure is published for this form.", ""]
    return "\n".join(lines)


def index_page() -> str:
    rows = []
    best = {e["algo"]: figure(e["obtained"]) for e in experiments() if e["obtained"] and "mnist" in e["name"]}
    for name in options("algo"):
        info = rule(name).info
        rows.append([f"[{name}](rules/{name}.md)", info.title + (" (control)" if info.control else ""),
                     info.locality, info.passes, ratio(name, "flops"), ratio(name, "peak_bytes"),
                     memory_growth(name), best.get(name, "")])
    constant = [n for n in options("algo") if memory_growth(n) == "constant in depth" and not rule(n).info.control]
    nograd = [n for n in options("algo") if cost(n)["saved_bytes"] == 0 and not rule(n).info.control]
    local = [n for n in options("algo") if rule(n).info.locality == "block" and not rule(n).info.control]

    def links(names):
        return ", ".join(f"[{n}](rules/{n}.md)" for n in names)

    lines = [
        "# Choose a learning rule", "",
        "Every line is measured or audited by `python scripts/docs.py`; each rule's page says how.", "",
        f"- **Memory must not grow with depth**: {links(constant)}",
        f"- **Nothing may be kept for a backward pass** (on dense nets): {links(nograd)}",
        f"- **No signal may come from later blocks**: {links(local)}",
        f"- **Only the loss can be measured**: {links(n for n in options('algo') if rule(n).tier == 'Perturbation')}",
        f"- **Controls to compare with**: {links(n for n in options('algo') if rule(n).info.control)}", "",
        f"Costs are ratios to backprop: {REFERENCE}. Accuracy: MNIST test set, from conf/experiment/.", "",
        *table(["rule", "title", "locality", "passes per update", "FLOPs", "peak bytes", "memory", "MNIST"], rows), "",
        "See also: [models](models.md), [data](data.md), [hardware](hardware.md), [experiments](experiments.md).", "",
    ]
    return "\n".join(lines)


def group_page(title: str, group: str, text: str) -> str:
    rows = [[f"`{group}={n}`", header(group, n)[0], f"`{header(group, n)[1]}`"] for n in options(group)]
    return "\n".join([f"# {title}", "", text, "", *table(["choice", "", "command"], rows), ""])


def data_page() -> str:
    from onward.data.files import FILES

    page = group_page("Data", "data", "Three disjoint splits everywhere; nothing selects on test. Files are sought in "
                      "`data.root`, `ONWARD_DATA`, `/usr/share/datasets` and the user's cache, then downloaded if "
                      "`data.download=true`; hashes are of the decompressed content.")
    rows = [[f"{data}: {f.name}", f"<{f.address}>", f"`{f.digest}`", f.terms]
            for data, files in FILES.items() for f in files.values()]
    return page + "\n".join(["## Published files", "", *table(["file", "address", "hash", "terms"], rows), ""])


def experiments_page() -> str:
    rows = [[f"`experiment={e['name']}`", e["algo"], figure(e["reported"]), str(e["reported"].get("source", "")),
             figure(e["obtained"]), str(e["obtained"].get("commit", ""))] for e in experiments()]
    return "\n".join(["# Experiments: reported and obtained", "",
                      "Test accuracy of the checkpoint that validation selected. `reported` is the source's figure, "
                      "`obtained` what the command gave here.", "",
                      *table(["command", "rule", "reported", "source", "obtained", "commit"], rows), ""])


def pages() -> dict[str, str]:
    torch.set_num_threads(1)
    out = {f"rules/{n}.md": rule_page(n) for n in options("algo")}
    out["index.md"] = index_page()
    out["models.md"] = group_page("Models", "model", "Sizes come from the data. A block is what a local rule may "
                                  "train alone.")
    out["hardware.md"] = group_page("Hardware", "hardware", "Real devices through Lightning, and emulated arithmetic "
                                    "by tensor role.")
    out["data.md"] = data_page()
    out["experiments.md"] = experiments_page()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    wanted = pages()
    present = {str(p.relative_to(args.out)): p for p in args.out.rglob("*.md")}
    made = set(wanted)
    kept = {"benchmark.md"}
    stale = [n for n, text in wanted.items() if n not in present or present[n].read_text(encoding="utf-8") != text]
    stale += [n for n in present if n not in made | kept]
    if args.check:
        if stale:
            sys.exit(f"stale: {', '.join(sorted(stale))}; run python scripts/docs.py")
        return
    for name, text in wanted.items():
        path = args.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in present:
        if name not in made | kept:
            present[name].unlink()
    print(f"{len(wanted)} pages in {args.out}")


if __name__ == "__main__":
    main()
