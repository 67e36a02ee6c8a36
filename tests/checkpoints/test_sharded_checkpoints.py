"""Checkpoints by rows on two ranks: what the ranks hold is, put together, what one process loads, bit for bit.

The two ranks are started once and go through all cases; a test looks up what became of its case on each rank.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

import toy_format
from entropy_probe.checkpoints import Checkpoint, load_checkpoint, load_model, sharded
from entropy_probe.checkpoints.adam_state import map_adam_state
from entropy_probe.checkpoints.files import safetensors_files
from entropy_probe.checkpoints.files.distributed import BLOCK, DistributedFolder, SafeReader
from entropy_probe.checkpoints.files.samples import WIDTH, windows
from entropy_probe.checkpoints.files.stored import sample_of
from entropy_probe.checkpoints.formats import registry
from entropy_probe.checkpoints.formats.accelerate_sharded import MODEL_FOLDER, OPTIMIZER_FOLDER
from entropy_probe.checkpoints.sharded import decoder_layers, load_sharded_checkpoint, shard_model
from entropy_probe.errors import InputError
from entropy_probe.ranks.collectives import ALONE, Ranks
from entropy_probe.ranks.same_inputs import digest_of_tensors
from entropy_probe.report import CheckpointSection
from rank_processes import failed_cases
from shard_checks import assert_same
from spoiled import NORM, Malicious
from support import (
    assert_equal,
    hf_groups,
    lora_model,
    make_checkpoint,
    save_checkpoint,
    tiny_model,
    trained_optimizer,
)

COUNT = 2
PROJECTION = "model.layers.1.self_attn.q_proj.weight"
FAMILIES = {
    "llama-tied": torch.float32,
    "llama-untied": torch.float64,
    "gpt2": torch.float32,
    "lora": torch.float64,
    "frozen": torch.float32,
}


def make_folders(root: Path) -> None:
    tied = make_checkpoint(root / "llama-tied", amsgrad=True)
    generation = json.loads((tied / "generation_config.json").read_text())
    (tied / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 5]}))
    untied = make_checkpoint(root / "llama-untied", "llama-untied")
    # As shards with an index.
    (untied / "model.safetensors").unlink()
    tiny_model("llama-untied").save_pretrained(untied, max_shard_size="5KB")
    assert (untied / safetensors_files.INDEX).is_file()
    # As the hub has it: without the prefix of the model with a head, and with a mask that nobody reads any more.
    gpt2 = make_checkpoint(root / "gpt2", "gpt2") / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(gpt2).items()}
    save_file(stored | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, gpt2, metadata={"format": "pt"})
    base = tiny_model()
    base.save_pretrained(root / "base")
    # One row in every lora_A: the second rank has none of it.
    adapted = lora_model(base, rank=1)
    save_checkpoint(adapted, trained_optimizer(adapted), root / "lora")
    frozen = tiny_model()
    frozen.model.embed_tokens.weight.requires_grad_(False)
    save_checkpoint(frozen, trained_optimizer(frozen), root / "frozen")
    shutil.copy(tied / "generation_config.json", root / "frozen")
    # What accelerate's shards come without; of its weights nothing is needed.
    (root / "started").mkdir()
    for file in ("config.json", "generation_config.json"):
        shutil.copy(tied / file, root / "started")


def base_of(name: str, root: Path) -> Path | None:
    return root / "base" if "lora" in name else root / "started" if "distributed" in name else None


def write_distributed(name: str, root: Path) -> Path:
    """The same checkpoint as the Trainer leaves it with FSDP2 and SHARDED_STATE_DICT: shards, and no configuration."""
    folder, base = root / f"distributed-{name}", base_of(name, root)
    loaded = load_sharded_checkpoint(root / name, Ranks.of_group(), base=base)
    model: Any = loaded.model
    optimizer = torch.optim.AdamW(hf_groups(model), lr=1e-3, amsgrad=name == "llama-tied")
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            m = loaded.adam.moments[parameter_name]
            moments = {"exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq, "max_exp_avg_sq": m.max_exp_avg_sq}
            optimizer.state[p] = {"step": torch.tensor(float(m.step))} | {
                key: DTensor.from_local(t, p.device_mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())
                for key, t in moments.items()
                if t is not None
            }
    options = StateDictOptions(full_state_dict=False)
    if base is None:
        weights = get_model_state_dict(model, options=options)
    else:
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(model)
    for what, state in (
        (MODEL_FOLDER, {"model": weights}),
        (OPTIMIZER_FOLDER, {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}),
    ):
        save(state, storage_writer=FileSystemWriter(folder / what))
    if dist.get_rank() == 0 and (root / name / "trainer_state.json").is_file():
        shutil.copy(root / name / "trainer_state.json", folder)
    dist.barrier()
    return folder


def add_adapter_config(folder: Path, base: Path, ranks: Ranks) -> None:
    """By the remedy that the refusal names."""
    with pytest.raises(
        InputError, match=r'no adapter_config\.json; .*model\.peft_config\["default"\]\.save_pretrained'
    ):
        load_sharded_checkpoint(folder, ranks, base=base)
    model: Any = load_sharded_checkpoint(folder.parent / "lora", ranks, base=base).model
    dist.barrier()
    if ranks.rank == 0:
        model.peft_config["default"].save_pretrained(folder)
    dist.barrier()


def loaded_alike(name: str, root: Path, ranks: Ranks, **more: Any) -> None:
    """Names, weights, buffers, moments, groups, mapping and test dots; then the gradient of a forward through FSDP2."""
    how: dict[str, Any] = {"base": base_of(name, root), "dtype": FAMILIES[name], "seed": 5, **more}
    found, expected = load_sharded_checkpoint(root / name, ranks, **how), load_checkpoint(root / name, **how)
    assert_same(found, expected, ranks, base=base_of(name, root))
    assert found.mapping == expected.mapping
    assert [isinstance(layer, FSDPModule) for layer in decoder_layers(found.model)] == [True, True]
    ids = torch.arange(3, 13).view(1, 10)
    gradients: list[dict[str, Tensor]] = []
    for model in (found.model.eval(), expected.model.eval()):
        model(input_ids=ids, labels=ids).loss.backward()
        grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()})
    assert gradients[0].keys() == gradients[1].keys() == expected.adam.moments.keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][parameter], msg=parameter)


def distributed_alike(name: str, root: Path, ranks: Ranks) -> None:
    folder = write_distributed(name, root)
    base = base_of(folder.name, root)
    if name == "lora":
        add_adapter_config(folder, root / "base", ranks)
    else:
        with pytest.raises(InputError, match=r"no config\.json; .* as base"):
            load_sharded_checkpoint(folder, ranks)
    expected = load_checkpoint(root / name, base=base_of(name, root))
    found = load_sharded_checkpoint(folder, ranks, base=base)
    assert_same(found, expected, ranks, base=base)
    # What every rank of replicated ones loads, and a process alone.
    whole = load_checkpoint(folder, base=base)
    assert_equal(whole, expected)
    for loaded in (found, whole):
        said = CheckpointSection.of_folder(loaded)
        assert (said.kind, said.base) == ("lora" if name == "lora" else "full", str(base))
    frozen = load_model(folder, base=base, trainable=False).model
    assert any(p.requires_grad for p in frozen.parameters()) == (name != "lora")


def from_a_format_of_one_file(root: Path, ranks: Ranks) -> None:
    """Rows of a format that the package does not know."""
    if ranks.rank == 0:
        toy_format.write(root / "frozen", root / "toy")
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FORMATS", (toy_format.Toy(), *registry.FORMATS))
        assert_same(load_sharded_checkpoint(root / "toy", ranks), load_checkpoint(root / "frozen"), ranks)


def alone_alike(root: Path, ranks: Ranks) -> None:
    """Every rank as a group of one, and the folders that two ranks wrote."""
    groups = [dist.new_group([rank]) for rank in range(ranks.count)]
    alone = Ranks.of_group(groups[ranks.rank])
    expected = load_checkpoint(root / "llama-tied")
    for name in ("llama-tied", "distributed-llama-tied"):
        base = base_of(name, root)
        assert_same(load_sharded_checkpoint(root / name, alone, base=base), expected, alone, base=base)


def no_more_than_a_shard_is_read(root: Path, ranks: Ranks) -> None:
    """Counts the elements of every slice, and refuses tensors that are read whole.

    What ranks compare, three rows of each, is counted apart.
    """
    read: dict[str, int] = {}
    compared: dict[str, int] = {}

    class Slice:
        def __init__(self, key: str, inner: Any) -> None:
            self.key, self.inner = key, inner

        def get_shape(self) -> list[int]:
            return list(self.inner.get_shape())

        def get_dtype(self) -> str:
            return str(self.inner.get_dtype())

        def __getitem__(self, where: slice | tuple[slice, ...]) -> Tensor:
            found: Tensor = self.inner[where]
            counted = compared if isinstance(where, tuple) else read
            counted[self.key] = counted.get(self.key, 0) + found.numel()
            return found

    class File:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def keys(self) -> list[str]:
            return list(self.inner.keys())

        def get_slice(self, key: str) -> Slice:
            return Slice(key, self.inner.get_slice(key))

    @contextmanager
    def watched(*arguments: Any, **options: Any) -> Iterator[File]:
        with safe_open(*arguments, **options) as file:
            yield File(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_files, "safe_open", watched)
        model = load_sharded_checkpoint(root / "llama-untied", ranks).model
    shards: dict[str, Any] = dict(model.named_parameters())
    assert read == {name: p.to_local().numel() for name, p in shards.items() if p.to_local().numel()}
    assert 2 * sum(read.values()) <= sum(p.numel() for p in shards.values()) + 23 * 16
    assert compared == {name: p.shape[-1] * (3 if p.dim() == 2 else 1) for name, p in shards.items()}


def damage_on_one_rank(root: Path, ranks: Ranks) -> None:
    """NaN in the last rows, which one rank holds: the other does not see it, and refuses in the same words."""
    folder = copied(root, "llama-tied", "nan", ranks)
    if ranks.rank == 0:
        edit(folder, lambda tensors: tensors[NORM][-1:].fill_(float("nan")))
    dist.barrier()
    with pytest.raises(InputError, match=f"{NORM} holds NaN"):
        load_sharded_checkpoint(folder, ranks)


def adams_shards_damaged_on_one_rank(root: Path, ranks: Ranks) -> None:
    """A part of Adam's state that the other rank does not read."""

    def read(*_: object) -> None:
        if ranks.rank == 1:
            raise InputError("its part is gone")

    with (
        mock.patch("entropy_probe.checkpoints.sharded.map_adam_state", lambda *given: read() or map_adam_state(*given)),
        pytest.raises(InputError, match="its part is gone"),
    ):
        load_sharded_checkpoint(root / "llama-tied", ranks)


