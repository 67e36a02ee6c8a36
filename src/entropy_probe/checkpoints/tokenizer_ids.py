"""The special ids of a checkpoint's tokenizer, read from its JSON files alone: no vocabulary is built for four numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entropy_probe.common.files import read_json
from entropy_probe.data.rollouts import SpecialIds

CONFIG = "tokenizer_config.json"


def tokenizer_ids(folders: Sequence[Path]) -> SpecialIds:
    """The pad, end, begin and unknown ids of the tokenizer in the first folder that has one.

    A token that the files give no id, as those of slow tokenizers may not, is left out.

    Raises:
        InputError: a file of the tokenizer is not JSON.
    """
    folder = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if folder is None:
        return SpecialIds()
    config = read_json(folder / CONFIG)
    older = folder / "special_tokens_map.json"
    named: Mapping[str, Any] = {**(read_json(older) if older.is_file() else {}), **config}
    kinds = ("pad_token", "eos_token", "bos_token", "unk_token")
    contents = {kind: _content(named.get(kind)) for kind in kinds}
    ids: dict[str, int] = {}
    for table in _tables(folder, config):
        ids = {**table, **ids}
        if all(content is None or content in ids for content in contents.values()):
            break
    pad, stop, begin, unknown = ((ids[found],) if (found := contents[kind]) in ids else () for kind in kinds)
    return SpecialIds(pad=pad, stop=stop, begin=begin, unknown=unknown)


def _content(token: object) -> str | None:
    """A token's text, which stands as such or in an object with how it is matched."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _tables(folder: Path, config: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Ids by text, from the smallest source to the largest; entries of another form are passed over."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        yield {text: int(token) for token, entry in decoder.items() if (text := _content(entry)) and token.isdigit()}
    added = folder / "added_tokens.json"
    if added.is_file():
        yield {text: token for text, token in read_json(added).items() if isinstance(token, int)}
    whole = folder / "tokenizer.json"
    if whole.is_file():
        tokenizer = read_json(whole)
        entries = tokenizer.get("added_tokens")
        if isinstance(entries, list):
            yield {e["content"]: e["id"] for e in entries if isinstance(e, dict) and {"content", "id"} <= e.keys()}
        model = tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield vocabulary
        elif isinstance(vocabulary, list):  # of a Unigram model: texts with their scores, by id
            yield {entry[0]: token for token, entry in enumerate(vocabulary)}
    words = folder / "vocab.json"
    if words.is_file():
        yield {text: token for text, token in read_json(words).items() if isinstance(token, int)}
