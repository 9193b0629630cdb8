"""Tokenizers: text → ids → the same text, and the number of bytes of each token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from trainer import config
from trainer.data import tokenizer as module
from trainer.data.tokenizer import CharTokenizer, Tokenizer, train
from trainer.errors import ConfigError, TokenizerError

WORDS = ["the", "rope", "holds", "what", "the", "climber", "lets", "go", "and", "nothing", "is", "lost"]
TEXTS = [" ".join(WORDS[n % 7 :] + WORDS[: n % 5]) for n in range(35)] + ["naïve café – 東京 😀"]
BPE = train("bpe", TEXTS, 320)
BYTES = train("bytes", [], 0)
CHARS = train("chars", TEXTS, 0)


@given(st.text())
@settings(deadline=None)
def test_byte_level_tokens_return_every_text_and_weigh_its_bytes(text):
    for tokenizer in (BPE, BYTES):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()


@given(st.text(alphabet=sorted(set("".join(TEXTS)))))
@settings(deadline=None)
def test_characters_return_every_text_they_know(text):
    (ids,) = CHARS.encode_batch([text])
    assert CHARS.decode(ids) == text
    assert CHARS.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS])
@pytest.mark.parametrize("changed", ["a bit", "white space", "another tokenizer"])
def test_a_tokenizer_file_that_is_not_the_one_recorded_is_refused(tmp_path, tokenizer, changed):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert Tokenizer.load(path, tokenizer.sha256).sha256 == tokenizer.sha256
    whole = path.read_bytes()
    at = len(whole) * 2 // 3
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes({"a bit": flipped, "white space": whole + b"\r\n"}.get(changed, b'{"toprope": "chars"}'))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has changed since the run wrote it"):
        Tokenizer.load(path, tokenizer.sha256)
    path.write_bytes(whole)
    Tokenizer.load(path)  # runs of before the digest was recorded


def test_an_unknown_character_is_its_own_token_that_weighs_nothing():
    tokenizer = CharTokenizer("ab")
    (ids,) = tokenizer.encode_batch(["axb~"])
    assert ids.tolist() == [0, 3, 1, 3]
    assert tokenizer.token_bytes.tolist() == [1, 1, 0, 0]
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (2, 4)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS])
def test_no_text_can_end_its_own_document(tokenizer):
    for text in ("<|end|>", "a<|end|>b", "<|unk|>"):
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.end_of_document not in ids
    assert tokenizer.token_bytes[tokenizer.end_of_document] == 0
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHARS])
def test_a_saved_tokenizer_is_the_same_one_when_loaded(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.vocab_size == len(loaded.token_bytes) == tokenizer.vocab_size
    for ids, expected in zip(loaded.encode_batch(TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(ids, expected)


def test_two_processes_train_the_same_bpe_to_the_byte(tmp_path):
    program = (
        "import sys; from trainer.data.tokenizer import train;"
        "from pathlib import Path; texts = Path(sys.argv[1]).read_text().split('\\n\\n');"
        "print(train('bpe', texts, 600).to_json())"
    )
    text = tmp_path / "text"
    text.write_text(Path(module.__file__).read_text())
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(text)],
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "4"))
    ]
    assert outputs[0] == outputs[1]
    assert len(json.loads(outputs[0])["model"]["vocab"]) == 600


def test_much_text_is_sampled_evenly_and_within_the_bound(monkeypatch):
    monkeypatch.setattr(module, "BPE_TRAINING_CHARACTERS", 10_000)
    texts = [f"{n:07d} " * 25 for n in range(500)]  # 100,000 characters
    sample = module._sample(texts)
    assert sample == module._sample(texts)
    assert 9_000 <= sum(map(len, sample)) <= 10_000
    thirds = [sum(low <= int(piece[:7]) < low + 167 for piece in sample) for low in (0, 167, 334)]
    assert min(thirds) > 5
    assert sample == sorted(sample)


def test_a_fork_after_encoding_neither_warns_nor_hangs(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    program = (
        "import os, sys, warnings; from trainer.data.tokenizer import train;"
        "t = train('bpe', ['some text'] * 100, 300); t.encode_batch(['a b'] * 100);"
        "pid = os.fork();"
        "pid or (t._library.encode_batch(['a b'] * 100), os._exit(7));"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    # Python 3.12 and newer warn of any fork beside threads, which is the point here; the library warns by itself.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, b"")


def foreign(path: Path, **changes: object) -> Path:
    """A word-level tokenizer as it might be published elsewhere."""
    vocab = {"[UNK]": 0, "▁the": 1, "▁rope": 2, "<0x0A>": 3, "s": 4}
    library = Library(models.WordLevel(vocab, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(["</s>"])
    library.enable_truncation(2)
    library.enable_padding(length=9)
    library.save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_given_tokenizer_is_neither_cut_nor_padded_and_weighs_its_words(tmp_path):
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = Tokenizer.load(foreign(tmp_path / "t.json", decoder=decoder))
    (ids,) = tokenizer.encode_batch(["the rope the rope"])
    assert ids.tolist() == [1, 2, 1, 2]
    assert tokenizer.end_of_document == 5
    assert tokenizer.token_bytes[1:].tolist() == [4, 5, 1, 1, 0]


def test_a_byte_level_tokenizer_made_elsewhere_is_weighed_exactly(tmp_path):
    library = Library.from_str(BPE.to_json())
    library.add_tokens(["häuser"])
    library.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    text = "häuser, the rope – 東京"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("", "no usable tokenizer"),
        ('{"model": ', "no usable tokenizer"),
        ("[]", "no usable tokenizer"),
        ('{"version": "1.0"}', "no usable tokenizer"),
        (b"\xff\xfe", "no usable tokenizer"),
        ('{"toprope": "chars", "characters": ""}', "no usable tokenizer"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_refused_by_name(tmp_path, content, named):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=f"mine.json (.|\n)*{named}|mine.json is {named}|mine.json {named}"):
        Tokenizer.load(path)


def test_a_tokenizer_that_cannot_end_a_document_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no token that ends a document"):
        Tokenizer.load(foreign(tmp_path / "t.json", added_tokens=[]))


def test_a_tokenizer_of_the_hub_is_that_of_its_commit_and_a_commit_is_needed():
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = Path(constants.HF_HUB_CACHE, "models--maker--words", "snapshots", commit)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(BPE.to_json())  # as a download leaves it
    found = Tokenizer.load(Path(f"hub:maker/words@{commit}"))
    (ids,) = found.encode_batch([TEXTS[0]])
    assert ids.tolist() == BPE.encode_batch([TEXTS[0]])[0].tolist()
    with pytest.raises(TokenizerError, match=r"hub:maker/words@f{40} cannot be read: .*\n  Check name, commit"):
        Tokenizer.load(Path(f"hub:maker/words@{'f' * 40}"))
    for wrong in ("hub:maker/words", "hub:maker/words@main", "hub:a/b/c@" + commit):
        with pytest.raises(ConfigError, match=r"does not pin a commit\.\n.*hub:OWNER/NAME@COMMIT"):
            config.parse({"data": {"tokenizer": wrong}})
