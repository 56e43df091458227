"""What ``main.py`` is built of besides what all trainers share: optimiser and record."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import param_groups_weight_decay  # pyright: ignore[reportPrivateImportUsage] - timm's documented entry
from torch import nn

from common.run import build
from common.run.files import write_atomic
from common.run.metrics import Record
from common.run.settings import OptimizerSettings


def build_optimizer(
    model: nn.Module, settings: OptimizerSettings, *, decay_tokens: bool = True
) -> torch.optim.Optimizer:
    """timm's optimiser. The published cascades decay their class tokens and position tables; so does this one."""
    groups = None
    if not decay_tokens:
        tokens = [name for name, _ in model.named_parameters() if name.endswith(("cls_token", "pos_embed"))]
        groups = partial(param_groups_weight_decay, weight_decay=settings.weight_decay, no_weight_decay_list=tokens)
    return build.build_optimizer(model, settings, group_fn=groups)


class SummaryRecord(Record):
    """The record of a run, and ``summary.csv`` beside it in the published columns, rewritten after every epoch."""

    def write(self, event: str, row: Mapping[str, Any]) -> None:
        super().write(event, row)
        if event != "epoch" or self.path is None:
            return
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        names = [name for name in row if re.fullmatch("test_(loss|exit._top.)", name)]
        text = io.StringIO()
        table = csv.writer(text, lineterminator=os.linesep)
        table.writerow(["epoch", "train_loss", *(name.replace("test_", "eval_") for name in names)])
        for line in lines:
            if line["event"] == "epoch":
                table.writerow([line.get(name) for name in ("epoch", "train_loss", *names)])
        write_atomic(Path(self.path).with_name("summary.csv"), text.getvalue())
