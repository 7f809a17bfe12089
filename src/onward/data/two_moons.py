"""Two moons: a synthetic problem of two classes in the plane."""

from __future__ import annotations

import torch

from onward.data.base import SPLITS, DataSet, Split
from onward.data.spec import DataSpec
from onward.data.splits import assemble, check_share, cut_whole
from onward.data.task import Classification
from onward.errors import ConfigError
from onward.seeds import derive


class TwoMoons(DataSet):
    """Points (2,) of two interleaving half circles and Gaussian noise, 2 classes (make_moons, scikit-learn).

    Args:
        samples: points of the three splits together.
        noise: standard deviation of the noise; the moons have radius 1.
        instance: which draw of the data set; it does not depend on the run's seed.
        test: share of the whole that is the test set.
        common: see :class:`DataSet`.
    Raises:
        ConfigError: a value out of range.
    """

    name = "two_moons"

    def __init__(self, samples: int = 2000, noise: float = 0.1, instance: int = 0, test: float = 0.2,
                 **common):
        super().__init__(**common)
        check_share("data.test", test)
        if samples < 3:
            raise ConfigError("data.samples", samples, "at least 3, one for every split")
        if noise < 0:
            raise ConfigError("data.noise", noise, "a standard deviation, not negative")
        self.samples, self.noise, self.instance, self.test = samples, noise, instance, test

    def read(self) -> tuple[DataSpec, dict[str, Split]]:
        from sklearn.datasets import make_moons

        drawn, classes = make_moons(self.samples, noise=self.noise,
                                    random_state=derive(self.instance, 0, "data/two_moons") % 2**32)
        x, y = torch.from_numpy(drawn).float(), torch.from_numpy(classes).long()
        index = cut_whole(len(x), self.test, self.validation, self.limit)
        parts = {split: (x[index[split]], y[index[split]]) for split in SPLITS}
        return assemble(self.name, "flat", Classification(2), parts)
