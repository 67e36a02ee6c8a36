"""Sample rollouts from a policy with ``model.generate``: the whole distribution, exact token ids, EOS kept.

generate's defaults (top_k = 50, a checkpoint's generation_config, its processors) would make S the wrong log-prob, so a
generation config of our own replaces the checkpoint's while sampling. Prompts of one length are batched together, so that
nothing is padded on the left.

Each call of generate, a job, draws from a seed of its own, so that it does not matter which rank makes it: ranks share the jobs
out, and every rank gets what one process would. Where weights are sharded (FSDP2) a forward is every rank's: calls are kept in
step, and ranks without a job left make idle ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import Rollout
from entropy_probe.model.digest import digest_of_model
from entropy_probe.model.input_limits import input_limits
from entropy_probe.model.policy import Policy
from entropy_probe.ranks.dealing import deal
from entropy_probe.ranks.same_inputs import check_same_inputs, digest_of_settings
from entropy_probe.sampling.generation import draw
from entropy_probe.sampling.jobs import put_together
from entropy_probe.sampling.prompts import Prompt, check_prompts
from entropy_probe.sampling.rewards import Reward, reward_of
from entropy_probe.sampling.settings import SamplingSettings


def sample_rollouts(
    policy: Policy,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    reward: Reward,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> list[Rollout]:
    """G responses to every prompt, prompt by prompt, with the sampler's log-probs and rewards.

    The ranks of ``policy.sharding`` share the generation out, then the rewards: ``reward`` is called once a response, on one
    rank, so a slow one is divided and a random one gives all ranks the same number. Each rank gets all rollouts: every rank
    must call it.

    The global random state is put back afterwards. ``tokenizer`` only decodes text for the reward and for people; without
    one, texts are empty. ``progress`` is told of this rank's calls of generate.

    Raises:
        InputError: the model cannot hold a prompt (:func:`check_prompts`), or the reward raises or returns no finite number.
        ValueError: weights are sharded over some of the process group alone.
    """
    progress = progress if progress is not None else Silent()
    ranks = policy.sharding.ranks
    check_prompts(prompts, settings, *input_limits(policy.model))
    own = draw(policy, prompts, settings, progress)
    samples = put_together(own, len(prompts) * settings.responses, ranks)
    asked = [prompt for prompt in prompts for _ in range(settings.responses)]
    texts = ["" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in samples]
    rewards = np.zeros(len(samples))
    for row in deal([1] * len(samples), ranks.count)[ranks.rank]:
        rewards[row] = reward_of(reward, asked[row], texts[row])
    rewards = ranks.sum_numbers(rewards)
    return [
        Rollout(
            prompt_id=prompt.prompt_id,
            prompt_ids=prompt.prompt_ids,
            response_ids=ids,
            reward=value,
            logprobs=logprobs,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            cut=ids[-1] not in settings.eos_ids,
            eos_ids=settings.eos_ids,
            prompt=prompt.text or None,
            response=text or None,
        )
        for prompt, (ids, logprobs), text, value in zip(asked, samples, texts, rewards.tolist(), strict=True)
    ]


def check_same_sampling(policy: Policy, prompts: Sequence[Prompt], settings: SamplingSettings) -> None:
    """Refuse to share out a generation of which ranks were given different parts; every rank must call it.

    Raises:
        InputError: which part, and on which ranks.
    """
    if policy.sharding.ranks.count == 1:
        return
    parts = {"prompts": digest_of_settings(prompts), "settings": digest_of_settings(settings)}
    if policy.sharding.replicated:
        parts["weights"] = digest_of_model(policy.model)
    check_same_inputs(policy.sharding.ranks, parts)