def a_file_that_one_rank_lacks(root: Path, ranks: Ranks) -> None:
    """Told alike by all, where the first thing that is looked for is missing on one disk."""
    with pytest.raises(InputError, match="gone is not a folder"):
        load_sharded_checkpoint(root / ("gone" if ranks.rank == 1 else "llama-tied"), ranks)


def copied(root: Path, name: str, new: str, ranks: Ranks) -> Path:
    if ranks.rank == 0:
        shutil.copytree(root / name, root / new)
    dist.barrier()
    return root / new


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(*files: Path) -> None:
    for file in files:
        file.write_bytes(file.read_bytes()[:-40])


def pickled_only(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def another_shape(folder: Path) -> None:
    """15 rows in 16's place, of which the first rank has 8 all the same."""
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][1]["exp_avg"] = saved["state"][1]["exp_avg"][:-1].clone()
    torch.save(saved, folder / "optimizer.pt")


def write_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The folder of weights written once more by one process, changed."""
    tensors = load_file(folder.parent / "llama-tied" / "model.safetensors")
    change(tensors)
    shutil.rmtree(folder / MODEL_FOLDER)
    save({"model": tensors}, storage_writer=FileSystemWriter(folder / MODEL_FOLDER), no_dist=True)


def write_optimizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The optimizer folder written once more by one process, changed."""
    saved = torch.load(folder.parent / "llama-tied" / "optimizer.pt", weights_only=True)
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in hf_groups(model) for p in group["params"]]
    groups = [group | {"params": [order[index] for index in group["params"]]} for group in saved["param_groups"]]
    state = {"state": {order[index]: entry for index, entry in saved["state"].items()}, "param_groups": groups}
    change(state)
    shutil.rmtree(folder / OPTIMIZER_FOLDER)
    save({"optimizer": state}, storage_writer=FileSystemWriter(folder / OPTIMIZER_FOLDER), no_dist=True)


