"""What generation uses, not what the trainer's arguments say: whatever bends the distribution is refused by field and value."""

from __future__ import annotations

from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import GenerationMixin, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration

from entropy_probe.data.rollouts.columns import SAMPLING
from entropy_probe.errors import InputError
from entropy_probe.integrations.trl import RolloutRecorder
from entropy_probe.integrations.trl.sampling import NEUTRAL, VLLM_NEUTRAL, neutral_sampling
from trl_training import EOS, MAX_LENGTH, NEUTRAL_COLUMNS, SYMBOLS, TEMPERATURE, make_trainer


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_trainer(tmp_path_factory.mktemp("idle"))


def test_top_k_none_is_fifty_of_transformers_and_refused_before_anything_is_written(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, top_k=None)
    assert len(SYMBOLS) < 50
    RolloutRecorder(trainer, tmp_path / "rollouts")  # fifty are all of them
    trainer.model.config.vocab_size = 51
    with pytest.raises(
        InputError, match=r"generation uses top_k = 50 \(expected: 0\).*top_k = None there means"
    ) as caught:
        RolloutRecorder(trainer, tmp_path / "rollouts")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_sample", False),
        ("temperature", 0.5),
        ("top_k", 7),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("eos_token_id", [EOS, 5]),
        ("max_new_tokens", MAX_LENGTH - 1),
        ("cache_implementation", "quantized"),
    ],
)
def test_a_field_of_the_trainers_config_that_bends_is_refused(
    idle: Any, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    monkeypatch.setattr(idle.generation_config, field, value)
    with pytest.raises(InputError) as caught:
        neutral_sampling(idle)
    assert f"generation uses {field} = {value!r} (expected: " in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("typical_p", 0.9),
        ("epsilon_cutoff", 3e-4),
        ("min_new_tokens", 2),
        ("min_length", 9),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [3]),
        ("begin_suppress_tokens", [3]),
        ("bad_words_ids", [[3]]),
        ("forced_eos_token_id", EOS),
        ("exponential_decay_length_penalty", (2, 1.5)),
        ("guidance_scale", 2.0),
        ("num_beams", 2),
        ("max_time", 1.0),
        ("a_field_of_another_time", 0.5),
    ],
)
def test_a_field_that_only_the_models_own_config_sets_is_refused(
    idle: Any, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    monkeypatch.setattr(idle.model.generation_config, field, value, raising=False)
    with pytest.raises(InputError) as caught:
        neutral_sampling(idle)
    unknown = "not known here; " if field == "a_field_of_another_time" else ""
    assert f"generation uses {field} = {value!r} ({unknown}expected: " in str(caught.value)


def test_all_bent_fields_are_named_in_one_line(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle.generation_config, "top_p", 0.9)
    monkeypatch.setattr(idle.model.generation_config, "suppress_tokens", list(range(20)))
    with pytest.raises(InputError, match=r"suppress_tokens = \[0, 1, 2, 3, 4, 5, \.\.\.\] .*, top_p = 0\.9 ") as caught:
        neutral_sampling(idle)
    assert "\n" not in str(caught.value)


def test_values_that_leave_every_token_its_probability_are_neutral(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"top_k": len(SYMBOLS), "typical_p": 1.0, "suppress_tokens": [], "seed": 3, "renormalize_logits": True}
    # The trainer says 1.0 and 1.0 itself, which is what counts.
    models = {"repetition_penalty": 1.3, "top_p": 0.5, "pad_token_id": 0, "cache_implementation": "static"}
    for field, value in ours.items():
        monkeypatch.setattr(idle.generation_config, field, value, raising=False)
    for field, value in models.items():
        monkeypatch.setattr(idle.model.generation_config, field, value)
    columns = neutral_sampling(idle)
    assert {**columns, "dropout": 0} == NEUTRAL_COLUMNS
    monkeypatch.setattr(idle.generation_config, "top_k", len(SYMBOLS) - 1)
    with pytest.raises(InputError, match=f"top_k = {len(SYMBOLS) - 1} "):
        neutral_sampling(idle)


def test_what_a_setting_may_be_is_what_it_may_be_in_a_column_of_the_rows(
    idle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, neutral in SAMPLING.items():
        assert NEUTRAL[name] == neutral
        assert VLLM_NEUTRAL[name] in (neutral, neutral[1:])
    monkeypatch.setattr(idle.model.generation_config, "sequence_bias", {(3,): 0.0})
    monkeypatch.setattr(idle.model.generation_config, "suppress_tokens", ())
    neutral_sampling(idle)
    monkeypatch.setattr(idle.model.generation_config, "sequence_bias", {(3,): 0.5})
    with pytest.raises(InputError, match=r"sequence_bias = \{\(3,\): 0\.5\} \(expected: \[\]\)"):
        neutral_sampling(idle)


def test_looking_leaves_the_configs_and_the_random_state_as_they_were(idle: Any) -> None:
    before = idle.generation_config.to_dict(), idle.model.generation_config.to_dict(), torch.get_rng_state()
    own = idle.model.generation_config
    neutral_sampling(idle)
    assert (idle.generation_config.to_dict(), idle.model.generation_config.to_dict()) == before[:2]
    assert idle.model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before[2])


def test_continuous_batching_uses_the_trainers_config_as_it_is(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fills what is None there: no top-k, and nothing of the model's own config."""
    monkeypatch.setattr(idle, "use_transformers_continuous_batching", True)
    monkeypatch.setattr(idle.generation_config, "top_k", None)
    monkeypatch.setattr(idle.model.generation_config, "typical_p", 0.9)
    assert neutral_sampling(idle)["sampler"] == "transformers continuous batching"
    monkeypatch.setattr(idle.generation_config, "typical_p", 0.9)
    with pytest.raises(InputError, match=r"typical_p = 0\.9"):
        neutral_sampling(idle)


def of_its_own(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("never called")


def test_a_model_that_generates_in_a_way_of_its_own_is_refused(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(idle.model, "generate", MethodType(of_its_own, idle.model), raising=False)
        with pytest.raises(
            InputError, match=r"generate is not that of transformers \(an attribute of the object itself\)"
        ):
            neutral_sampling(idle)
    with monkeypatch.context() as patch:
        patch.setattr(type(idle.model), "_get_logits_processor", of_its_own)
        with pytest.raises(InputError, match=r"_get_logits_processor is not .*LlamaForCausalLM\)"):
            neutral_sampling(idle)
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "_sample", of_its_own)
        with pytest.raises(InputError, match=r"_sample is not .*a patch in .*test_trl_sampling\.py"):
            neutral_sampling(idle)


def test_a_transformers_without_the_private_name_is_refused(idle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(GenerationMixin, "_prepare_generation_config")
        with pytest.raises(InputError, match=r"_prepare_generation_config is not that of transformers \(missing\)"):
            neutral_sampling(idle)
    monkeypatch.delattr("trl.models.utils._override_model_generation_config")
    with pytest.raises(
        InputError, match=r"what generation uses cannot be told with TRL .*_override_model_generation_config"
    ):
        neutral_sampling(idle)


def test_a_config_that_is_changed_while_training_stops_the_run_at_the_next_generation(tmp_path: Path) -> None:
    class Change(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            model.generation_config.suppress_tokens = [4]

    trainer = make_trainer(tmp_path)
    recorder = RolloutRecorder(trainer, tmp_path / "rollouts")
    trainer.add_callback(recorder)
    trainer.add_callback(Change())
    with pytest.raises(InputError, match=r"suppress_tokens = \[4\]"):
        trainer.train()
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-00001.jsonl"]
    # Trained again, it stops before the first step.
    with pytest.raises(InputError, match=r"suppress_tokens = \[4\]"):
        trainer.train()


@pytest.fixture
def with_vllm(idle: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer as TRL leaves it with use_vllm; the engine itself is not started."""
    monkeypatch.setattr(VLLMGeneration, "_init_vllm", lambda self: None)
    told = {name: getattr(idle, name) for name in ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")}
    engine = VLLMGeneration(
        model=idle.model,
        accelerator=idle.accelerator,
        processing_class=idle.processing_class,
        max_completion_length=MAX_LENGTH,
        **told,
    )
    monkeypatch.setattr(idle, "use_vllm", True)
    monkeypatch.setattr(idle, "vllm_importance_sampling_correction", False)
    monkeypatch.setattr(idle, "vllm_generation", engine, raising=False)
    monkeypatch.delattr(idle, "generation_config")  # a trainer with vLLM has none
    return idle


def test_what_vllm_is_told_is_recorded_where_neutral(with_vllm: Any, tmp_path: Path) -> None:
    with_vllm.model.generation_config.typical_p = 0.9  # vLLM does not look at it
    try:
        RolloutRecorder(with_vllm, tmp_path / "rollouts")
        assert neutral_sampling(with_vllm)["sampler"] == "vllm"
    finally:
        with_vllm.model.generation_config.typical_p = None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", TEMPERATURE / 2),
        ("top_k", None),
        ("top_k", 5),
        ("min_p", 0.1),
        ("top_p", 0.9),
        ("top_p", None),
        ("repetition_penalty", 1.1),
        ("max_tokens", MAX_LENGTH - 1),
        ("presence_penalty", 0.5),
        ("min_tokens", 2),
        ("ignore_eos", True),
        ("logit_bias", {3: 1.0}),
        ("structured_outputs", {"regex": "a*"}),
        ("seed", 7),
        ("a_field_of_another_time", 1),
    ],
)
def test_what_vllm_is_told_that_bends_is_refused(
    with_vllm: Any, monkeypatch: pytest.MonkeyPatch, field: str, value: object
) -> None:
    monkeypatch.setitem(with_vllm.vllm_generation.generation_kwargs, field, value)
    with pytest.raises(InputError) as caught:
        neutral_sampling(with_vllm)
    assert f"vLLM is told {field} = {value!r} (expected: " in str(caught.value)


def test_structured_outputs_and_another_engine_are_refused(with_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(with_vllm.vllm_generation, "structured_outputs_regex", "a*")
    with pytest.raises(InputError, match=r"vLLM is told structured_outputs = 'a\*'"):
        neutral_sampling(with_vllm)
    monkeypatch.setattr(with_vllm, "vllm_generation", SimpleNamespace(temperature=TEMPERATURE))
    with pytest.raises(InputError, match=r"vllm_generation of TRL .* has no generation_kwargs, .*, top_p: "):
        neutral_sampling(with_vllm)
