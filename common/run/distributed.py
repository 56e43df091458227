"""Old name of ``common.run.launch``, until every branch has moved."""

from common.run.launch import *  # noqa: F403
from common.run.program import get_logger, get_rank, is_main, run  # noqa: F401
from common.run.wrapping import unwrap  # noqa: F401
