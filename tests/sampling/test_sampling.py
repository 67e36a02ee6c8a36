"""Sampling draws from the policy's whole distribution: its log-probs are those that teacher forcing finds afterwards."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from entropy_probe import InputError, Rollout, read_rollouts
from entropy_probe.checkpoints import load_model
from entropy_probe.model.policy import Policy
from entropy_probe.sampling import generation
from entropy_probe.sampling.drawing import sample_rollouts
from entropy_probe.sampling.prompts import Prompt, read_prompts
from entropy_probe.sampling.rewards import load_reward
from entropy_probe.sampling.settings import SamplingSettings
from entropy_probe.sampling.tokenizer import end_tokens, load_tokenizer
from support import CONFIGS, lora_model, run_command, save_checkpoint, trained_optimizer

WORDS = 200
"""More than generate's default top_k = 50, so that it would show."""
EOS = 1


def wide_model(family: str = "llama-tied", *, dtype: torch.dtype = torch.float32, std: float = 0.2) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.vocab_size = WORDS
    config.initializer_range = std
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def prompts_of_lengths(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    drawn = [tuple(torch.randint(3, WORDS, (length,), generator=generator).tolist()) for length in lengths]
    return [Prompt(f"p{n}", ids, f"text {n}", {"number": n}) for n, ids in enumerate(drawn)]


def no_reward(prompt: str, response: str, row: dict[str, Any]) -> float:
    return 0.0


def draw(model: Any, prompts: Sequence[Prompt], responses: int = 6, **settings: Any) -> list[Rollout]:
    chosen = SamplingSettings(**{"responses": responses, "max_new_tokens": 8, "eos_ids": (EOS,)} | settings)
    return sample_rollouts(Policy(model, chosen.temperature), prompts, chosen, no_reward)


def worst_gap(model: Any, rollouts: Sequence[Rollout], temperature: float) -> float:
    """The largest |Σ sampler's log-probs − teacher-forced S| of a response."""
    scores = Policy(model, temperature).scores(rollouts).tolist()
    return max(abs(sum(r.logprobs or ()) - s) for r, s in zip(rollouts, scores, strict=True))


# Log-probs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen2", "opt", "gemma2"])
def test_the_samplers_log_probs_are_the_teacher_forced_ones(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = wide_model(family, dtype=dtype)
    model.train()
    rollouts = draw(model, prompts_of_lengths(3, 1, 5, 3), temperature=0.8, max_new_tokens=12)
    assert all(len(r.logprobs or ()) == len(r.response_ids) for r in rollouts)
    assert worst_gap(model, rollouts, 0.8) < tolerance
    assert all(module.training for module in model.modules())
    # At another temperature, or for another policy, they are not.
    assert worst_gap(model, rollouts, 1.0) > 0.1
    assert worst_gap(wide_model(family, dtype=dtype, std=0.1), rollouts, 0.8) > 0.1


def test_no_more_than_a_steps_logits_stand_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever would keep them: at every forward but the first few tensors of n by V values are alive."""
    model = wide_model()
    alive: list[int] = []

    def count(*_: Any) -> None:
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        alive.append(sum(t.untyped_storage().nbytes() >= 12 * WORDS * 4 for t in tensors if t.shape == (12, WORDS)))

    model.register_forward_pre_hook(count)
    draw(model, prompts_of_lengths(3, 3), max_new_tokens=20, eos_ids=(), batch_size=12)
    assert len(alive) == 20
    assert max(alive) <= 3
    # Planted: the scores of all steps kept.
    alive.clear()
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda *_: None)
    draw(model, prompts_of_lengths(3, 3), max_new_tokens=20, eos_ids=(), batch_size=12)
    assert max(alive) >= 19


def test_a_checkpoints_generation_config_is_ignored(tmp_path: Path) -> None:
    model = wide_model()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=5, top_p=0.5, temperature=0.3, repetition_penalty=1.5, min_new_tokens=7, num_beams=2,
        no_repeat_ngram_size=2, eos_token_id=EOS, suppress_tokens=[7, 8, 9], max_new_tokens=3,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path).model
    assert loaded.generation_config.top_k == 5
    assert loaded.generation_config.repetition_penalty == 1.5
    stored = loaded.generation_config.to_dict()
    rollouts = draw(loaded, prompts_of_lengths(2, 4), 200, batch_size=400)
    assert worst_gap(loaded, rollouts, 1.0) < 1e-5
    tokens = Counter(token for r in rollouts for token in r.response_ids)
    assert len(tokens) > 150
    assert {7, 8, 9} & set(tokens)
    assert max(len(r.response_ids) for r in rollouts) == 8
    assert any(len(r.response_ids) < 7 for r in rollouts)
    assert all(r.top_k == 0 and r.top_p == 1.0 and r.temperature == 1.0 for r in rollouts)
    assert loaded.generation_config.to_dict() == stored


def first_token_p_value(model: Any, temperature: float, seed: int = 0) -> float:
    """Chi-square of 6000 first tokens against softmax(logits / τ), tokens expected under five times pooled."""
    (prompt,) = prompts_of_lengths(4)
    rollouts = draw(model, [prompt], 6000, batch_size=3000, max_new_tokens=1, temperature=temperature, seed=seed)
    counts = np.bincount([r.response_ids[0] for r in rollouts], minlength=WORDS)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.prompt_ids])).logits[0, -1].double()
    expected = 6000 * torch.softmax(logits / temperature, -1).numpy()
    common = expected >= 5
    assert common.sum() > 60, "the test needs a distribution wider than 50 tokens"
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_first_tokens_come_as_often_as_the_softmax_at_the_stated_temperature_says(temperature: float) -> None:
    assert first_token_p_value(wide_model(), temperature) > 1e-3


@pytest.mark.parametrize(
    "change", [{"top_k": 50}, {"top_k": None}, {"top_p": 0.9}, {"temperature": 1.2}, {"repetition_penalty": 1.5}]
)
def test_planted_truncated_or_warped_sampling_fails_the_frequencies_and_the_log_probs(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(**settings: Any) -> GenerationConfig:
        return GenerationConfig(**(settings | change))

    monkeypatch.setattr(generation, "GenerationConfig", planted)
    model = wide_model()
    if "repetition_penalty" not in change:
        assert first_token_p_value(model, 1.0) < 1e-6
    assert worst_gap(model, draw(model, prompts_of_lengths(4)), 1.0) > 1e-2


# Ends


def test_the_end_token_is_kept_and_cut_says_whether_one_came(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = draw(wide_model(std=0.3), prompts_of_lengths(2, 3), 100, max_new_tokens=30, eos_ids=(EOS, 17, 40))
    ended = [r for r in rollouts if not r.cut]
    cut = [r for r in rollouts if r.cut]
    assert len(ended) > 20
    assert len(cut) > 20
    assert len({r.response_ids[-1] for r in ended}) > 1
    for r in ended:
        assert r.response_ids[-1] in {EOS, 17, 40}
        assert not {EOS, 17, 40} & set(r.response_ids[:-1])
        assert len(r.response_ids) <= 30
    for r in cut:
        assert len(r.response_ids) == 30
        assert not {EOS, 17, 40} & set(r.response_ids)


def test_without_an_end_token_every_response_runs_to_the_limit_and_is_cut() -> None:
    rollouts = draw(wide_model(), prompts_of_lengths(2, 3), 50, eos_ids=())
    assert {len(r.response_ids) for r in rollouts} == {8}
    assert all(r.cut for r in rollouts)
    assert any(EOS in r.response_ids[:-1] for r in draw(wide_model(), prompts_of_lengths(2), 300, eos_ids=()))


def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer() -> None:
    model = wide_model()
    assert end_tokens(model) == (EOS,)
    model.generation_config.eos_token_id = [7, EOS]  # where many chat models alone name their end of turn
    assert end_tokens(model) == (EOS, 7)
    model.config.eos_token_id = [5, 6]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer()) == (5, 6, EOS)
    model.config.eos_token_id = None
    assert end_tokens(model) == ()


# Order, numbers and repetition


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_every_prompt_gets_exactly_g_responses_in_the_order_of_the_file(batch_size: int) -> None:
    prompts = prompts_of_lengths(3, 1, 3, 2, 1, 3)
    model = wide_model()
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    rollouts = draw(model, prompts, 5, batch_size=batch_size)
    assert max(sizes) <= max(batch_size, 1)
    assert [r.prompt_id for r in rollouts] == [p.prompt_id for p in prompts for _ in range(5)]
    assert all(r.prompt_ids == prompts[int(str(r.prompt_id)[1:])].prompt_ids for r in rollouts)
    # Each response was drawn after its own prompt: under another prompt its log-probs would differ.
    assert worst_gap(model, rollouts, 1.0) < 1e-5
    assert len({r.response_ids for r in rollouts}) > 25


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others() -> None:
    model, prompts = wide_model(), prompts_of_lengths(3, 1, 2)
    first = draw(model, prompts, seed=5)
    torch.manual_seed(99)
    assert draw(model, prompts, seed=5) == first
    other = draw(model, prompts, seed=6)
    assert [r.response_ids for r in other] != [r.response_ids for r in first]


# Nothing is left behind


def assert_untouched(model: Any, attempt: Any) -> None:
    generation = model.generation_config
    before_config, before_random = generation.to_dict(), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    attempt()
    assert model.generation_config is generation
    assert generation.to_dict() == before_config
    assert torch.equal(torch.get_rng_state(), before_random)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "full": lambda inner: inner,
    "adapter": lora_model,
    "causal-lm-adapter": lambda inner: causal_lm_adapter(inner),
    "adapter-with-a-config-of-its-own": lambda inner: causal_lm_adapter(inner, GenerationConfig(top_k=5)),
}


def causal_lm_adapter(inner: Any, config: GenerationConfig | None = None) -> Any:
    """The wrapper that TRL makes, which hands its generation config on to the model inside."""
    adapted = get_peft_model(
        inner,
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    if config is not None:
        adapted.generation_config = config
    return adapted


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sampling_leaves_the_model_and_the_random_state_as_they_were(wrapper: str) -> None:
    inner = wide_model()
    inner.generation_config = GenerationConfig(top_k=5, do_sample=True, max_new_tokens=3)
    inner_config = inner.generation_config
    model = WRAPPERS[wrapper](inner)
    torch.manual_seed(3)
    assert_untouched(model, lambda: draw(model, prompts_of_lengths(2, 3)))
    assert inner.generation_config is inner_config
    assert inner_config.top_k == 5


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_whatever_wraps_the_model_its_whole_distribution_is_drawn_from(wrapper: str) -> None:
    inner = wide_model()
    inner.generation_config = GenerationConfig(top_k=5, do_sample=True, max_new_tokens=3)
    model = WRAPPERS[wrapper](inner)
    rollouts = draw(model, prompts_of_lengths(2, 3), 200, batch_size=400)
    assert worst_gap(model, rollouts, 1.0) < 1e-5
    assert len({token for r in rollouts for token in r.response_ids}) > 150
    assert max(len(r.response_ids) for r in rollouts) == 8
    assert first_token_p_value(model, 1.0) > 1e-3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_reward_leaves_the_model_and_the_random_state_as_they_were(error: type[BaseException]) -> None:
    model = wide_model()

    def failing(prompt: str, response: str, row: dict[str, Any]) -> float:
        raise error("in the reward")

    def attempt() -> None:
        expected = KeyboardInterrupt if error is KeyboardInterrupt else InputError
        with pytest.raises(expected, match="in the reward"):
            sample_rollouts(Policy(model), prompts_of_lengths(2), SamplingSettings(2, max_new_tokens=3), failing)

    assert_untouched(model, attempt)


def test_a_failing_generation_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = wide_model()
    calls = 0

    def third(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(third)

    def attempt() -> None:
        with pytest.raises(KeyboardInterrupt):
            draw(model, prompts_of_lengths(2, 3))

    assert_untouched(model, attempt)


# Rewards, prompts and texts


def tokenizer() -> Any:
    symbols = ["<pad>", "<eos>", *(chr(0x4E00 + n) for n in range(WORDS - 2))]
    words = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(0x4E00 + token - 2) for token in ids if token > EOS)


def test_the_reward_gets_the_prompt_the_response_without_special_tokens_and_the_whole_row() -> None:
    received: list[tuple[str, str, dict[str, Any]]] = []

    def reward(prompt: str, response: str, row: dict[str, Any]) -> float:
        received.append((prompt, response, dict(row)))
        row.clear()
        return len(response)

    prompts = [replace(p, row={"answer": "102", "number": n}) for n, p in enumerate(prompts_of_lengths(2, 3))]
    settings = SamplingSettings(20, max_new_tokens=40, eos_ids=(EOS,))
    rollouts = sample_rollouts(Policy(wide_model(std=0.3)), prompts, settings, reward, tokenizer())
    assert len(received) == len(rollouts) == 40
    assert any(EOS in r.response_ids for r in rollouts)
    for index, ((prompt, response, row), rollout) in enumerate(zip(received, rollouts, strict=True)):
        assert prompt == f"text {index // 20}"
        assert row == {"answer": "102", "number": index // 20}
        assert response == letters(rollout.response_ids) == (rollout.response or "")
        assert rollout.reward == float(len(response))
        assert rollout.prompt == prompt


def test_prompts_are_tokenised_or_taken_as_ids_and_numbered_where_they_have_no_id(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": letters([5, 6]), "answer": 1},
        {"prompt_ids": [7, 8, 9], "prompt_id": "mine"},
        {"prompt_ids": [4]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path, tokenizer())
    assert [p.prompt_ids for p in found] == [(5, 6), (7, 8, 9), (4,)]
    assert [p.prompt_id for p in found] == [0, "mine", 2]
    assert [p.text for p in found] == [letters([5, 6]), letters([7, 8, 9]), letters([4])]
    assert found[0].row == rows[0]
    with pytest.raises(InputError, match="line 1 gives text, but the checkpoint has no tokenizer"):
        read_prompts(path)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.content }}{% if not loop.last or m.role != 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ opening or '' }}{% endif %}"
)


def test_messages_are_tokenised_by_the_tokenizers_chat_template(tmp_path: Path) -> None:
    path, chat = tmp_path / "prompts.jsonl", tokenizer()
    chat.chat_template = TEMPLATE
    system, user, assistant = (
        {"role": role, "content": letters([token, token + 1])}
        for role, token in (("system", 5), ("user", 7), ("assistant", 9))
    )
    rows: list[dict[str, Any]] = [
        {"messages": [system, user]},
        {"messages": [user], "chat_template_kwargs": {"opening": letters([12])}},
        {"messages": [user, assistant]},
        {"messages": [user], "prompt_ids": [4, 4]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(path, chat)
    assert [p.prompt_ids for p in found] == [
        (5, 6, EOS, 7, 8, EOS),
        (7, 8, EOS, 12),
        (7, 8, EOS, 9, 10),  # the assistant's turn is gone on with
        (4, 4),
    ]
    assert found[0].text == letters([5, 6, 7, 8])
    assert found[0].row == rows[0]


BAD_MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "line 1 has prompt and messages"),
    "no-list": ({"messages": "hello"}, "line 1: messages is 'hello'; expected a list"),
    "empty": ({"messages": []}, "expected a list of mappings with role and content"),
    "no-role": ({"messages": [{"content": "x"}]}, "expected a list of mappings with role and content"),
    "refused": ({"messages": [{"role": "tool", "content": "x"}]}, "does not take these messages.*no tools here"),
    "no-mapping": (
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": 3},
        "chat_template_kwargs is a int",
    ),
    "in-prompt": ({"prompt": [{"role": "user", "content": "x"}]}, "a conversation is called messages"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_messages_that_are_none_are_refused(case: str, tmp_path: Path) -> None:
    row, said = BAD_MESSAGES[case]
    chat = tokenizer()
    chat.chat_template = TEMPLATE
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=said):
        read_prompts(path, chat)


def test_messages_need_a_tokenizer_with_a_template(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    with pytest.raises(InputError, match="line 1 gives messages, but the checkpoint has no tokenizer"):
        read_prompts(path)
    with pytest.raises(InputError, match="tokenizer has no chat template; give prompt_ids"):
        read_prompts(path, tokenizer())


def test_a_prompt_and_its_longest_response_may_fill_the_context_but_not_pass_it() -> None:
    model = wide_model()
    context = model.config.max_position_embeddings
    prompts = prompts_of_lengths(4)
    full = draw(model, prompts, 2, max_new_tokens=context - 4, eos_ids=())
    assert len(full[0].response_ids) + 4 == context
    with pytest.raises(InputError, match=f"'p0' has 4 tokens.* at most {context - 4}"):
        draw(model, prompts, 2, max_new_tokens=context - 3)
    outside = replace(prompts[0], prompt_ids=(3, WORDS))
    with pytest.raises(InputError, match=f"'p0' holds token id {WORDS}"):
        draw(model, [outside], 2)


def test_a_reward_is_found_in_the_working_folder_and_the_import_path_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards_here.py").write_text("def length(prompt, response, row):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = list(sys.path)
    try:
        assert load_reward("my_rewards_here:length")("", "abc", {}) == 3.0
        assert sys.path == before
        with pytest.raises(InputError, match="no function width"):
            load_reward("my_rewards_here:width")
    finally:
        sys.modules.pop("my_rewards_here", None)


# The command


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkpoint with a tokenizer, prompts as text, and a module of rewards in the working folder."""
    model = wide_model()
    model.generation_config.top_k = 5
    model.generation_config.do_sample = True
    save_checkpoint(model, trained_optimizer(model, vocabulary=WORDS), tmp_path / "checkpoint-3")
    tokenizer().save_pretrained(tmp_path / "checkpoint-3")
    rows = [{"prompt_id": f"q{n}", "prompt": letters(range(5 + n, 7 + n + n % 3)), "want": n % 2} for n in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "studio_rewards.py").write_text(
        "def parity(prompt, response, row):\n    return float(sum(map(ord, response)) % 2 == row['want'])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("studio_rewards", None)


@pytest.mark.parametrize("out", ["rollouts.jsonl", "rollouts.parquet"])
def test_the_command_samples_a_file_that_run_accepts(out: str, studio: Path) -> None:
    command = [
        "sample", "checkpoint-3", "--prompts", "prompts.jsonl", "--reward", "studio_rewards:parity", "--responses", "4",
        "--max-new-tokens", "10", "--temperature", "0.9", "--seed", "3",
    ]  # fmt: skip
    outcome = run_command(*command, "--out", out)
    assert outcome.code == 0, outcome.err
    assert not outcome.lines
    assert "20 responses" in outcome.out
    rollouts = read_rollouts(studio / out)
    assert [r.prompt_id for r in rollouts] == [f"q{n}" for n in range(5) for _ in range(4)]
    for r in rollouts:
        assert r.temperature == 0.9
        assert r.prompt == letters(r.prompt_ids)
        assert r.reward == float(sum(map(ord, r.response or "")) % 2 == int(str(r.prompt_id)[1:]) % 2)
    folder = load_model(studio / "checkpoint-3")
    assert worst_gap(folder.model, rollouts, 0.9) < 1e-5
    assert load_tokenizer(folder.tokenizer_folders) is not None

    again = run_command(*command, "--out", f"again-{out}")
    assert again.code == 0
    assert read_rollouts(studio / f"again-{out}") == rollouts

    accepted = run_command("run", "checkpoint-3", "--rollouts", out, "--json", "report.json")
    assert accepted.code == 0, accepted.err
    report = json.loads((studio / "report.json").read_text())
    assert report["config"]["temperature"] == 0.9
    assert report["units"]["prompts"] == 5
    assert report["units"]["responses"] == 20
    assert "off_policy" not in {warning["code"] for warning in report["warnings"]}


def test_a_text_whose_bos_the_tokenizer_would_add_again_is_refused(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    words.bos_token = "<eos>"
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": chr(0x4E05)}) + "\n")
    assert read_prompts(path, words)[0].prompt_ids[0] == EOS
    path.write_text(json.dumps({"prompt": "<eos>" + chr(0x4E05)}) + "\n")
    with pytest.raises(InputError, match="BOS"):
        read_prompts(path, words)
