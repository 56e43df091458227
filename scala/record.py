"""``log.txt`` in the form of the published program."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from scala.engine_scala import SLIM_PASSES

TERMS = ("loss", "loss_full", *(f"loss_{name}{ce}" for name in SLIM_PASSES for ce in ("", "_ce")))


def published_log(rows: Iterable[Mapping[str, Any]], parameters: int) -> str:
    """A JSON object per line, from the rows of ``log.jsonl``.

    Per epoch ``train_lr``, ``train_loss``, ``train_loss_full``, ``train_loss_3q``, ..., ``test_loss``, ``test_acc1``,
    ``test_acc5``, ``epoch``, ``n_parameters``; per width of the final evaluation ``{"Width ratio": r, "Acc1": a}``.

    Args:
        parameters: of the network.
    """
    lines: list[dict[str, Any]] = []
    for row in rows:
        if row["event"] == "width":
            lines.append({"Width ratio": row["ratio"], "Acc1": row["top1_percent"]})
        elif row["event"] == "epoch":
            terms = {f"train_{name}": row.get(f"train_{name}", 0.0) for name in TERMS}
            tested = {"test_loss": row["test_loss"], "test_acc1": row["test_top1_percent"]}
            tested |= {"test_acc5": row["test_top5_percent"], "epoch": row["epoch"], "n_parameters": parameters}
            lines.append({"train_lr": row["train_lr"], **terms, **tested})
    return "".join(json.dumps(line) + "\n" for line in lines)
