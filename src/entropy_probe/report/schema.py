"""report.json, schema 1: plain records. Every number is finite, or null with its reason in the section's ``null_reasons``.

Entropies and their changes are in nats per response, or per token where ``entropy`` says so. Later versions of schema 1 only
add keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from entropy_probe.common.evidence import Evidence
from entropy_probe.optimizers.stored_precision import Rounding
from entropy_probe.report.targets_section import TargetSection

SCHEMA = 1


@dataclass(frozen=True)
class ZeroVSection:
    """Elements with v = 0 and a gradient in this batch: ``treatment`` is P there (``leave-out``: 0, ``guide``: 1/ε).

    ``delta_h1_added`` is what they add to δH₁ under 1/ε: it is in ``delta_h1`` by the guide, and not where they are left out.
    """

    treatment: str
    elements: int
    delta_h1_added: float


@dataclass(frozen=True)
class FirstOrder:
    """The prediction δH₁ = −η U_cross and its uncertainty.

    Standard errors are of U_cross; ``delta_h1_se`` and ``delta_h1_ci95`` are of δH₁. ``interval_method`` is how the interval is
    made, from a variance that it names; ``delta_h1_se`` is √V whatever the interval, V unbiased, or without the matrix the
    jackknife's.
    ``delta_h1_se_this_step`` is what this very update does to δH₁, without the noise that another batch's Y would add.
    ``learning_rate`` is a list where parameter groups differ. ``unit_ids`` are prompt ids, lists of them for blocks.
    ``row_means``, ``row_x`` and ``row_y`` are r_u, x_u and y_u, one a unit. ``sentence`` says δH₁ in words, and how it differs
    from what the optimizer's own step does.
    """

    estimator: str
    entropy: str
    u_cross: float
    delta_h1: float
    learning_rate: float | list[float]
    bars_dot: float
    diag_sum: float
    row_means: list[float]
    unit_ids: list[Any]
    row_x: list[float]
    row_y: list[float]
    se_plugin: float | None
    se_jackknife: float | None
    se_this_step: float | None
    se_plugin_guide: float | None
    zeta1_plugin: float | None
    zeta1_jackknife: float | None
    delta_h1_se: float | None
    delta_h1_ci95: list[float] | None
    delta_h1_se_this_step: float | None
    interval_method: str | None
    self_test_residual: float
    zero_v: ZeroVSection
    sentence: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NeededSection:
    """Prompts that would settle a question if they are like the batch: the same U_cross, variance parts and responses a prompt.

    ``exclude_zero`` is for a 95 % interval of δH₁ without zero, ``reach_target_se`` for a standard error of ``target_se`` nats.
    """

    exclude_zero: int | None
    target_se: float | None
    reach_target_se: int | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NoiseSection:
    """Where δH₁'s noise comes from: shares of its variance, of which the first five add up to 1.

    ``entropy_gradient`` and ``update`` are the sampling noise of X and of Y through the responses within prompts, ``shared``
    what the two share (negative where they cancel), ``prompts`` real differences between prompts, ``product`` the one's noise
    times the other's, which falls as 1/U²; ``product_with_entropy_gradient`` and ``product_with_update`` are what of the
    product would go with X's sampling noise and with Y's. See :mod:`entropy_probe.statistics.noise`.
    """

    entropy_gradient: float | None
    update: float | None
    shared: float | None
    prompts: float | None
    product: float | None
    product_with_entropy_gradient: float | None
    product_with_update: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TwoBatchSection:
    """δH₁ with X from the evaluation rollouts and Y from the update's, nats; ``variance_*`` are its terms, nats².

    ``delta_h1_se`` squared is ``variance_evaluation`` + ``variance_update`` − ``variance_product``, and at least
    the last.
    """

    delta_h1: float
    delta_h1_se: float
    delta_h1_ci95: list[float]
    variance_evaluation: float
    variance_update: float
    variance_product: float
    evaluation_prompts: int
    evaluation_responses: int


@dataclass(frozen=True)
class FoldSection:
    """δH₁ by cross-fitting: X of one fold against Y of the others, and their mean with its delete-one error, nats."""

    folds: int
    delta_h1: float | None
    delta_h1_se: float | None
    delta_h1_by_fold: list[float]
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamWPart:
    """What one part of the optimizer's step does to the entropy, to first order, nats.

    ``v_at_t`` is the same with v before this gradient instead of after it.
    """

    value: float
    se: float | None
    v_at_t: float
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdamWSection:
    """The optimizer's own step to first order, nats: ``parts`` momentum, gradient, weight_decay and their ``total``.

    Errors are those of what this step does, given the update. ``u_statistic`` is δH₁ times ``gradient_factor`` (1 − β₁) /
    (1 − β₁^{t+1}) and ``clip_factor``: the gradient's part with v before this gradient, as in δH₁. ``gradient_factor`` is a
    list where parameter groups differ in it. ``ci95`` is the total's. ``spread_factor`` times δH₁ is what this batch does
    in all, over the steps to come; a list where parameters differ in it. ``max_grad_norm_source`` says where the clip is
    known from: given, recorded (in the rows) or unknown, and then nothing is clipped.
    """

    parts: Mapping[str, AdamWPart]
    total: float
    se: float | None
    ci95: list[float] | None
    v_at_t: float
    spread_factor: float | list[float]
    gradient_factor: float | list[float] | None
    u_statistic: float | None
    u_statistic_se: float | None
    gradient_norm: float
    clip_factor: float
    max_grad_norm: float | None
    max_grad_norm_source: str
    sentence: str
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WhatIfRow:
    """The first-order change of another step, nats: ``delta_h1`` of the preconditioned, ``adamw`` of the optimizer's own.

    ``delta_h1_se`` is over fresh batches, ``adamw_se`` of what this step does, as elsewhere.
    """

    name: str
    asked: float | None
    delta_h1: float | None
    delta_h1_se: float | None
    adamw: float | None
    adamw_se: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FallSection:
    """The multiple of the learning rate at which the optimizer's own step would lower entropy by ``nats``, to first order."""

    nats: float
    learning_rate_multiple: float | None
    learning_rate_multiple_ci95: list[float] | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WhatIfSection:
    """``rows`` of questions; ``fall`` where one was asked for."""

    rows: list[WhatIfRow]
    fall: FallSection | None


