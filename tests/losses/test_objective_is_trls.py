"""Every objective's token weights against autograd through TRL's own loss functions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from entropy_probe.losses.cispo import CISPO
from entropy_probe.losses.corrections import Correction, CorrectionMode
from entropy_probe.losses.kl import KLTerm
from entropy_probe.losses.objective import EntropyBonus, Objective, TokenWeights
from entropy_probe.losses.ppo_clip import PPOClip
from entropy_probe.losses.rloo import RLOO
from entropy_probe.losses.rows import LossRows
from entropy_probe.losses.sapo import SAPO
from entropy_probe.losses.token_loss import RatioLevel
from entropy_probe.losses.vespo import VESPO
from loss_rows import LENGTHS, rows_of
from trl_loss import CASES, MAX_LENGTH, TOKEN_MASK, TRLCase, rloo_gradient, trls_gradients

TOLERANCE = 1e-12
OF_RESPONSES = RatioLevel.SEQUENCE
OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(PPOClip()),
    "bnpo": Objective(PPOClip()),
    "dr_grpo": Objective(PPOClip()),
    "dapo": Objective(PPOClip(0.2, 0.28)),
    "delta": Objective(PPOClip(delta=1.5)),
    "gspo": Objective(PPOClip(3e-2, 4e-2, level=OF_RESPONSES)),
    "luspo": Objective(PPOClip(level=OF_RESPONSES)),
    "luspo-token": Objective(PPOClip()),
    "cispo": Objective(CISPO(1.2)),
    "sapo": Objective(SAPO()),
    "vespo": Objective(VESPO()),
    "vespo-vllm": Objective(VESPO(correction=TOKEN_MASK)),
    "kl": Objective(PPOClip(), kl=KLTerm(0.04)),
    "kl-corrected": Objective(PPOClip(), kl=KLTerm(0.04, bias_correction=True)),
    "kl-corrected-sequence": Objective(
        PPOClip(level=OF_RESPONSES), kl=KLTerm(0.04, bias_correction=True, level=OF_RESPONSES)
    ),
    "entropy-quantile": Objective(PPOClip(), top_entropy_quantile=0.3),
    "bonus": Objective(PPOClip(), bonus=EntropyBonus(0.01)),
    "bonus-quantile": Objective(PPOClip(), top_entropy_quantile=0.4, bonus=EntropyBonus(0.02)),
    "off-policy-mask": Objective(PPOClip(), off_policy_threshold=0.05),
    **{f"vllm-{mode}": Objective(PPOClip(), correction=Correction(mode, 0.5, 1.6)) for mode in CorrectionMode},
    "all": Objective(
        PPOClip(),
        correction=Correction(CorrectionMode.SEQUENCE_TRUNCATE, 0.5, 1.6),
        top_entropy_quantile=0.5,
        off_policy_threshold=0.05,
        kl=KLTerm(0.1, bias_correction=True),
        bonus=EntropyBonus(0.01),
    ),
}


def average_of(loss_type: str, rows: LossRows) -> Tensor:
    """The weight of a token in TRL's mean: one accumulation step, one micro-batch."""
    if loss_type in ("grpo", "sapo"):
        return rows.at_tokens(1.0 / (rows.counts * len(LENGTHS)))
    if loss_type == "dr_grpo":
        return torch.full_like(rows.log_probs, 1.0 / (len(LENGTHS) * MAX_LENGTH))
    if loss_type == "luspo":
        return torch.full_like(rows.log_probs, 1.0 / len(LENGTHS))
    return torch.full_like(rows.log_probs, 1.0 / float(rows.mask.sum()))


def ours(case: TRLCase, rows: LossRows, objective: Objective) -> TokenWeights:
    return objective.token_weights(rows, average_of(case.loss_type, rows))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [0, 1])
def test_token_weights_are_those_of_trls_own_loss(case: TRLCase, seed: int) -> None:
    rows = rows_of(seed)
    on_log_probs, on_entropies = trls_gradients(case, rows)
    found = ours(case, rows, OBJECTIVES[case.name])
    scale = float(on_log_probs.abs().max())
    assert scale > 0
    assert float((found.on_log_probs - on_log_probs).abs().max()) <= TOLERANCE * scale
    if found.bonus is None:
        assert not on_entropies.any()
    else:
        assert float((found.bonus - on_entropies).abs().max()) <= TOLERANCE * float(on_entropies.abs().max())


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("vespo", "luspo")], ids=lambda case: case.name)
def test_the_comparison_sees_a_loss_without_its_clip_or_its_term(case: TRLCase) -> None:
    """A plain ratio in place of each objective's own formula is told apart from TRL's."""
    rows = rows_of(0)
    on_log_probs, on_entropies = trls_gradients(case, rows)
    found = ours(case, rows, Objective(PPOClip(1e9, 1e9)))
    gap = (found.on_log_probs - on_log_probs).abs().max() + on_entropies.abs().max()
    assert float(gap) > 1e-3 * float(on_log_probs.abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo_is_trls(seed: int) -> None:
    rows = rows_of(seed, spread=0.15, masked=False)
    expected = rloo_gradient(rows)
    found = Objective(RLOO()).token_weights(rows, average_of("grpo", rows)).reward
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
