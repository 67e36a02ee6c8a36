"""Sample rollouts from a policy with ``model.generate``: the whole distribution, exact token ids, EOS kept.

generate's defaults (top_k = 50, a checkpoint's generation_config, its processors) would make S the wrong log-prob, so a
generation config of our own replaces the checkpoint's while sampling. Prompts of one length are batched together, so that
nothing is padded on the left.

Each call of generate, a job, draws from a seed of its own, so that it does not matter which rank makes it: ranks share the jobs
out, and every rank gets what one process would. Where weights are sharded (FSDP2) a forward is every rank's: calls are kept in
step, and ranks without a job left make idle ones.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList

from entropy_probe.common.progress import Progress, Silent
from entropy_probe.data.rollouts import PromptId, Rollout, SpecialIds, read_rows
from entropy_probe.errors import InputError, one_line, out_of_memory
from entropy_probe.model.digest import digest_of_model
from entropy_probe.model.policy import Policy, input_limits, special_ids
from entropy_probe.ranks.collectives import Ranks, Sharding, deal
from entropy_probe.ranks.same_inputs import check_same_inputs, digest_of_settings

Reward = Callable[[str, str, dict[str, Any]], float]
"""``f(prompt, response, row) -> float``: texts without special tokens, and the prompt's row with all its columns."""

Sample = tuple[tuple[int, ...], tuple[float, ...]]
"""A response's ids and their log-probs."""

TOKENS_TOGETHER = 1 << 19
"""Response tokens in one sum over ranks: 8 MiB."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, its text, and the row that it came from."""

    prompt_id: PromptId
    prompt_ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class SamplingSettings:
    """How to sample: G responses a prompt at temperature τ, at most ``max_new_tokens`` each.

    ``eos_ids`` end a response, and are written into its row. ``batch_size`` responses are generated at a time; it changes which
    random numbers go to which response, so the same seed gives the same rollouts only at the same batch size. Batch j, counted
    from 0 over all ranks, is drawn after ``torch.manual_seed`` of
    ``numpy.random.SeedSequence(seed, spawn_key=(j,)).generate_state(1, numpy.uint64)``:
    on any number of ranks the rollouts are the same.
    """

    responses: int
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    eos_ids: tuple[int, ...] = ()
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse values that no sampler could honour."""
        if self.responses < 2:
            raise InputError(f"{self.responses} responses a prompt; the leave-one-out mean needs at least 2")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; expected a finite number above 0")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}; expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; expected 0 to 2^63 - 1")


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
    own = _draw(policy, prompts, settings, progress)
    samples = put_together(own, len(prompts) * settings.responses, ranks)
    asked = [prompt for prompt in prompts for _ in range(settings.responses)]
    texts = ["" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in samples]
    rewards = np.zeros(len(samples))
    for row in deal([1] * len(samples), ranks.count)[ranks.rank]:
        rewards[row] = _reward(reward, asked[row], texts[row])
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


def read_prompts(path: Path, tokenizer: Any = None) -> list[Prompt]:
    """Read JSON Lines (or Parquet) with ``prompt`` (text) or ``prompt_ids``, and optionally ``prompt_id``.

    A text is tokenised with the tokenizer's own special tokens; chat templates are the caller's business. Without
    ``prompt_id`` the row's number serves.

    Raises:
        InputError: no rows, a row with neither column, an empty prompt, or text without a tokenizer.
    """
    prompts = []
    for number, (where, row) in enumerate(read_rows(path)):
        ids, text = row.get("prompt_ids"), row.get("prompt")
        if ids is None and text is None:
            raise InputError(f"{where} has neither prompt nor prompt_ids")
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: prompt is a {type(text).__name__}; expected text")
        if ids is None:
            if tokenizer is None:
                raise InputError(f"{where} gives text, but the checkpoint has no tokenizer; give prompt_ids instead")
            ids = tokenizer(text)["input_ids"]
            if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
                raise InputError(
                    f"{where}: the text begins with the tokenizer's BOS, which the tokenizer adds again; give the text without "
                    "it, or prompt_ids"
                )
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise InputError(f"{where}: prompt_ids is {ids!r}; expected a list of token ids")
        prompt_id = row.get("prompt_id", number)
        if isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int):
            raise InputError(f"{where}: prompt_id is a {type(prompt_id).__name__}; expected a string or an integer")
        if not ids:
            raise InputError(f"{where} is an empty prompt; the first response token needs a prefix")
        shown = (
            text if text is not None else "" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True)
        )
        prompts.append(Prompt(prompt_id, tuple(ids), shown, row))
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise InputError(f"{path} uses a prompt_id twice; give each prompt its own, or none")
    return prompts


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


def check_prompts(
    prompts: Sequence[Prompt], settings: SamplingSettings, vocabulary: int | None, context_length: int | None
) -> None:
    """Refuse what the model could not sample; a limit of None is not checked.

    Raises:
        InputError: a token id outside the vocabulary, or a prompt whose longest response would pass the context length.
    """
    if vocabulary is not None:
        for token in settings.eos_ids:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"end token {token} (given, or the model's own) is outside the model's vocabulary of {vocabulary}"
                )
    for prompt in prompts:
        if vocabulary is not None and max(prompt.prompt_ids) >= vocabulary:
            raise InputError(
                f"prompt_id {prompt.prompt_id!r} holds token id {max(prompt.prompt_ids)}, but the model's vocabulary has "
                f"{vocabulary}; was it made with another tokenizer?"
            )
        longest = len(prompt.prompt_ids) + settings.max_new_tokens
        if context_length is not None and longest > context_length:
            room = context_length - len(prompt.prompt_ids)
            advice = f"give max_new_tokens of at most {room}" if room > 0 else "shorten the prompt"
            raise InputError(
                f"prompt_id {prompt.prompt_id!r} has {len(prompt.prompt_ids)} tokens, with max_new_tokens "
                f"{settings.max_new_tokens} up to {longest}; the model's context holds {context_length}: {advice}"
            )


def load_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of the first folder that has one, or None.

    Raises:
        InputError: its files are damaged.
    """
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file():
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # tokenizer files are parsed by several libraries, which raise anything
                if out_of_memory(error):
                    raise
                raise InputError(
                    f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {one_line(error)}"
                ) from error
    return None


