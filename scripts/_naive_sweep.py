"""The other side of scripts/benchmark_sweep.py: a sweep as the documentation of Hydra, Lightning and MLflow shows it.

    python scripts/_naive_sweep.py seed=3            # one cold process
    python scripts/_naive_sweep.py -m seed=0,1,2     # Hydra's multirun

The net, data, updates and batches are those that the benchmark gives onward. Lightning would log nothing in so few
batches, and warns to set ``log_every_n_steps``: here it is ``NAIVE_LOG_EVERY``, 1 unless told otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pytorch_lightning.loggers import MLFlowLogger
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


@dataclass
class Config:
    seed: int = 0
    width: int = 64
    lr: float = 3e-3
    batch_size: int = 64
    max_epochs: int = 2


ConfigStore.instance().store(name="config", node=Config)


class Classifier(pl.LightningModule):
    def __init__(self, width: int, lr: float):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.ReLU(),
                                       torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        self.val_accuracy, self.test_accuracy = MulticlassAccuracy(10), MulticlassAccuracy(10)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log("train_loss", loss)
        self.log("train_accuracy", (logits.argmax(1) == y).float().mean())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", self.val_accuracy)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.test_accuracy(self.net(x), y)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


@hydra.main(version_base=None, config_name="config")
def main(cfg: Config) -> float:
    pl.seed_everything(cfg.seed)
    pixels, classes = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes))
    train, val, test = random_split(whole, [0.72, 0.08, 0.2])
    logger = MLFlowLogger(experiment_name="naive", tracking_uri=f"sqlite:///{os.environ['NAIVE_OUTPUTS']}/mlflow.db")
    logger.log_hyperparams(OmegaConf.to_container(cfg))
    trainer = pl.Trainer(max_epochs=cfg.max_epochs, logger=logger, accelerator="cpu",
                         log_every_n_steps=int(os.environ.get("NAIVE_LOG_EVERY", "1")),
                         default_root_dir=os.environ["NAIVE_OUTPUTS"])
    model = Classifier(cfg.width, cfg.lr)
    trainer.fit(model, DataLoader(train, cfg.batch_size, shuffle=True), DataLoader(val, 1000))
    trainer.test(model, DataLoader(test, 1000))
    return float(trainer.callback_metrics["test_accuracy"])


if __name__ == "__main__":
    main()
