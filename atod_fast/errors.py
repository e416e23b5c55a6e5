"""The errors a user can cause or must act on; `train.main` prints their message on one line and exits with their code."""


class UserError(Exception):
    """Bad usage, configuration or input. The message names the key, the value and the remedy."""

    exit_code = 2


class NotHere(UserError):
    """What the settings point to cannot be reached: a file, a folder, a server. A dry run goes on without it."""


class GuardError(Exception):
    """A run-time guard stopped the run: a non-finite loss, rollout and trainer log-probs that disagree, a checkpoint that
    cannot be written, one of those below."""

    exit_code = 3


class EnvironmentsLost(GuardError):
    """Too many environments of a rollout failed. What was trained before is whole."""


class EngineFailure(GuardError):
    """The rollout engine broke down in the midst of a rollout, of which nothing may be used. The loop tries once more."""


class RankLost(GuardError):
    """Another rank is gone or did not come in time: the ranks can do nothing together any more, saving included."""


class Unexpected(Exception):
    """Neither of the above: a bug, a lost device, another file that cannot be written. Its traceback has been printed on the rank where it happened."""

    exit_code = 1
