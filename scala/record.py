"""The record of a run: ``log.jsonl`` as everywhere here, and ``log.txt`` in the form of the published program."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.run.files import write_atomic
from common.run.metrics import Record
from scala.engine_scala import SLIM_PASSES

TERMS = ("loss", "loss_full", *(f"loss_{name}{ce}" for name in SLIM_PASSES for ce in ("", "_ce")))


class ScalaRecord(Record):
    """``common.run.metrics.Record`` that also keeps ``log.txt``, made anew from the rows at every write.

    Each line is a JSON object: per epoch ``train_lr``, ``train_loss``, ``train_loss_full``, ``train_loss_3q``, ...,
    ``test_loss``, ``test_acc1``, ``test_acc5``, ``epoch``, ``n_parameters``; per width of the final evaluation
    ``{"Width ratio": r, "Acc1": a}``.

    Args:
        parameters: of the network, for ``n_parameters``.
    """

    def __init__(self, path: Path, *, parameters: int, tensorboard: Path | None = None) -> None:
        super().__init__(path, tensorboard=tensorboard)
        self.parameters = parameters

    def write(self, event: str, row: Mapping[str, Any]) -> None:
        super().write(event, row)
        if self.path is not None and event in ("epoch", "width"):
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            lines = [self._published(row) for row in rows if row["event"] in ("epoch", "width")]
            write_atomic(self.path.with_name("log.txt"), "".join(json.dumps(line) + "\n" for line in lines))

    def _published(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row under the published names."""
        if row["event"] == "width":
            return {"Width ratio": row["ratio"], "Acc1": row["top1_percent"]}
        line = {"train_lr": row["train_lr"], **{f"train_{name}": row.get(f"train_{name}", 0.0) for name in TERMS}}
        line |= {"test_loss": row["test_loss"], "test_acc1": row["test_top1_percent"]}
        return line | {
            "test_acc5": row["test_top5_percent"], "epoch": row["epoch"], "n_parameters": self.parameters
        }  # fmt: skip
