"""Start a learning rule: one file and one YAML that run at once and pass the contract tests.

    python scripts/new_rule.py my_rule "My Rule" "Author, Author" 2026 https://arxiv.org/abs/...
    python scripts/new_rule.py my_rule ... --family forward_only

The new rule is block-local with a linear head per block; replace ``local_loss`` by what your rule descends, or
subclass another tier of onward.algo.base.
"""

from __future__ import annotations

import argparse
import keyword
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

MODULE = '''"""{title}: one line on what it does."""

from __future__ import annotations

import torch
from torch import nn

from onward.algo.base import BlockLocal, RuleInfo
from onward.model.base import head


class {name}(BlockLocal):
    """Block i descends ``L_i = CE(h_i M_i^T, y)`` of its own output; replace it by your rule's loss.

    Args:
        schedule: see :class:`BlockLocal`.
    Source: {authors} {year}.
    """

    info = RuleInfo(
        title="{title}",
        authors="{authors}",
        year={year},
        url="{url}",
        locality="block",
        passes="one forward",
        equation=r"\\mathcal L_i = \\mathrm{{CE}}(h_i M_i^\\top, y)",
        differs="Not yet compared with its paper.",
    )
    end_to_end = False

    def __init__(self, schedule: str = "simultaneous"):
        super().__init__(schedule)
        self.heads = nn.ModuleList()

    def setup(self, model, spec):
        self.task = spec.task
        self.heads = nn.ModuleList([head(block, spec, bias=False) for block in model.blocks])
        return model

    def local_module(self, i):
        return self.heads[i] if i < len(self.heads) else None

    def local_loss(self, i, h, batch):
        return self.task.loss(self.heads[i](h), batch)

    def predict(self, engine, batch):
        return {{"sum": torch.stack([self.heads[i](h) for i, h in engine.hidden(batch)]).sum(0)}}
'''

CONFIG = '''# @package _global_
# {title}: one line on what it does ({authors} {year})
# python train.py algo={key} model=mlp
algo:
  _target_: onward.algo.{family}.{key}.{name}
  schedule: simultaneous   # simultaneous | greedy
search:
  optimizer.lr: {{distribution: loguniform, low: 1.0e-4, high: 1.0e-1}}
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("key", help="the name on the command line, snake_case")
    parser.add_argument("title")
    parser.add_argument("authors")
    parser.add_argument("year", type=int)
    parser.add_argument("url")
    parser.add_argument("--family", default="forward_only", help="folder below src/onward/algo")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write into")
    args = parser.parse_args()
    if not args.key.isidentifier() or keyword.iskeyword(args.key) or args.key != args.key.lower():
        sys.exit(f"error: key={args.key!r} is not valid: a lower-case Python name such as my_rule")
    folder = args.root / "src" / "onward" / "algo" / args.family
    if not folder.is_dir():
        families = sorted(p.name for p in folder.parent.iterdir() if (p / "__init__.py").exists())
        sys.exit(f"error: family={args.family!r} is not valid: one of {', '.join(families)}")
    module, config = folder / f"{args.key}.py", args.root / "conf" / "algo" / f"{args.key}.yaml"
    for path in (module, config):
        if path.exists():
            sys.exit(f"error: key={args.key!r} is not valid: {path.relative_to(args.root)} exists already")
    words = {"key": args.key, "title": args.title, "authors": args.authors, "year": args.year, "url": args.url,
             "family": args.family, "name": "".join(w.capitalize() for w in args.key.split("_"))}
    module.write_text(MODULE.format(**words), encoding="utf-8")
    config.write_text(CONFIG.format(**words), encoding="utf-8")
    print(f"{module.relative_to(args.root)}\n{config.relative_to(args.root)}\n"
          f"python train.py algo={args.key} model=mlp")


if __name__ == "__main__":
    main()
