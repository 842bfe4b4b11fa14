"""The teacher's data: captured once, verified before anything trains on it, archived under a date.

capture → store/part-*.parquet, manifest.json → verify_saved_data → verified.json → archive → store_<UTC date>/
"""

from stillroom.offline_teacher_data.capturing import capture, capture_slice, made_from
from stillroom.offline_teacher_data.cells import _to_numpy_array, _to_py
from stillroom.offline_teacher_data.importing import import_signals, write_requests
from stillroom.offline_teacher_data.snapshots import archive
from stillroom.offline_teacher_data.verification import (
    require_matching,
    require_record,
    require_verified,
    seal,
    verify_saved_data,
)

__all__ = [
    "_to_numpy_array",
    "_to_py",
    "archive",
    "capture",
    "capture_slice",
    "import_signals",
    "made_from",
    "require_matching",
    "require_record",
    "require_verified",
    "seal",
    "verify_saved_data",
    "write_requests",
]
