"""stillroom: how much does each kind of supervision by a large language model improve a small one?

    import stillroom as st

    workspace = st.Workspace(st.load_study("quickstart"))

Everything that a program needs is here, and loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.analysis.results import StudyResults
    from stillroom.data.alignment import align
    from stillroom.errors import UserError
    from stillroom.evaluation.scoring import evaluate
    from stillroom.experiment.workspace import Workspace
    from stillroom.offline_teacher_data.store import SignalStore
    from stillroom.studies import load_study
    from stillroom.training import distillation_student, train_student

__version__ = "0.1.0"

_HOMES = {
    "SignalStore": "offline_teacher_data.store",
    "StudyResults": "analysis.results",
    "UserError": "errors",
    "Workspace": "experiment.workspace",
    "align": "data.alignment",
    "evaluate": "evaluation.scoring",
    "load_study": "studies",
    # two modules that the study names; its others, `config` and `offline_teacher_data`, are packages here
    "distillation_student": "training.distillation_student",
    "train_student": "training.train_student",
}


def __getattr__(name: str) -> Any:
    """Load a name from its home on first use (PEP 562), so that `stillroom --help` waits for nothing slow."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stillroom' has no attribute {name!r}")
    module = import_module(f"stillroom.{_HOMES[name]}")
    found = module if _HOMES[name].endswith(name) else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "SignalStore",
    "StudyResults",
    "UserError",
    "Workspace",
    "__version__",
    "align",
    "distillation_student",
    "evaluate",
    "load_study",
    "train_student",
]