def malicious_settings(folder: Path) -> None:
    """A pickle in the place of a learning rate, as torch writes any object."""
    planted = Malicious(folder.parent / "planted-lr")
    write_optimizer(folder, lambda state: state["param_groups"][0].update(lr=planted))


def other_names(folder: Path) -> None:
    """The same shapes in the same order under a name that the model does not have: nothing to guess from."""
    other = NORM.replace("input", "other")

    def rename(state: dict[str, Any]) -> None:
        state["state"][other] = state["state"].pop(NORM)
        for group in state["param_groups"]:
            group["params"] = [other if name == NORM else name for name in group["params"]]

    write_optimizer(folder, rename)


REFUSALS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("llama-tied", lambda f: truncate(f / "model.safetensors"), "cannot be read"),
    "missing": ("llama-tied", lambda f: edit(f, lambda tensors: tensors.pop(NORM)), f"missing keys: {NORM}"),
    "unexpected": (
        "llama-tied",
        lambda f: edit(f, lambda tensors: tensors.update(intruder=torch.zeros(2))),
        "unexpected keys: intruder",
    ),
    "mis-shaped": (
        "llama-tied",
        lambda f: edit(f, lambda tensors: tensors.update({NORM: torch.ones(15)})),
        f"mismatched keys: {NORM}",
    ),
    "tied-to-other-values": (
        "llama-tied",
        lambda f: edit(f, lambda tensors: tensors.update({"lm_head.weight": torch.ones(23, 16)})),
        "lm_head.weight",
    ),
    "pickled": ("llama-tied", pickled_only, "pytorch_model.bin"),
    "quantised": (
        "llama-tied",
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised (gptq 4-bit)",
    ),
    "renamed-by-transformers": ("mixtral", lambda f: None, "experts"),
    "moment-mis-shaped": ("llama-tied", another_shape, r"exp_avg has shape (15, 16), the parameter (16, 16)"),
    "adapter-missing-a-weight": (
        "lora",
        lambda f: save_file(
            {
                k: t
                for k, t in load_file(f / "adapter_model.safetensors").items()
                if "1.self_attn.q_proj.lora_B" not in k
            },
            f / "adapter_model.safetensors",
        ),
        "q_proj.lora_B.weight is missing",
    ),
    "malicious-metadata": (
        "distributed-llama-tied",
        lambda f: (f / MODEL_FOLDER / ".metadata").write_bytes(pickle.dumps(Malicious(f.parent / "planted"))),
        "posix.mkdir",
    ),
    "malicious-settings": ("distributed-llama-tied", malicious_settings, OPTIMIZER_FOLDER),
    "truncated-distributed": (
        "distributed-llama-tied",
        lambda f: truncate(*(f / MODEL_FOLDER).glob("*.distcp")),
        MODEL_FOLDER,
    ),
    "no-metadata": ("distributed-llama-tied", lambda f: (f / OPTIMIZER_FOLDER / ".metadata").unlink(), ".metadata"),
    "optimizer-of-other-names": ("distributed-llama-tied", other_names, "trains what the model does not"),
}


