"""Responses drawn from the policy's whole distribution, with the log-probs of what was drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList

from entropy_probe.common.progress import Progress
from entropy_probe.model.policy import Policy
from entropy_probe.sampling.jobs import Sample, deal_jobs, make_jobs
from entropy_probe.sampling.prompts import Prompt
from entropy_probe.sampling.settings import SamplingSettings


def draw(
    policy: Policy, prompts: Sequence[Prompt], settings: SamplingSettings, progress: Progress
) -> dict[int, Sample]:
    """What this rank draws, by row: its jobs, and idle calls of generate where others have more and need its forwards."""
    ranks, model = policy.sharding.ranks, policy.model
    synced = policy.sharding.sharded and ranks.count > 1
    if synced and dist.get_world_size() != ranks.count:
        # generate asks the whole group whether all have finished.
        raise ValueError(f"sampling over {ranks.count} sharded ranks needs a process group of as many")
    jobs = make_jobs(prompts, settings)
    shares = deal_jobs(jobs, prompts, settings, policy.sharding)
    own = [jobs[number] for number in shares[ranks.rank]]
    found: dict[int, Sample] = {}
    with (
        # Named, since a process that sees several GPUs is warned otherwise.
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.random.fork_rng(devices=range(torch.xpu.device_count()), device_type="xpu"),
        torch.no_grad(),
        policy.arithmetic(),
        _own_generation_config(model, settings),
        _weights_of_the_root(model),
    ):
        for job in progress.track(own, "sampling", len(own)):
            torch.manual_seed(job.seed(settings.seed))
            ids = [prompts[index].prompt_ids for index in job.prompts for _ in range(job.copies)]
            drawn = _generate(policy, torch.tensor(ids, device=policy.device), settings, synced=synced)
            found.update(zip(job.rows(settings.responses), drawn, strict=True))
        for _ in range(max(map(len, shares)) - len(own) if synced else 0):
            one_token = torch.tensor([prompts[0].prompt_ids[:1]], device=policy.device)
            # Done at once, and not in the way: its further forwards are as many as another rank's tokens.
            _generate(policy, one_token, settings, synced=True, max_new_tokens=1)
    return found


@contextmanager
def _weights_of_the_root(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 gather the root's own weights where generate does not go through the root's forward, as a PeftModel's does."""
    if not isinstance(model, FSDPModule) or isinstance(model, GenerationMixin):
        yield
        return
    own = vars(model).get("generate")
    register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        if own is None:
            del vars(model)["generate"]
        else:
            vars(model)["generate"] = own


@contextmanager
def _own_generation_config(model: nn.Module, settings: SamplingSettings) -> Iterator[None]:
    """Replace the config of every module that can generate: behind a plain PeftModel it is the inner model's that counts."""
    own = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(settings.eos_ids) or None,
        # Only fills the places after a response's end, which are cut off again.
        pad_token_id=settings.eos_ids[0] if settings.eos_ids else 0,
        use_cache=True,
    )
    originals = [
        (module, vars(module)["generation_config"]) for module in model.modules() if "generation_config" in vars(module)
    ]
    try:
        for module, _ in originals:
            vars(module)["generation_config"] = own
        yield
    finally:
        for module, original in originals:
            vars(module)["generation_config"] = original


class _DrawnLogProbs(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Stops nothing: keeps log π of every token as it is drawn, and frees the step's scores.

    generate keeps the scores of all steps, [n, V] each: 10 GB for 64 responses of 256 tokens from a vocabulary of 152,000.
    They are what was sampled from, after every processor; a processor of ours would not see that: generate puts warpers behind.
    """

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        """[n] of every step."""

    def __call__(self, input_ids: Tensor, scores: Sequence[Tensor], **_: Any) -> Tensor:
        """Told after every draw, with the drawn tokens last in ``input_ids``; no sequence is done."""
        last = scores[-1]
        wide = last if last.dtype == torch.float64 else last.float()
        self.steps.append(torch.log_softmax(wide, dim=-1).gather(1, input_ids[:, -1:])[:, 0])
        last.untyped_storage().resize_(0)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(
    policy: Policy, input_ids: Tensor, settings: SamplingSettings, *, synced: bool, **limits: int
) -> list[Sample]:
    """A response to each prompt of ``input_ids``, all of one length.

    Args:
        policy: its generation config is ours.
        input_ids: [n, T].
        settings: what ends a response.
        synced: whether forwards go on until every rank of the process group has finished.
        limits: what is different from the generation config.
    """
    model: Any = policy.model
    drawn = _DrawnLogProbs()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        return_dict_in_generate=True,
        output_scores=True,
        stopping_criteria=StoppingCriteriaList([drawn]),
        synced_gpus=synced,
        **limits,
    )
    responses = output.sequences[:, input_ids.shape[1] :]
    logprobs = torch.stack(drawn.steps, dim=1)
    found = []
    for ids, values in zip(responses.tolist(), logprobs.tolist(), strict=True):
        length = next((t + 1 for t, token in enumerate(ids) if token in settings.eos_ids), len(ids))
        found.append((tuple(ids[:length]), tuple(values[:length])))
    return found
