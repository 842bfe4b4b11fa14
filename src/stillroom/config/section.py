"""What every section of a study has in common, and the error that a user can mend."""

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9_\-]*$"
"""Names of studies, tasks and groups: they become names of folders."""


class UserError(Exception):
    """A mistake the user can mend; its message names the field, file or example and the remedy."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
