"""The converted tokenizer against sentencepiece and the published pipeline's (slow) T5 tokenizer."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import T5Tokenizer

from dynamictrl_edge.bundle.errors import BundleError, InputError
from dynamictrl_edge.export.tokenizer import convert_tokenizer
from dynamictrl_edge.runtime.tokenizer import PromptTokenizer, check_prompt
from tests.golden import case, model_dir

FOLDER = model_dir("cogvideox10-tiny") / "tokenizer"
JSON = convert_tokenizer(FOLDER)
OURS = PromptTokenizer.from_str(JSON)
SENTENCEPIECE = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "spiece.model"))
PUBLISHED = T5Tokenizer.from_pretrained(FOLDER)
PIECES = [SENTENCEPIECE.id_to_piece(i).replace("▁", " ") for i in range(3, SENTENCEPIECE.get_piece_size())]

pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has")

unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
marks = st.text(st.characters(min_codepoint=0x2B0, max_codepoint=0x370), max_size=6)  # combining and modifier letters
controls = st.text(st.characters(max_codepoint=0xA0), max_size=6)
odd = st.sampled_from(
    [
        *["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_12>", "<extra_id_100>", "＜/s＞", "<", ">", "</"],
        *["▁", " ▁ ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\u200b", "\u200d", "\ufeff", "\x85", "\x1c", "\0"],
        *["\U0001f469\u200d\U0001f469\u200d\U0001f467", "ﬁ\u0301", "e\u0301\u0302"],
    ]
)
plain = st.text("abcdefghijklmnopqrstuvwxyz  ABC,.!-'0123", max_size=30)
texts = st.lists(st.one_of(unicode, marks, controls, odd, plain), max_size=8).map("".join)
# Runs of few different pieces have many equally good segmentations: only the order of rounding decides.
ties = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).flatmap(
    lambda few: st.lists(st.sampled_from(few), max_size=120).map("".join)
)


@pytest.mark.parametrize("name", ["text10", "text15"])
def test_golden_strings_have_the_published_ids(name: str) -> None:
    tensors, info = case(name)
    tokenizer = PromptTokenizer.from_str(convert_tokenizer(model_dir(info["model"]) / "tokenizer"))
    library = Tokenizer.from_str(JSON)  # other readers of the same file agree on these
    for entry in info.get("tokenizer_cases", []):
        ids, dropped = tokenizer.encode(entry["text"], len(entry["ids"]))
        assert ids.tolist() == entry["ids"], entry["text"]
        assert dropped == 0
        assert library.encode(entry["text"]).ids == entry["ids"], entry["text"]
    length = info["settings"]["max_sequence_length"]
    for prompt, expected, untruncated in zip(
        info["settings"]["prompts"], tensors["token_ids"], info["untruncated_ids"], strict=True
    ):
        ids, dropped = tokenizer.encode(prompt, length)
        assert ids.tolist() == expected.tolist()
        assert ids.dtype == "int64"
        assert dropped == max(0, len(untruncated) - length)


@settings(max_examples=400, deadline=None)
@given(texts, st.integers(2, 40))  # at 1 the published one gives up and does not truncate
@example("x</s>", 3)
@example("</s> </s>", 2)
@example("", 1)
def test_padded_and_truncated_ids_equal_the_published_tokenizer(text: str, length: int) -> None:
    expected = PUBLISHED(text, padding="max_length", max_length=length, truncation=True).input_ids
    assert OURS.encode(text, length)[0].tolist() == expected


@settings(max_examples=400, deadline=None)
@given(st.one_of(unicode, marks, controls, plain, ties))
@example("ooooo")
@example("fffff")
@example("UlllU")
def test_ids_equal_sentencepiece(text: str) -> None:
    assume(not any(token in text for token in PUBLISHED.added_tokens_encoder))  # sentencepiece does not know those
    assert OURS.ids(text) == SENTENCEPIECE.encode(text)


def changed_copy(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "tokenizer"
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.parametrize("prefix", [True, False])
def test_newer_whitespace_rule_equals_the_published_tokenizer(tmp_path: Path, prefix: bool) -> None:
    folder = changed_copy(tmp_path, legacy=False, add_prefix_space=prefix)
    published = T5Tokenizer.from_pretrained(folder)
    ours = PromptTokenizer.from_str(convert_tokenizer(folder))

    @settings(max_examples=150, deadline=None)
    @given(texts)
    @example(" a <extra_id_0> b▁ c")
    @example("<extra_id_0>a</s> b")
    def check(text: str) -> None:
        assert (
            ours.encode(text, 64)[0].tolist()
            == published(text, padding="max_length", max_length=64, truncation=True).input_ids
        )

    check()


@pytest.mark.parametrize("kept", [["spiece.model"], ["tokenizer.json"], ["spiece.model", "added_tokens.json"]])
def test_every_layout_of_the_folder_gives_the_same_tokenizer(tmp_path: Path, kept: list[str]) -> None:
    for name in kept:
        shutil.copy(FOLDER / name, tmp_path)
    assert convert_tokenizer(tmp_path) == JSON


def test_sentinels_are_no_pieces_of_ordinary_text() -> None:
    assert OURS.ids("<extra_id_0>") == [485]
    assert 485 not in OURS.ids("＜extra_id_0＞")  # normalizes to the sentinel's spelling


def test_folder_without_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither spiece\.model nor tokenizer\.json"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_cut_sentencepiece_model_is_refused_by_name(tmp_path: Path, size: int) -> None:
    (tmp_path / "spiece.model").write_bytes((FOLDER / "spiece.model").read_bytes()[:size])
    with pytest.raises(InputError, match=r"spiece\.model"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [{"model_type": "bpe"}, {"byte_fallback": True}, {"add_dummy_prefix": False}])
def test_other_sentencepiece_models_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man walks", "a woman dances"] * 20),
        model_writer=model,
        vocab_size=290 if "byte_fallback" in options else 24,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **options,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match=next(iter(options))):
        convert_tokenizer(tmp_path)


def test_two_vocabularies_in_one_folder_are_refused(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "spiece.model", tmp_path)
    table = json.loads((FOLDER / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary[3], vocabulary[4] = vocabulary[4], vocabulary[3]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="different vocabularies"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
        ({"eos_token": "<eos>"}, "eos_token"),
        ({"extra_ids": -1}, "extra_ids"),
        ({"added_tokens_decoder": {"x": {}}}, "added tokens"),
        ({"added_tokens_decoder": {"999": {"content": "new", "lstrip": False, "rstrip": False, "special": False,
                                           "single_word": False}}}, "'new'.* has id 999"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        convert_tokenizer(changed_copy(tmp_path, **changes))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_broken_json_is_refused_by_name(tmp_path: Path, name: str) -> None:
    shutil.copy(FOLDER / "spiece.model", tmp_path)
    (tmp_path / name).write_text('{"model": ')
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        convert_tokenizer(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(JSON) - 1))
def test_cut_tokenizer_in_a_bundle_is_refused(size: int) -> None:
    with pytest.raises(BundleError, match="damaged"):
        PromptTokenizer.from_str(JSON[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table["model"].update(type="BPE"),
        lambda table: table.pop("added_tokens"),
        lambda table: table["pre_tokenizer"].update(prepend_scheme="sometimes"),
        lambda table: table["normalizer"]["normalizers"][0].update(precompiled_charsmap="ALwCAA=="),
        lambda table: table["normalizer"]["normalizers"][0].update(precompiled_charsmap="***"),
        lambda table: table["model"].update(vocab=[]),
    ],
)
def test_tokenizers_of_another_kind_in_a_bundle_are_refused(damage: Any) -> None:
    table = json.loads(JSON)
    damage(table)
    with pytest.raises(BundleError, match="damaged or not of the T5 kind"):
        PromptTokenizer.from_str(json.dumps(table))


def test_missing_tokenizer_in_a_bundle_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent\.json"):
        PromptTokenizer.from_file(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("\u200b", "is empty"),
        ("a\0b", "NUL"),
        ("a\udcff", "not valid Unicode"),
        ("a " * 150_000, "300000 characters"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(InputError, match=f"--prompt.*{words}"):
        check_prompt(prompt, OURS, 16)


def test_negative_prompt_may_be_empty() -> None:
    assert check_prompt("", OURS, 16, name="--negative-prompt", may_be_empty=True) == []


def test_long_prompt_is_used_in_part_with_a_notice() -> None:
    assert check_prompt("a woman in a red dress", OURS, 16) == []
    (notice,) = check_prompt("word " * 10_000, OURS, 16)
    dropped = len(SENTENCEPIECE.encode("word " * 10_000)) - 15
    assert f"15 tokens of it, the last {dropped} tokens were dropped" in notice


def test_reading_a_tokenizer_needs_no_export_library() -> None:
    code = (
        "import sys; from dynamictrl_edge.runtime import tokenizer;"
        "sys.exit(bool({'torch', 'transformers', 'sentencepiece', 'tokenizers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
