"""The errors a user can cause or must act on; `train.main` prints their message on one line and exits with their code."""


class UserError(Exception):
    """Bad usage, configuration or input. The message names the key, the value and the remedy."""

    exit_code = 2


class NotHere(UserError):
    """What the settings point to cannot be reached: a file, a folder, a server. A dry run goes on without it."""


class GuardError(Exception):
    """A run-time guard stopped the run: a non-finite loss, rollout and trainer log-probs that disagree, one of those below."""

    exit_code = 3


class EnvironmentsLost(GuardError):
    """Too many environments of a rollout failed. What was trained before is whole."""


class EngineFailure(GuardError):
    """The rollout engine broke down in the midst of a rollout, of which nothing may be used. The loop tries once more."""