@dataclass(frozen=True)
class UnitsSection:
    """What was paired: ``sizes`` are prompts a unit; ``tokens`` response tokens. ``reason`` says why this mode."""

    mode: str
    count: int
    sizes: list[int]
    prompts: int
    responses: int
    tokens: int
    storage: str
    reason: str


@dataclass(frozen=True)
class EngineSection:
    """How the gradients were computed. Every treatment is exact; ``fallback`` and ``recomputed`` cost more.

    ``head`` says where logits were computed (whole, responses, chunked), ``reason`` why, with the responses in a forward;
    ``fallback_share`` is of the trainable elements.
    """

    head: str
    microbatch: int
    reason: str
    fallback: list[str]
    fallback_share: float
    recomputed: list[str]


@dataclass(frozen=True)
class SentSection:
    """Elements and bytes handed to collectives."""

    elements: int
    bytes: int


@dataclass(frozen=True)
class RanksSection:
    """Who shared the work: ``count`` ranks, each with its ``prompts`` and their response ``tokens``, in the order of ranks.

    ``sharding`` is what a rank holds of parameters and Adam's state: all (``replicated``), or its rows (``fsdp2``); null in one
    process, as ``backend`` is without a process group. ``sent`` is, by kind of collective, the most that any rank handed over.
    """

    count: int
    sharding: str | None
    backend: str | None
    prompts: list[int]
    tokens: list[int]
    sent: Mapping[str, SentSection]


@dataclass(frozen=True)
class EntropySection:
    """Ĥ(θ) with its standard error clustered by prompt; per token is that divided by the mean length, a ratio."""

    per_response: float
    se: float
    per_token: float
    per_token_se: float
    mean_length: float


