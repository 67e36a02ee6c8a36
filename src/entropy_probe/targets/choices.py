"""Which entropy, and by which estimator: what a caller chooses by name."""

from __future__ import annotations

from enum import StrEnum


class Estimator(StrEnum):
    """How the entropy and its gradient are estimated from sampled responses.

    ``score``: from log-probabilities of what was drawn, X_n = (1/G) Σ_g (S_ng − S̄_n,−g) ∇S_ng. ``rao-blackwell``: from the
    entropy H_t of every next-token distribution, which replaces what was drawn after a token by its expectation: less noise,
    one backward more. Both have the mean −∇H, nats. Source: docs/method.md, section 2.

    Example:
        >>> from entropy_probe import Estimator, Settings
        >>> Estimator("rao-blackwell")
        <Estimator.RAO_BLACKWELL: 'rao-blackwell'>
        >>> settings = Settings(estimator="score")
    """

    SCORE = "score"
    RAO_BLACKWELL = "rao-blackwell"


class SamplerWeights(StrEnum):
    """How responses that another policy than the probed one drew enter the entropy and its gradient.

    ``response``: with w = π_θ(y) / π_sampler(y), over the batch's mean. ``prefix``: with w_{<s}, the ratio of the tokens
    before position s, which by Rao-Blackwell is all that position s needs; less noise where the two policies are far apart.
    ``off``: each counts once, a bias of the size of log w. ``auto``: w while their effective sample size is half of the
    responses or more, below that w_{<s} (by score still w), and refused under a tenth. Where nothing says that a row's
    sampler was another policy it counts once in any case. Source: docs/method.md, section 2.

    Example:
        >>> from entropy_probe import SamplerWeights, Settings
        >>> SamplerWeights("prefix")
        <SamplerWeights.PREFIX: 'prefix'>
        >>> settings = Settings(sampler_weights="prefix")
    """

    AUTO = "auto"
    RESPONSE = "response"
    PREFIX = "prefix"
    OFF = "off"


class EntropyUnit(StrEnum):
    """Which entropy: of a whole response, or that over the mean length.

    ``per-response``: H = E[−S], nats per response. ``per-token``: H/T̄ with T̄ = E[T], nats per token; its gradient has a
    length term, and h = H/T̄ and T̄ are held fixed. Source: docs/method.md, section 2.

    Example:
        >>> from entropy_probe import EntropyUnit, Settings
        >>> EntropyUnit("per-token")
        <EntropyUnit.PER_TOKEN: 'per-token'>
        >>> settings = Settings(entropy="per-token")
    """

    PER_RESPONSE = "per-response"
    PER_TOKEN = "per-token"