def end_tokens(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """The ids that end a response: those of the model's config, and the tokenizer's."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    return special_ids(model, SpecialIds(stop=() if own is None else (own,))).stop


def load_reward(spec: str) -> Reward:
    """The function named by ``module:function``; modules in the working directory can be imported.

    Raises:
        InputError: the name has another form, the module cannot be imported, or nothing callable is there.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise InputError(f"reward is {spec!r}; expected module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's, and runs when it is imported
        if out_of_memory(error):
            raise
        raise InputError(f"reward {spec}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    function = vars(module).get(function_name)
    if not callable(function):
        raise InputError(f"reward {spec}: {module_name} has no function {function_name}")
    reward: Reward = function
    return reward


@dataclass(frozen=True)
class Job:
    """One call of generate: ``copies`` responses, from the ``first`` on, to each of some prompts of one length.

    ``number`` counts the jobs of all ranks, ``prompts`` are indices.
    """

    number: int
    prompts: tuple[int, ...]
    first: int
    copies: int

    def rows(self, responses: int) -> list[int]:
        """The places of what it draws, in the order of its sequences, among ``responses`` to every prompt."""
        return [index * responses + self.first + copy for index in self.prompts for copy in range(self.copies)]

    def seed(self, seed: int) -> int:
        """Its own, of the settings' one: as :class:`SamplingSettings` says."""
        return int(np.random.SeedSequence(seed, spawn_key=(self.number,)).generate_state(1, np.uint64)[0])


def make_jobs(prompts: Sequence[Prompt], settings: SamplingSettings) -> list[Job]:
    """Batches of prompts of one length with a number of responses each, ``batch_size`` sequences at most."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.prompt_ids), []).append(index)
    together = max(1, settings.batch_size // settings.responses)
    found: list[Job] = []
    for indices in by_length.values():
        for start in range(0, len(indices), together):
            for first in range(0, settings.responses, settings.batch_size):
                copies = min(settings.responses - first, settings.batch_size)
                found.append(Job(len(found), tuple(indices[start : start + together]), first, copies))
    return found


def deal_jobs(
    jobs: Sequence[Job], prompts: Sequence[Prompt], settings: SamplingSettings, sharding: Sharding
) -> list[range]:
    """Consecutive jobs for every rank, level in tokens: sequences times the longest that one can get.

    Where weights are sharded, level in number: all ranks then wait for each other at every call, and one that has fewer runs as
    many.
    """
    tokens = [
        len(job.prompts) * job.copies * (len(prompts[job.prompts[0]].prompt_ids) + settings.max_new_tokens)
        for job in jobs
    ]
    return deal([1] * len(jobs) if sharding.sharded else tokens, sharding.ranks.count)


def put_together(own: Mapping[int, Sample], count: int, ranks: Ranks) -> list[Sample]:
    """All ``count`` samples, of which each rank has drawn ``own``, by row; no row is two ranks'.

    What others drew a rank adds as zeros: log-probs and ids come through bit for bit, ids below 2^53.
    """
    lengths = np.zeros(count)
    for row, (ids, _) in own.items():
        lengths[row] = len(ids)
    lengths = ranks.sum_numbers(lengths)
    found: list[Sample] = []
    for rows in _pieces([int(length) for length in lengths]):
        ends = np.cumsum(lengths[rows.start : rows.stop]).astype(int)
        values = np.zeros((2, ends[-1]))
        for row, end in zip(rows, ends, strict=True):
            if row in own:
                values[:, end - len(own[row][0]) : end] = own[row]
        values = ranks.sum_numbers(values)
        for start, end in itertools.pairwise([0, *ends]):
            found.append((tuple(int(token) for token in values[0, start:end]), tuple(values[1, start:end].tolist())))
    return found


def _pieces(lengths: Sequence[int]) -> list[range]:
    """Consecutive rows of at most ``TOKENS_TOGETHER`` tokens, or one row."""
    found: list[range] = []
    held = 0
    for row, length in enumerate(lengths):
        if not found or held + length > TOKENS_TOGETHER:
            found.append(range(row, row))
            held = 0
        found[-1] = range(found[-1].start, row + 1)
        held += length
    return found


def _draw(
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


def _reward(reward: Reward, prompt: Prompt, text: str) -> float:
    try:
        value = reward(prompt.text, text, dict(prompt.row))
    except Exception as error:  # the function is the user's
        if out_of_memory(error):
            raise
        raise InputError(
            f"the reward of prompt_id {prompt.prompt_id!r} raised {type(error).__name__}: {error}"
        ) from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the reward of prompt_id {prompt.prompt_id!r} is {value!r}; expected a number") from error
    if number != number or abs(number) == float("inf"):
        raise InputError(f"the reward of prompt_id {prompt.prompt_id!r} is {number}; expected a finite number")
    return number
