"""Tasks one after another through the command line: what is stored, tested, drawn, resumed and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

SMALL = ["algo=backprop", "data=split_digits", "data.limit=300", "data.batch_size=32", "model.widths=[16]",
         "optimizer.lr=0.01", "trainer.progress=none"]


def stored(store, name: str):
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    ids = [e.experiment_id for e in client.search_experiments()]
    (found,) = client.search_runs(ids, f"attributes.run_name = '{name}'")
    return client, found


def weights(found) -> dict[str, torch.Tensor]:
    return torch.load(Path(found.data.tags["run_dir"]) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_stores_what_it_kept_of_every_task_and_resumes_between_two(run, store):
    words = [*SMALL, "continual=replay", "continual.size=20"]
    code, _, err = run(*words, "name=straight")
    assert code == 0, err
    client, straight = stored(store, "straight")
    metrics, directory = straight.data.metrics, Path(straight.data.tags["run_dir"])
    rows = [line.split(",") for line in (directory / "tasks.csv").read_text().splitlines()]
    assert len(rows) == 6
    matrix = torch.tensor([[float(v) for v in row[1:]] for row in rows[1:]], dtype=torch.float64)
    assert metrics["tasks/accuracy"] == pytest.approx(float(matrix[-1].mean()), abs=1e-5)
    best_before = matrix[:-1, :-1].tril().amax(0)
    assert metrics["tasks/forgetting"] == pytest.approx(float((best_before - matrix[-1, :-1]).mean()), abs=1e-5)
    assert straight.data.params["continual"] == "replay" and straight.data.params["continual.size"] == "20"
    # all of the test split belongs to one task or another, and what is tested is what the last task left
    assert 0 < metrics["test/accuracy"] < 1 and metrics["epoch"] == 10
    history = client.get_metric_history(straight.info.run_id, "task/0/accuracy")
    assert [h.value for h in sorted(history, key=lambda h: h.step)] == pytest.approx(matrix[:, 0].tolist(), abs=1e-5)
    assert (directory / "plots" / "tasks.png").is_file()

    code, _, err = run(*words, "name=halves", "trainer.max_epochs=4")
    assert code == 0 and "ends before task 3 of 5" in err
    code, _, err = run(f"resume={stored(store, 'halves')[1].info.run_id}", "trainer.max_epochs=10")
    assert code == 0, err
    resumed = stored(store, "halves")[1]
    a, b = weights(straight), weights(resumed)
    assert a.keys() == b.keys() and any("method.x" in name for name in a)
    assert all(torch.equal(a[k], b[k]) for k in a)
    names = [n for n in metrics if n.startswith("task")]
    assert len(names) == 10 and all(resumed.data.metrics[n] == metrics[n] for n in names)
    assert resumed.data.metrics["test/accuracy"] == metrics["test/accuracy"]


@pytest.mark.parametrize(("words", "expected"), [
    (["continual=reply"], "continual"),
    (["continual=replay", "continual.size=5"], "continual.size=5 is not valid: at least 10: one sample of every class"),
    (["data.tasks=3"], "data.tasks=3 is not valid: 2 or 5: a divisor of the 10 classes"),
    (["continual=l2", "algo=soft_hebb"], "hands none over for block0"),
    (["continual=ewc", "data=digits"], "data=digits is one task"),
])
def test_one_message_and_no_run(run, store, words, expected):
    code, _, err = run(*SMALL, *words, "name=refused")
    assert code in (1, 2) and expected in err and "Traceback" not in err
    if (store / "mlflow.db").exists():
        client = MlflowClient(f"sqlite:///{store}/mlflow.db")
        ids = [e.experiment_id for e in client.search_experiments()]
        assert not client.search_runs(ids, "attributes.run_name = 'refused'")


def test_runs_of_tasks_are_not_batched(run, store):
    code, _, err = run("-m", *SMALL, "seed=0,1", "sweep.batched=true", "trainer.max_epochs=2")
    assert code == 0, err
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    ids = [e.experiment_id for e in client.search_experiments()]
    found = [r for r in client.search_runs(ids) if r.data.tags.get("mlflow.parentRunId")]
    assert len(found) == 2 and all("batched" not in r.data.tags for r in found)
