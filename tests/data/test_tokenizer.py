"""Tokenizers: text comes back, special tokens come from the policy alone, and damage has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.data.tokenizer import BYTES, Policy, Tokenizer, open_tokenizer
from longctx.errors import ConfigError, DataError, LongctxError
from tests.data.tokenizers_of_tests import BEGIN, END, parts_of, saved, tokenizers, trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def opened(folder: Path) -> Tokenizer:
    return open_tokenizer(folder)


def ids_of(tokenizer: Tokenizer, *texts: str | bytes) -> list[list[int]]:
    return [one.tolist() for one in tokenizer.encode_documents(texts)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=4))
def test_text_comes_back_from_its_ids(opened: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, opened.encode_documents(texts), strict=True):
        assert opened.decode(ids.tolist()) == text
        assert ids.dtype == np.uint32 and (not len(ids) or ids.max() < opened.vocab_size)


def test_bytes_are_a_tokenizer() -> None:
    plain = open_tokenizer(None)
    assert ids_of(plain, "é", b"\xff", "") == [[0xC3, 0xA9], [0xFF], []]
    assert (plain.decode([0xC3, 0xA9, 0xFF, 300]), plain.digest, plain.vocab_size) == ("é\ufffd\ufffd", BYTES, 256)
    with pytest.raises(ConfigError, match=r"data\.eos=true.*bytes have no special tokens"):
        open_tokenizer(BYTES, Policy(eos=True))


def test_special_tokens_in_text_are_text(folder: Path, opened: Tokenizer) -> None:
    text = f"before {END} after"
    assert 0 not in ids_of(opened, text)[0] and opened.decode(ids_of(opened, text)[0]) == text
    assert 0 in ids_of(open_tokenizer(folder, Policy(special_tokens="ids")), text)[0]


def test_a_special_id_never_comes_of_plain_text(tmp_path: Path) -> None:
    """SentencePiece vocabularies hold their special tokens as pieces, which text then spells."""
    pieces = [["<unk>", 0.0], ["</s>", -1.0], ["a", -2.0], ["<", -3.0], ["/", -3.0], ["s", -3.0], [">", -3.0]]
    special = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    parts = {
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
        "added_tokens": [{"id": n, "content": pieces[n][0], "special": True, **special} for n in (0, 1)],
    }
    opened = open_tokenizer(saved(tmp_path, parts, None))
    assert ids_of(opened, "asx") == [[2, 5, 0]] and opened.unknown == 0
    with pytest.raises(DataError, match=r"^1, token 1: plain text becomes the special token '</s>' \(id 1\)"):
        opened.encode_documents(["a", "a</s>"])


def test_bos_and_eos_come_from_the_policy_alone(folder: Path, tmp_path: Path) -> None:
    parts = parts_of()
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [1], "tokens": [BEGIN]}},
    }
    adding = saved(tmp_path, parts, {"eos_token": END, "add_bos_token": True, "bos_token": BEGIN})
    (plain,) = ids_of(open_tokenizer(folder), "text")
    for place in (folder, adding):
        assert ids_of(open_tokenizer(place), "text") == [plain]
        assert ids_of(open_tokenizer(place, Policy(eos=True)), "text", "") == [[*plain, 0], []]
        assert ids_of(open_tokenizer(place, Policy(bos=True, eos=True)), "text") == [[1, *plain, 0]]
    assert "adds BOS" in open_tokenizer(adding).facts()["noted"][-1]
    with pytest.raises(ConfigError, match=r"data\.bos=true:.*no BOS token \(no file beside it names one\)"):
        open_tokenizer(saved(tmp_path / "bare", config=None), Policy(bos=True))


def test_the_digest_is_of_what_determines_ids(folder: Path, opened: Tokenizer, tmp_path: Path) -> None:
    parts = parts_of()
    parts["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    parts["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": END,
    }  # fmt: skip
    parts["model"]["dropout"] = 0.9
    parts["model"]["merges"] = [" ".join(pair) for pair in parts["model"]["merges"]]  # as older files have them
    parts["model"].pop("ignore_merges")
    same = open_tokenizer(saved(tmp_path, parts))
    assert same.digest == opened.digest == open_tokenizer(folder / "tokenizer.json").digest
    assert ids_of(same, "one long text") == ids_of(opened, "one long text")
    assert len([one for one in same.facts()["noted"] if "switched off" in one]) == 3
    with_eos = open_tokenizer(folder, Policy(eos=True))
    assert with_eos.content == opened.content and with_eos.digest == f"{opened.digest}+eos=0"
    parts["model"]["merges"].pop()
    assert open_tokenizer(saved(tmp_path, parts)).digest != opened.digest


def test_ends_of_generation(folder: Path, tmp_path: Path) -> None:
    place = saved(tmp_path)
    (place / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert open_tokenizer(place).eos_ids == (0, 7) and open_tokenizer(folder).eos_ids == (0,)


def test_what_would_be_lost_in_silence_is_refused(tmp_path: Path, opened: Tokenizer) -> None:
    small = open_tokenizer(saved(tmp_path, parts_of(trained(alphabet=False))))
    assert small.decode(ids_of(small, "some text")[0]) == "some text"
    with pytest.raises(DataError, match=r"^1: .*has no token for the byte 0x8b, none for unknown text"):
        small.encode_documents(["fine", "🎋"])
    characters = saved(tmp_path / "c", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})
    with pytest.raises(DataError, match="has no token for 'x'"):
        open_tokenizer(characters).encode_documents(["axb"])
    with pytest.raises(DataError, match=r"^0: bad UTF-8 at byte 1: b'\\xffb'"):
        opened.encode_documents([b"a\xffb"])


def test_a_changed_text_is_said(tmp_path: Path, opened: Tokenizer) -> None:
    parts = parts_of()
    parts["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    first, second = open_tokenizer(saved(tmp_path, parts)).facts()["noted"]
    assert "NFC, Lowercase" in first and "did not come back" in second
    assert opened.facts()["noted"] == []


@pytest.mark.parametrize(
    ("file", "kind"), [("tokenizer.model", "SentencePiece"), ("vocab.json", "merges"), ("tekken.json", "Tekken")]
)
def test_tokenizers_of_other_libraries_are_refused_by_name(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / file).write_bytes(b"{}")
    for path in (tmp_path, tmp_path / file):
        with pytest.raises(ConfigError, match=rf"{file} \(.*{kind}.*AutoTokenizer\.from_pretrained"):
            open_tokenizer(path)
    (tmp_path / file).unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError, match="No such file"):
        open_tokenizer(tmp_path / "none")


def mutations() -> dict[str, Any]:
    """Files that are no tokenizer any more."""
    whole = trained()
    found: dict[str, Any] = {
        "cut": whole[: len(whole) // 2], "empty": "", "array": "[]", "number": "3", "none": "{}", "more": whole + "\0",
        "twice": '{"model": {}, "model": {}}', "constant": '{"model": NaN}',
    }  # fmt: skip

    def changed(name: str, change: Any) -> None:
        parts = parts_of()
        change(parts)
        found[name] = json.dumps(parts)

    changed("no model", lambda parts: parts.pop("model"))
    changed("model type", lambda parts: parts["model"].update(type="Nonsense"))
    changed("model list", lambda parts: parts.update(model=[]))
    changed("negative id", lambda parts: parts["model"]["vocab"].update(a=-1))
    changed("huge id", lambda parts: parts["model"]["vocab"].update(a=2**32 - 1))
    changed("id beyond 32 bits", lambda parts: parts["model"]["vocab"].update(a=2**32))
    changed("id twice", lambda parts: parts["model"]["vocab"].update(a=5, b=5))
    changed("text id", lambda parts: parts["model"]["vocab"].update(a="5"))
    changed("merge of nothing", lambda parts: parts["model"]["merges"].append(["no", "where"]))
    changed("merge of three", lambda parts: parts["model"]["merges"].append(["a", "b", "c"]))
    changed("merge number", lambda parts: parts["model"]["merges"].append(3))
    changed("merges", lambda parts: parts["model"].update(merges={}))
    changed("unk", lambda parts: parts["model"].update(unk_token=3))
    changed("pre-tokenizer", lambda parts: parts.update(pre_tokenizer={"type": "Nonsense"}))
    changed("normalizer", lambda parts: parts.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AA"}))
    changed("regex", lambda parts: parts.update(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}))  # fmt: skip
    changed("added", lambda parts: parts.update(added_tokens={}))
    changed("added entry", lambda parts: parts["added_tokens"].append(3))
    changed("added id", lambda parts: parts["added_tokens"][0].update(id=77))
    changed("added text", lambda parts: parts["added_tokens"][0].update(content=None))
    changed("decoder", lambda parts: parts.update(decoder={"type": "Nonsense"}))
    return found


@pytest.mark.parametrize("name", mutations())
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    place = saved(tmp_path)
    (place / "tokenizer.json").write_text(mutations()[name], encoding="utf-8")
    with pytest.raises(LongctxError, match=r"tokenizer\.json") as refused:
        open_tokenizer(place).encode_documents(["some text"])
    assert refused.value.exit_code in (65, 78)


def test_the_library_itself_agrees(folder: Path, opened: Tokenizer) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = Path(__file__).read_text(encoding="utf-8").replace(END, "")
    assert ids_of(opened, text)[0] == theirs.encode(text, add_special_tokens=False).ids
