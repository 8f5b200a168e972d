"""The text VAE's tokenizers from every form that their vocabularies are published in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vdtrain.cli import main
from vdtrain.models.frozen_weights import ASSETS
from vdtrain.models.tokenizers import DecoderTokenizer, EncoderTokenizer

CAPTIONS = ["A red circle.", "the Blue star, on a white background!"]
SETTINGS = {"bert": "encoder_tokenizer", "gpt2": "decoder_tokenizer"}


def asset(name: str) -> Path:
    return ASSETS / "tiny" / f"{SETTINGS[name]}.json"


def run(name: str, path: Path, output: Path, *more: str) -> int:
    place = f"model.modalities.text.vae.{SETTINGS[name]}={output}"
    return main(["weights", "import", f"{name}_tokenizer", str(path), "model=tiny", place, *more])


def published(name: str, folder: Path) -> Path:
    """The tiny tokenizer as plain vocabulary files."""
    model = json.loads(asset(name).read_text())["model"]
    folder.mkdir()
    entries = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if name == "bert":
        (folder / "vocab.txt").write_text("\n".join(entries) + "\n", encoding="utf-8")
    else:
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("form", ["file", "folder", "vocabulary", "vocabulary file"])
def test_every_form_gives_the_same_ids(tmp_path: Path, name: str, form: str) -> None:
    path = asset(name)
    if form == "folder":
        path = tmp_path / "whole"
        path.mkdir()
        (path / "tokenizer.json").write_text(asset(name).read_text())
    elif form != "file":
        path = published(name, tmp_path / "vocabulary")
        if form == "vocabulary file":
            path = path / ("vocab.txt" if name == "bert" else "vocab.json")
    assert run(name, path, tmp_path / "out.json") == 0
    makes = (
        (lambda file: EncoderTokenizer(str(file), 30)) if name == "bert" else (lambda file: DecoderTokenizer(str(file)))
    )
    found, expected = makes(tmp_path / "out.json"), makes(asset(name))
    assert found(CAPTIONS).tolist() == expected(CAPTIONS).tolist()
    if name == "gpt2":
        assert (found.pad, found.first, found.last) == (382, 383, 384)
        assert found.texts(found(CAPTIONS)[:, 1:]) == CAPTIONS


def test_the_released_vocabulary_sizes_and_ids(tmp_path: Path) -> None:
    """As many entries as BERT-base-cased and GPT-2 have, made up but for the special ones."""
    words = [f"word{index}" for index in range(28_996)]
    for special, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}.items():
        words[index] = special
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    place = "model.modalities.text.vae.{}=" + str(tmp_path / "{}.json")
    assert main(["weights", "import", "bert_tokenizer", str(tmp_path), place.format("encoder_tokenizer", "b")]) == 0
    (tmp_path / "vocab.json").write_text(
        json.dumps({f"w{index}": index for index in range(50_256)} | {"<|endoftext|>": 50_256}), encoding="utf-8"
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    assert main(["weights", "import", "gpt2_tokenizer", str(tmp_path), place.format("decoder_tokenizer", "g")]) == 0
    made = Tokenizer.from_file(str(tmp_path / "g.json"))
    assert [made.token_to_id(name) for name in ("<|endoftext|>", "<PAD>", "<BOS>", "<EOS>")] == [*range(50_256, 50_260)]
    words[101], words[7] = words[7], words[101]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    again = [place.format("encoder_tokenizer", "b"), "overwrite=true"]
    assert main(["weights", "import", "bert_tokenizer", str(tmp_path / "vocab.txt"), *again]) == 2


def shorter(folder: Path) -> None:
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join(lines[:-1]), encoding="utf-8")


def moved(folder: Path) -> None:
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    (folder / "vocab.txt").write_text("\n".join([*lines[1:], lines[0]]), encoding="utf-8")


def nameless(folder: Path) -> None:
    text = (folder / "vocab.txt").read_text(encoding="utf-8")
    (folder / "vocab.txt").write_text(text.replace("[CLS]", "[XXX]"), encoding="utf-8")


def fewer(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"a": 0, "b": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("bert", shorter, "227 entries, but encoder_vocabulary=228"),
        ("bert", moved, "its special tokens are"),
        ("bert", nameless, "has no [CLS]"),
        ("bert", lambda folder: (folder / "tokenizer.json").write_text("{}"), "not a tokenizer"),
        ("bert", lambda folder: (folder / "vocab.txt").unlink(), "no vocab.txt there"),
        ("gpt2", lambda folder: (folder / "merges.txt").unlink(), "no merges.txt there"),
        ("gpt2", lambda folder: (folder / "vocab.json").write_text('{"a": 0}'), "not a tokenizer"),
        ("gpt2", fewer, "decoder_vocabulary=385"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, name: str, damage, message: str, capsys) -> None:
    folder = published(name, tmp_path / "vocabulary")
    damage(folder)
    assert run(name, folder, tmp_path / "out.json") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"error: path={folder}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