def refused(name: str, root: Path, ranks: Ranks) -> None:
    source, spoil, culprit = REFUSALS[name]
    folder = copied(root, source, name, ranks)
    try:
        if ranks.rank == 0:
            spoil(folder)
    finally:
        dist.barrier()
    loads: list[Callable[..., Checkpoint]] = [partial(load_sharded_checkpoint, ranks=ranks)]
    for load in [*loads, load_checkpoint] if "distributed" in source else loads:
        with pytest.raises(InputError) as refusal:
            load(folder, base=base_of(source, root))
        message = str(refusal.value)
        assert culprit in message, message
        assert "\n" not in message
        assert str(folder) in message
    if name == "renamed-by-transformers":
        assert "replicated sharding" in message
    assert not list(root.glob("planted*")), "a pickle was executed"


def nudge(tensors: dict[str, Tensor]) -> None:
    """One number, in one row that either rank looks at and one of them holds."""
    tensors[PROJECTION][7, 3] += 1e-3


def nudge_base(folder: Path) -> None:
    edit(base_beside(folder), nudge)


def nudge_adapter(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_optimizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    change(saved)
    torch.save(saved, folder / "optimizer.pt")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def another_model(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "gpt2", folder)


def nothing(_: object) -> None:
    pass


OTHERS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object], list[str]]] = {
    "weights": ("llama-tied", nothing, lambda f: edit(f, nudge), ["weights"]),
    "moments": (
        "llama-tied",
        nothing,
        lambda f: edit_optimizer(f, lambda saved: saved["state"][0]["exp_avg_sq"][-1].mul_(2)),
        ["optimizer state"],
    ),
    "adam-step": (
        "llama-tied",
        nothing,
        lambda f: edit_optimizer(f, lambda saved: saved["state"][0]["step"].add_(1)),
        ["optimizer state"],
    ),
    "optimizer-settings": (
        "llama-tied",
        nothing,
        lambda f: edit_optimizer(f, lambda saved: saved["param_groups"][1].update(weight_decay=0.5)),
        ["optimizer settings"],
    ),
    "configuration": (
        "llama-tied",
        nothing,
        lambda f: edit_json(f / "config.json", rms_norm_eps=0.1),
        ["configuration"],
    ),
    "trainer-step": (
        "llama-tied",
        nothing,
        lambda f: edit_json(f / "trainer_state.json", global_step=9),
        ["trainer step"],
    ),
    "shapes": (
        "llama-tied",
        nothing,
        another_model,
        ["configuration", "weights", "optimizer state", "optimizer settings"],
    ),
    "base": ("lora", nothing, nudge_base, ["base weights"]),
    "adapter": ("lora", nothing, nudge_adapter, ["weights"]),
    "distributed-weights": (
        "distributed-llama-tied",
        lambda f: write_weights(f, nothing),
        lambda f: write_weights(f, nudge),
        ["weights"],
    ),
    "distributed-moments": (
        "distributed-llama-tied",
        lambda f: write_optimizer(f, nothing),
        lambda f: write_optimizer(f, lambda state: state["state"][NORM]["exp_avg"].mul_(2)),
        ["optimizer state"],
    ),
    "distributed-settings": (
        "distributed-llama-tied",
        lambda f: write_optimizer(f, nothing),
        lambda f: write_optimizer(f, lambda state: state["param_groups"][0].update(lr=0.5)),
        ["optimizer settings"],
    ),
}
"""What is copied for each rank, what is done to both copies, then to rank 1's, and what of its both ranks hear to be other."""


