"""Any Vision Transformer as a host of token methods: views of its blocks, the plan, the one runner. No method is here.

``lean(net, "tome", r=16)`` gives a network that computes what ``net`` does on fewer tokens; ``explain(net)`` says which
methods a network can have, and why not the others. Imports ``measure`` and ``run``.
"""

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
