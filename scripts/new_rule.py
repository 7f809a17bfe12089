"""Start a learning rule: one file and one YAML that run at once and pass the contract tests.

    python scripts/new_rule.py my_rule "My Rule" "Author, Author" 2026 https://arxiv.org/abs/...
    python scripts/new_rule.py my_rule ... --family forward_only

The new rule is block-local with a linear head per block; replace ``local_loss`` by what your rule descends, or
subclass another tier of onward.algo.base. Every contract test runs on it at once; what no template can give is
printed at the end.
"""

from __future__ import annotations

import argparse
import keyword
import sys
from pathlib import Path
from typing import NoReturn

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

OWED = """\
{module}
{config}

It runs and passes the contract tests as it is:
  python train.py algo={key} model=mlp
  python -m pytest tests/contract -k {key}

Still owed by a real rule, and in no template:
  the update      local_loss, equation, locality, passes, differs and reported in {module}
  an oracle       tests/oracle/test_{key}.py: its update against a closed form or a second derivation
  learning        tests/learn/test_{key}.py: it beats a frozen random trunk of the same size
  a golden value  ONWARD_UPDATE_GOLDEN=1 python -m pytest tests/golden -k {key}
  its page        python scripts/docs.py"""


def refuse(key: str, value: object, valid: str) -> NoReturn:
    sys.exit(f"error: {key}={str(value)!r} is not valid: {valid}")


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
        refuse("key", args.key, "a lower-case Python name such as my_rule")
    algo, configs = args.root / "src" / "onward" / "algo", args.root / "conf" / "algo"
    if not configs.is_dir():
        refuse("--root", args.root, "a checkout, with conf/algo/ and src/onward/algo/ in it")
    families = sorted(p.parent.name for p in algo.glob("*/__init__.py"))
    if args.family not in families:
        refuse("--family", args.family, f"one of {', '.join(families)}")
    present = {p.stem: p for p in [*algo.glob("*/*.py"), *configs.glob("*.yaml")]}
    if args.key in present:
        refuse("key", args.key, f"a new name, but {present[args.key].relative_to(args.root)} exists")
    for field in ("title", "authors", "url"):
        if set(getattr(args, field)) & set('"\\\n') or not getattr(args, field).strip():
            refuse(field, getattr(args, field), "one line of text without quotes and backslashes")
    if not args.url.startswith("https://"):
        refuse("url", args.url, "the paper's address, https://...")
    if not 1940 < args.year <= 2026:
        refuse("year", args.year, "the paper's year, 1941 to 2026")
    module, config = algo / args.family / f"{args.key}.py", configs / f"{args.key}.yaml"
    words = {"key": args.key, "title": args.title, "authors": args.authors, "year": args.year, "url": args.url,
             "family": args.family, "name": "".join(w.capitalize() for w in args.key.split("_"))}
    module.write_text(MODULE.format(**words), encoding="utf-8")
    config.write_text(CONFIG.format(**words), encoding="utf-8")
    print(OWED.format(key=args.key, module=module.relative_to(args.root), config=config.relative_to(args.root)))


if __name__ == "__main__":
    main()
