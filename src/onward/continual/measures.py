"""What a matrix of accuracies says: R[t, j] is the accuracy on task j after task t was learnt."""

from __future__ import annotations

from torch import Tensor


def average_accuracy(matrix: Tensor) -> float:
    """``1/T sum_j R[T, j]``: over all tasks at the end."""
    return float(matrix[-1].mean())


def learning_accuracy(matrix: Tensor) -> float:
    """``1/T sum_j R[j, j]``: of every task when it had just been learnt."""
    return float(matrix.diagonal().mean())


def incremental_accuracy(matrix: Tensor) -> float:
    """``1/T sum_t 1/t sum_{j <= t} R[t, j]``: over the tasks met so far, averaged over the course."""
    return sum(float(matrix[t, : t + 1].mean()) for t in range(len(matrix))) / len(matrix)


def forgetting(matrix: Tensor) -> float:
    """``1/(T-1) sum_{j < T} (max_{t < T} R[t, j] - R[T, j])``: from a task's best to the end.

    Source: Chaudhry, Dokania, Ajanthan, Torr 2018 (arXiv 1801.10112), section 3.2, with t from j on.
    """
    last = len(matrix) - 1
    return sum(float(matrix[j:last, j].max() - matrix[last, j]) for j in range(last)) / last


def backward_transfer(matrix: Tensor) -> float:
    """``1/(T-1) sum_{j < T} (R[T, j] - R[j, j])`` (Lopez-Paz, Ranzato 2017, arXiv 1706.08840)."""
    last = len(matrix) - 1
    return sum(float(matrix[last, j] - matrix[j, j]) for j in range(last)) / last


def summary(matrix: Tensor) -> dict[str, float]:
    """All of the above for a square matrix of the tasks that were learnt; of one task, what it has."""
    found = {"accuracy": average_accuracy(matrix), "learning_accuracy": learning_accuracy(matrix),
             "incremental_accuracy": incremental_accuracy(matrix)}
    if len(matrix) > 1:
        found |= {"forgetting": forgetting(matrix), "backward_transfer": backward_transfer(matrix)}
    return {f"tasks/{name}": round(value, 6) for name, value in found.items()}