@dataclass(frozen=True)
class RealizedRow:
    """One realised step beside its own linear prediction; see :mod:`entropy_probe.realized.changes`.

    ``rounded`` is "nearest" or "stochastic" where the step is rounded as the weights are stored, else null.
    """

    step: str
    batch: str
    method: str
    estimator: str
    entropy: str
    importance_weights: str
    delta_h: float
    se: float
    predicted: float
    entropy_before: float
    entropy_after: float
    ess: float
    ess_fraction: float
    pareto_k: float | None
    pareto_k_limit: float
    delta_h_psis: float | None
    noise_floor: float
    step_norm: float
    note: str
    rounded: str | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Which step it is of, as text and plots name it."""
        return self.step if self.rounded is None else f"{self.step} rounded {Rounding(self.rounded).adverb}"


@dataclass(frozen=True)
class SweepSection:
    """One step's realised changes at factors ``alphas`` of the learning rate; lists have one entry a factor.

    ``predicted`` is α times the estimator's own linear term, ``second_order`` ½ α² ``curvature``, to be added to it;
    ``curvature`` is d²ΔH/dα² by a central difference of ``curvature_h``. ``linear_until`` is the largest α up to which realised
    is within 10 % of predicted (``linear_beyond``: even at the largest factor). ``slope`` and ``r_squared`` are of log abs(ΔH)
    over log α up to it.
    """

    step: str
    batch: str
    estimator: str
    entropy: str
    alphas: list[float]
    delta_h: list[float]
    se: list[float]
    predicted: list[float]
    second_order: list[float] | None
    ess: list[float]
    ess_fraction: list[float]
    noise_floor: list[float]
    curvature: float | None
    curvature_error: float
    curvature_h: float
    linear_until: float | None
    linear_beyond: bool
    slope: float | None
    r_squared: float | None
    null_reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigSection:
    """What was asked for, as it was resolved; the same settings give the same numbers.

    A None is a default: by memory, from the rollouts, or from the checkpoint. ``max_grad_norm`` is 0 where it is known that
    nothing is clipped, None where it is not known. ``freeze`` are the patterns of parameters that training left alone.
    """

    mode: str
    blocks: int | None
    estimator: str
    entropy: str
    importance_weights: str
    evaluation_rollouts: str | None
    noise: bool
    interval: str | None
    split: int | None
    sweep: list[float] | None
    resample: bool
    resample_batch: int | None
    rollouts: str | None
    freeze: list[str]
    advantage: str
    length_weight: str
    max_completion_length: int | None
    learning_rate: float | None
    temperature: float
    dtype: str
    autocast: str | None
    microbatch_size: int | None
    vector_dtype: str
    gradient_checkpointing: bool
    memory_bytes: float | None
    device: str
    seed: int
    max_grad_norm: float | None
    weight_rounding: str
    zero_v: str


@dataclass(frozen=True)
class PreconditionerDots:
    """The validator's test dot of two random vectors, without P and with it."""

    plain_dot: float
    preconditioned_dot: float


@dataclass(frozen=True)
class CheckpointSection:
    """What was probed; None where a live model has no such thing. ``adam_step`` is a list where parameters differ; ``base`` is
    the model under an adapter, or with ``kind`` "full" the folder that the configuration came from."""

    path: str | None
    base: str | None
    kind: str | None
    architecture: str | None
    trainer_step: int | None
    stored_learning_rates: list[float]
    parameters: int
    frozen_parameters: int
    adam_step: int | list[int]
    mapping: str
    preconditioner_test: PreconditionerDots


@dataclass(frozen=True)
class Report:
    """The whole of report.json. ``headline`` is the sentence that a person reads first: of the optimizer's own step."""

    headline: str
    first_order: FirstOrder
    needed: NeededSection
    noise: NoiseSection
    two_batches: TwoBatchSection | None
    folds: FoldSection | None
    adamw: AdamWSection
    targets: list[TargetSection]
    what_if: WhatIfSection
    units: UnitsSection
    engine: EngineSection
    ranks: RanksSection
    entropy: EntropySection
    realized: list[RealizedRow]
    sweep: list[SweepSection]
    warnings: list[Evidence]
    config: ConfigSection
    checkpoint: CheckpointSection
    timing: Mapping[str, float]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object.

        Raises:
            AssertionError: a number is not finite, or a null has no reason: a fault of ours.
        """
        content = {"schema": SCHEMA, **asdict(self)}
        fall = content["what_if"]["fall"]
        records = (
            *(content["first_order"], content["needed"], content["noise"]),
            *(content["adamw"], *content["adamw"]["parts"].values()),
            *content["targets"],
            *content["what_if"]["rows"],
            *([] if fall is None else [fall]),
            *content["realized"],
            *content["sweep"],
            *([] if content["folds"] is None else [content["folds"]]),
        )
        check_content(content, records)
        return content


def check_content(content: Mapping[str, Any], explained: Iterable[Mapping[str, Any]]) -> None:
    """Every number of a report is finite, and every null of the records ``explained`` has its reason in ``null_reasons``.

    Raises:
        AssertionError: not so: a fault of ours.
    """
    for record in explained:
        for name, value in record.items():
            assert value is not None or name in record["null_reasons"], f"{name} is null without a reason"
    _assert_finite(content, "report")


def _assert_finite(value: Any, where: str) -> None:
    if isinstance(value, float):
        assert math.isfinite(value), f"{where} is {value}"
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _assert_finite(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _assert_finite(item, f"{where}[{index}]")
