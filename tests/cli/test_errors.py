"""Other libraries' messages in one line of ours; and memory that ran out, which is no input's fault."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from peft import LoraConfig, get_peft_model

from entropy_probe import InputError
from entropy_probe.checkpoints import load_checkpoint
from entropy_probe.data.rollouts import write_rollouts
from entropy_probe.errors import one_line, out_of_memory
from support import make_checkpoint, random_rollouts, run_command, save_checkpoint, tiny_model, trained_optimizer


def test_a_message_of_several_lines_is_told_whole_and_a_long_one_is_cut_after_a_word() -> None:
    assert one_line(RuntimeError("Errors for X:\n\tsize mismatch for a;\n\n  and b ")) == (
        "Errors for X: size mismatch for a; and b"
    )
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("one two, three"), longest=14) == "one two, three"
    assert one_line(ValueError("one two, three"), longest=13) == "one two …"
    assert len(one_line(ValueError("x" * 500))) <= 302


def from_allocator() -> BaseException:
    try:
        torch.empty(10**15)
    except RuntimeError as error:
        return error
    raise AssertionError("there is a petabyte")


def test_memory_that_ran_out_is_known_in_all_its_forms() -> None:
    for error in (
        RuntimeError("MPS backend out of memory (1 GB)"), RuntimeError("CUDA error: out of memory\nCompile"),
        MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), from_allocator(),
        RuntimeError("unable to mmap 96 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"), pyarrow.lib.ArrowMemoryError("malloc of size 1 failed"),
    ):  # fmt: skip
        assert out_of_memory(error), error
    for other in (RuntimeError("size mismatch"), OSError(errno.ENOENT, "no such file"), ValueError("memory")):
        assert not out_of_memory(other), other


def fails(error: BaseException) -> Callable[..., Any]:
    def instead(*arguments: Any, **options: Any) -> Any:
        raise error

    return instead


PLACES = (
    "entropy_probe.checkpoints.pretrained.AutoModelForCausalLM.from_pretrained",
    "entropy_probe.checkpoints.files.optimizer_pt.torch.load",
    "entropy_probe.model.policy.head_calls",
    "entropy_probe.gradients.treatments._wrong",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_it_passes_through_as_what_it_is_and_ends_the_command_with_one_line(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "checkpoint")
    write_rollouts(random_rollouts(2, 2), tmp_path / "rollouts.jsonl")
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 is full.")
    monkeypatch.setattr(place, fails(gpu if kind == "gpu" else from_allocator()))
    report = tmp_path / "report.json"
    outcome = run_command("run", path, "--rollouts", tmp_path / "rollouts.jsonl", "--json", report)
    assert outcome.code == 1
    assert outcome.lines[-1].startswith("entropy-probe: memory ran out (")
    asked = "Tried to allocate 20.00 GiB. GPU 0 is full." if kind == "gpu" else "4000000000000000 bytes"
    assert asked in outcome.lines[-1]
    assert "Traceback" not in outcome.err
    assert not report.exists()


def test_an_adapter_over_too_small_a_vocabulary_is_told_both_sizes_and_the_way_out(tmp_path: Path) -> None:
    tiny_model("llama-untied").save_pretrained(tmp_path / "base")
    grown = tiny_model("llama-untied")
    grown.resize_token_embeddings(26)
    model = get_peft_model(
        grown, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    optimizer = trained_optimizer(model)
    path = save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    with pytest.raises(InputError) as refusal:
        load_checkpoint(path, base=tmp_path / "base")
    message = str(refusal.value)
    assert "embed_tokens.modules_to_save.default.weight is (26, 16), over this base it would be (23, 16)" in message
    assert "trained with 26 tokens, the base has 23" in message
    assert "(1 more tensors do not fit either)" in message
    # The advice, followed, is exact: whole modules replace whatever the base has.
    resized = tiny_model("llama-untied")
    resized.resize_token_embeddings(26)
    resized.save_pretrained(tmp_path / "resized")
    loaded = load_checkpoint(path, base=tmp_path / "resized")
    ids = torch.tensor([[4, 25, 6]])
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_adapter_of_another_rank_or_base_is_told_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    base = tiny_model("llama-untied")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    path = save_checkpoint(model, trained_optimizer(model), tmp_path / "checkpoint")
    config = (path / "adapter_config.json").read_text()
    tiny_model("llama-untied").save_pretrained(tmp_path / "base")
    (path / "adapter_config.json").write_text(config.replace('"r": 2', '"r": 3'))
    with pytest.raises(InputError, match=r"lora_A\.default\.weight is \(2, 16\), over this base it would be \(3, 16\)"):
        load_checkpoint(path, base=tmp_path / "base")
