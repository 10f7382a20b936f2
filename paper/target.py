"""The first stage: the study is checked before anything is computed, then the target is resolved."""

from __future__ import annotations

from deepspec.stages.common import stage
from deepspec.stages.target import main
from paper.params import PaperParams

if __name__ == "__main__":
    stage(main, params=PaperParams)