def a_copy_each(source: str, name: str, root: Path, ranks: Ranks, prepare: Callable[[Path], object]) -> list[Path]:
    """Two copies of a checkpoint, and each one's own copy of what lies under it, beside it."""
    folders = [root / f"{name}-for-{rank}" for rank in range(ranks.count)]
    base = base_of(source, root)
    try:
        for folder in folders if ranks.rank == 0 else []:
            shutil.copytree(root / source, folder)
            prepare(folder)
            if base is not None:
                shutil.copytree(base, base_beside(folder))
    finally:
        dist.barrier()
    return folders


def base_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-base")


def load_own(folders: list[Path], ranks: Ranks) -> Checkpoint:
    own = folders[ranks.rank]
    return load_sharded_checkpoint(own, ranks, base=base_beside(own) if base_beside(own).is_dir() else None)


def copies_will_do(source: str, root: Path, ranks: Ranks) -> None:
    """Other paths are no other checkpoint."""
    load_own(a_copy_each(source, f"copied-{source}", root, ranks, nothing), ranks)


def given_another(name: str, root: Path, ranks: Ranks) -> None:
    """All ranks are told so, in the same words, before any of them builds a model."""
    source, prepare, change, parts = OTHERS[name]
    folders = a_copy_each(source, name, root, ranks, prepare)
    try:
        if ranks.rank == 0:
            change(folders[1])
    finally:
        dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(sharded, "full_skeleton")
        with pytest.raises(InputError) as refusal:
            load_own(folders, ranks)
    said = ", ".join(f"rank 1 was given other {part} than rank 0" for part in parts)
    assert str(refusal.value) == f"{said}: all ranks must be given the same files and options"


