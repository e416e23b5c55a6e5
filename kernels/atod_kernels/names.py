"""Names and numbers that several modules share, defined once: divergences, ways to treat turns, special values."""

# Divergences between p, the student's next-token distribution, and q, the teacher's.
REVERSE_KL = "reverse_kl"  # KL(p || q)
FORWARD_KL = "forward_kl"  # KL(q || p)
JSD = "jsd"  # alpha KL(q || m) + (1 - alpha) KL(p || m), m = alpha q + (1 - alpha) p
SKEW_REVERSE_KL = "skew_reverse_kl"  # KL(p || m), m = alpha p + (1 - alpha) q
SKEW_FORWARD_KL = "skew_forward_kl"  # KL(q || m), m = alpha q + (1 - alpha) p
MIXTURES = (JSD, SKEW_REVERSE_KL, SKEW_FORWARD_KL)  # their value needs both normalisers first
DIVERGENCES = (REVERSE_KL, FORWARD_KL, *MIXTURES)
NO_TEACHER = ""  # stands for the divergence if there is only one model

IGNORE = -100  # the target of an ignored token
MASKED = -1e30  # a logit that means probability 0; finite, because 0 * -inf is NaN

REDUCTIONS = ("mean", "sum", "max", "min")  # of tokens to turns
NORMALISE = ("minmax", "rank", "none")  # a turn's signal to [0, 1]
FUSE = (
    "softor",
    "mean",
    "max",
    "product",
    "disagreement",
    "uncertainty",
    "uniform",
    "shuffled",
)  # two signals to a weight
FLAT = 1e-8  # a signal whose range over its scope is smaller is 0.5 for all turns
