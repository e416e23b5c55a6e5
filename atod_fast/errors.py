"""The errors a user can cause or must act on.

The commands print their message on one line and exit with their code.
"""


class Ending(Exception):
    """An error that ends a command as foreseen; the subclasses say with which exit code."""

    exit_code: int


class UserError(Ending):
    """Bad usage, configuration or input. The message names the key, the value and the remedy."""

    exit_code = 2


class NotHere(UserError):
    """A file, folder or server that the settings name cannot be reached. A dry run goes on without it."""


class GuardError(Ending):
    """A run-time guard stopped the run.

    Such as: a non-finite loss, rollout and trainer log-probs that disagree, a checkpoint that cannot be written, or one
    of the subclasses.
    """

    exit_code = 3


class EnvironmentsLost(GuardError):
    """Too many environments of a rollout failed. The steps before it are not affected."""


class EngineFailure(GuardError):
    """The rollout engine failed during a rollout, which is discarded. The loop tries once more."""


class RankLost(GuardError):
    """Another rank has ended or did not arrive in time. No collective is possible any more, so nothing can be saved."""


class Unexpected(Ending):
    """None of the above: a bug, a lost device, another file that cannot be written.

    The rank where it happened has printed the traceback.
    """

    exit_code = 1
