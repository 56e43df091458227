"""Old place of ``common.run.files``, until nothing imports it."""

from common.run.files import ROOT as ROOT
from common.run.files import write_atomic as write_atomic
