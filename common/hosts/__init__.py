"""Any Vision Transformer as a host of token methods: views of its blocks, the plan, the one runner. No method is here.

``lean(net, "tome", r=16)`` gives a network that computes what ``net`` does on fewer tokens; ``explain(net)`` says which
methods a network can have, and why not the others; ``python -m common.hosts`` measures them. Imports ``measure``,
``data`` and ``run``; torch only when a name of it is asked for, so that the command parses its flags without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.hosts.host import BlockView, Facts, Host, NotAHost, Parts, Rotation, Tokens
    from common.hosts.network import Lean, explain, lean
    from common.hosts.runner import Effect, Method, Plan, PlanError

__all__ = [
    "BlockView",
    "Effect",
    "Facts",
    "Host",
    "Lean",
    "Method",
    "NotAHost",
    "Parts",
    "Plan",
    "PlanError",
    "Rotation",
    "Tokens",
    "explain",
    "lean",
]
_NETWORK, _RUNNER = ("Lean", "explain", "lean"), ("Effect", "Method", "Plan", "PlanError")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "network" if name in _NETWORK else "runner" if name in _RUNNER else "host"
    return getattr(importlib.import_module(f"common.hosts.{module}"), name)
