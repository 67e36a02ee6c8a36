"""Quantised weights: told by the configuration, by the stored numbers' type, or by the name of an adapter's base.

Packed integers are no weights: cast to another type they are another model, or none. So they are refused by the name of their
method, before a weight is read. What an adapter's base is called is all that tells of the base that it was trained over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from entropy_probe.checkpoints.files.four_bit import STATE
from entropy_probe.common.evidence import Evidence
from entropy_probe.common.files import read_json
from entropy_probe.errors import InputError, out_of_memory

WAY_OUT = (
    "give the base before it was quantised, or the checkpoint dequantised (transformers: model.dequantize() and "
    "save_pretrained), with float weights"
)
READ = "bitsandbytes 4-bit"
"""How the description begins of the one method whose weights are read."""
SETTINGS_KEYS = ("quantization_config", "compression_config")
BITS_KEYS = ("bits", "w_bit", "num_bits", "nbits", "weight_bits")
FORMAT_KEYS = ("format", "quant_algo", "quant_type", "weights", "activation_scheme")
PACKED_TYPES = {"U8", "I8", "I16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"}
"""safetensors' names of types that no float model's weight has."""
FLOAT8 = ("F8", "F4")
"""How the names begin of types that no tensor of a float model has, whatever it is called."""

PACKED_KEY = re.compile(
    r"(?:^|\.)(?:"
    r"(?P<compressed>weight_packed|weight_scale|weight_zero_point|weight_global_scale)"
    r"|(?P<gptq>qweight|qzeros|g_idx)"
    r"|(?P<mxfp4>\w+_blocks|\w+_scales)"
    r"|(?P<bitsandbytes>weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)|SCB|weight_format)"
    r"|(?P<fp8>weight_scale_inv)"
    r")$"
)
"""Keys beside or in place of a weight, by what writes them."""

WRITERS = {
    "compressed": "compressed-tensors",
    "gptq": "GPTQ or AWQ",
    "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8 in blocks",
}

QUANTISED_NAME = re.compile(
    r"(?<![a-z0-9])("
    r"bnb[-_]?[248]?(?:[-_]?bits?)?|[2-8][-_]?bits?|u?int[2-8]|nf4|fp4|fp8|nvfp4|mxfp4|mxfp8|awq|gptq|aqlm|hqq|gguf|exl[23]|"
    r"w[2-8]a(?:4|8|16)|i?q[2-8]_(?:k|[01]|xs|xxs)(?:_[sml])?|quantized|quantised|autoround|torchao"
    r")(?![a-z0-9])",
    re.IGNORECASE,
)
"""Words by which the names of quantised models say so."""

NO_LONGER_QUANTISED = re.compile(r"unquanti[sz]ed|dequanti[sz]ed", re.IGNORECASE)
"""Beside it, those words tell of what the model was, or was trained for."""

BITS = re.compile(r"(?<![0-9])([2-8])(?=[-_]?bit)|(?:int|nf|fp|bnb[-_]?|w)([2-8])", re.IGNORECASE)


def refuse_quantised(configuration: Path, weights: Path) -> None:
    """Refuse a model whose configuration, or whose stored numbers, say that it is quantised; no weight is read.

    Args:
        configuration: the folder of its config.json.
        weights: the folder of its weights.

    Raises:
        InputError: it is quantised; the method is named.
    """
    for folder in dict.fromkeys((configuration, weights)):
        method = quantisation_of(folder)
        if method is not None and not (method.startswith(READ) and any(map(_four_bits, weights.glob("*.safetensors")))):
            raise InputError(f"{folder} is quantised ({method}), and its weights are not read; {WAY_OUT}")
    for file in sorted(weights.glob("*.safetensors")):
        packed = None if _four_bits(file) else _packed(file)
        if packed is not None:
            raise InputError(
                f"{file} holds quantised weights ({packed}), though {configuration / 'config.json'} has no "
                f"quantization_config; {WAY_OUT}"
            )


def quantisation_of(folder: Path) -> str | None:
    """The method and bits that a folder's configuration names, or None; also of a text model inside another one.

    Raises:
        InputError: config.json, or the quantization_config in it, is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in SETTINGS_KEYS:
            settings = part.get(key)
            if isinstance(settings, Mapping) and settings:
                return _described(settings)
            if key == "quantization_config" and not isinstance(settings, Mapping | None):
                raise InputError(
                    f"{file}: quantization_config is {settings!r}; expected an object such as "
                    '{"quant_method": "gptq", "bits": 4}, or none for weights that are not quantised'
                )
    return None