def single_number(root: Path, ranks: Ranks) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(4, device="meta"))
    model.scale = nn.Parameter(torch.empty((), device="meta"))
    assert ranks.group is not None
    with pytest.raises(InputError, match="scale is a single number"):
        shard_model(root, model, DeviceMesh.from_group(ranks.group, "cpu"))


CASES: Mapping[str, Callable[[Path, Ranks], None]] = {
    **{f"loaded-{name}": partial(loaded_alike, name) for name in FAMILIES},
    "frozen-as-asked": partial(loaded_alike, "frozen", freeze=("embed_tokens",)),
    **{f"distributed-{name}": partial(distributed_alike, name) for name in ("llama-tied", "lora", "frozen")},
    "one-file-format": from_a_format_of_one_file,
    "alone": alone_alike,
    "reads": no_more_than_a_shard_is_read,
    "nan": damage_on_one_rank,
    "adams-shards": adams_shards_damaged_on_one_rank,
    "lacking": a_file_that_one_rank_lacks,
    "single-number": single_number,
    **{f"refused-{name}": partial(refused, name) for name in REFUSALS},
    **{f"copied-{name}": partial(copies_will_do, name) for name in ("llama-tied", "lora", "distributed-llama-tied")},
    **{f"another-{name}": partial(given_another, name) for name in OTHERS},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """By rank, the tracebacks of the cases that failed."""
    root = tmp_path_factory.mktemp("ranks")
    make_folders(root)
    make_checkpoint(root / "mixtral", "mixtral")
    return failed_cases(COUNT, {name: partial(case, root) for name, case in CASES.items()})


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, outcomes: list[dict[str, str]]) -> None:
    for rank, failures in enumerate(outcomes):
        assert case not in failures, f"rank {rank}:\n{failures[case]}"


def test_a_layer_that_shares_a_weight_with_others_is_the_roots() -> None:
    model = tiny_model()
    first, second = model.model.layers
    assert list(decoder_layers(model)) == [first, second]
    second.mlp.up_proj.weight = model.lm_head.weight
    assert list(decoder_layers(model)) == [first]


def test_without_a_process_group_sharding_is_refused(sound: Path) -> None:
    with pytest.raises(InputError, match="torchrun"):
        load_sharded_checkpoint(sound / "checkpoint-3", ALONE)


def test_metadata_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"garbage", pickle.dumps({"state_dict_metadata": {}}), pickle.dumps(torch.Size([1]))):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(InputError, match=r"\.metadata"):
            SafeReader(tmp_path).read_metadata()


def test_what_ranks_compare_is_at_the_start_in_the_middle_and_at_the_end() -> None:
    counted = torch.arange(3 * 5 * 7).view(3, 5, 7)
    assert [counted[window].flatten().tolist() for window in windows(counted.shape)] == [
        list(range(start, start + 7)) for start in (0, 35 + 14, 70 + 28)
    ]
    assert windows((9 * WIDTH,)) == [(slice(start, start + WIDTH),) for start in (0, 4 * WIDTH, 8 * WIDTH)]
    assert windows((5,)) == [(slice(0, 5),)]
    assert windows(()) == [()]
    assert windows((4, 0)) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("checksums", [True, False])
def test_of_a_distributed_folder_a_few_bytes_tell_what_is_in_it(checksums: bool, tmp_path: Path) -> None:
    """torch's own checksum tells of any change; without it one in the middle is still seen."""
    weight = torch.randn(64, 1024)

    def sample(name: str, weight: Tensor) -> dict[str, Tensor]:
        save({"model": {"weight": weight}}, storage_writer=FileSystemWriter(tmp_path / name), no_dist=True)
        return sample_of(DistributedFolder.open(tmp_path / name).tensors())

    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        found = digest_of_tensors(sample("one", weight))
        again = sample("again", weight)
        assert sum(part.numel() for part in again.values()) == 2 * BLOCK
        assert digest_of_tensors(again) == found
        for row in [32, 3] if checksums else [32]:
            changed = weight.clone()
            changed[row, 0] += 1e-3
            assert digest_of_tensors(sample(f"changed-{row}", changed)) != found
    finally:
        torch.serialization.set_crc32_options(before)