def quantised_base_note(adapter: Path, settings: Mapping[str, Any], base: Path) -> Evidence | None:
    """The warning that an adapter was trained over a quantised base and stands over another one here, or None.

    Args:
        adapter: the folder that the base's name is relative to.
        settings: what its adapter_config.json holds.
        base: the folder of the base that was given.
    """
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    folders = [folder for folder in (Path(os.path.normpath(adapter / named)), Path(named)) if folder.is_dir()]
    if any(folder.resolve() == base.resolve() for folder in folders):
        return None
    methods = [quantisation_of(folder) for folder in folders]
    configured = next((method for method in methods if method is not None), None)
    if quantisation_of(base) is not None:
        return None
    words = [configured] if configured is not None else _words_of_name(named)
    if not words:
        return None
    bits = next((b for found in BITS.finditer(" ".join(words)) if (b := found.group(1) or found.group(2))), None)
    kind = "a quantised" if bits is None else f"{'an' if bits == '8' else 'a'} {bits}-bit"
    return Evidence(
        "quantised_base",
        f"the adapter was trained over {kind} base ({named}, by its {'name' if configured is None else 'configuration'}: "
        f"{', '.join(dict.fromkeys(words))}) and the base given here is not quantised: the two are different policies",
        "Give that very base (of bitsandbytes' 4 bits as it is, else dequantised), or set base_quantization to nf4 where it "
        "was quantised as it was loaded; otherwise log-probs, gradients and entropies are not those of the policy that was "
        "trained",
    )


def _words_of_name(named: str) -> list[str]:
    """The words of a model's name, without its organisation or folders, that say that it is quantised."""
    parts = [part for part in re.split(r"[/\\]", named) if part]
    # The hub's cache keeps a model in models--organisation--name/snapshots/revision.
    cached = next((part.split("--", 2)[-1] for part in parts if part.startswith("models--")), None)
    name = cached or (parts[-1] if parts else "")
    return [] if NO_LONGER_QUANTISED.search(name) else [found.group(1) for found in QUANTISED_NAME.finditer(name)]


def _described(settings: Mapping[str, Any]) -> str:
    """As "bitsandbytes 4-bit nf4"."""
    method = settings.get("quant_method")
    if settings.get("load_in_4bit"):
        return f"{method or 'bitsandbytes'} 4-bit {settings.get('bnb_4bit_quant_type') or ''}".strip()
    if settings.get("load_in_8bit"):
        return f"{method or 'bitsandbytes'} 8-bit"
    found = [str(method or "by a method that quantization_config does not name")]
    bits = _first_in(settings, BITS_KEYS)
    if isinstance(bits, int | float) and not isinstance(bits, bool):
        found.append(f"{bits:g}-bit")
    kind = next((settings[key] for key in FORMAT_KEYS if settings.get(key)), None)
    if isinstance(kind, Mapping):
        kind = _first_in(kind, ("_type",))
    if isinstance(kind, str):
        found.append(kind)
    return " ".join(found)


def _first_in(settings: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first value under one of the keys, at any depth."""
    for key in keys:
        if settings.get(key) is not None:
            return settings[key]
    for value in settings.values():
        if isinstance(value, Mapping) and (found := _first_in(value, keys)) is not None:
            return found
    return None


def _four_bits(file: Path) -> bool:
    """Whether bitsandbytes' 4-bit weights are in a file, with all that they are dequantised by."""
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
            return any(STATE in key and {n := key.partition(STATE)[0], f"{n}.absmax"} <= keys for key in keys)
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        return False


def _packed(file: Path) -> str | None:
    """The first tensor that only quantised weights have, by its key or stored type; damaged files are told where weights are
    read."""
    try:
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                kind = opened.get_slice(key).get_dtype()
                found = PACKED_KEY.search(key)
                # A float model may well have scales of its own: of MXFP4 they are bytes.
                if found is not None and found.lastgroup is not None and (found.lastgroup != "mxfp4" or kind == "U8"):
                    return f"{key}, as {WRITERS[found.lastgroup]} writes it"
                if kind in PACKED_TYPES and (key.endswith("weight") or kind.startswith(FLOAT8)):
                    return f"{key} is of type {kind}"
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        return None
    return None
