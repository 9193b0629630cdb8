"""Text to tokens and back: a byte-level BPE trained on the training split, bytes, characters, or a given one."""

import hashlib
import heapq
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainer import errors, files
from trainer.data.reading import first_line
from trainer.errors import TokenizerError

END = "<|end|>"
# Names that tokenizers made elsewhere give the token between documents, most specific first.
_KNOWN_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "[SEP]")
# BPE merges stop changing long before this much text; 8 MB train in seconds and bound the memory.
BPE_TRAINING_CHARACTERS = 8_000_000
_PIECE = 1 << 16
_parallelism_is_ours: set[bool] = set()  # not empty once _threads has set the library's environment variable


class Tokenizer(ABC):
    """Text to token ids and back. One JSON text is a tokenizer's whole identity."""

    vocab_size: int
    end_of_document: int
    """Id of the token that follows every document."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids (int64) of each text, without any end-of-document token."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of the ids; special tokens are dropped, incomplete characters become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str: ...

    @abstractmethod
    def _pieces(self) -> list[bytes]: ...

    @cached_property
    def pieces(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for; none for special tokens."""
        return self._pieces()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64[vocab]: number of UTF-8 bytes of each token, 0 for special ones; for bits per byte."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        files.write(path, self.to_json())

    @staticmethod
    def load(path: Path, sha256: str | None = None) -> "Tokenizer":
        """Read what `save` wrote, or any tokenizer.json of the `tokenizers` library.

        Raises TokenizerError if it is unusable, or if the file's digest is not `sha256` where that is given.
        """
        text = read_json(path)
        if sha256 is not None and hashlib.sha256(text.encode()).hexdigest() != sha256:
            raise TokenizerError(
                f"{path} has changed since the run wrote it (its SHA-256 is not {sha256[:16]}…).\n"
                "  The run's token ids would mean other text. Restore it, or resume the run, which writes it anew."
            )
        return from_json(text, str(path))


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the tokens; 256 ends a document."""

    vocab_size = 257
    end_of_document = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) for i in ids if i != self.end_of_document).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"toprope": "bytes"})

    def _pieces(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)] + [b""]


class CharTokenizer(Tokenizer):
    """The characters of the training split, sorted, then <|end|> and <|unk|>.

    An unknown character counts 0 bytes, so text with unknown characters scores more bits per byte, never fewer.
    """

    def __init__(self, characters: str) -> None:
        self._characters = characters
        self._codes = np.array([ord(c) for c in characters], dtype=np.uint32)
        self.end_of_document = len(characters)
        self.unknown = len(characters) + 1
        self.vocab_size = len(characters) + 2

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            ids = np.searchsorted(self._codes, codes)
            # searchsorted gives the place of an unknown character too, one past the end at most.
            known = self._codes[np.minimum(ids, len(self._codes) - 1)] == codes
            encoded.append(np.where(known, ids, self.unknown))
        return encoded

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        shown = [*self._characters, "", "\ufffd"]
        return "".join(shown[int(i)] for i in ids)

    def to_json(self) -> str:
        return json.dumps({"toprope": "chars", "characters": self._characters})

    def _pieces(self) -> list[bytes]:
        return [c.encode() for c in self._characters] + [b"", b""]


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library: our own BPE or one made elsewhere.

    Text that looks like a special token is encoded as plain text, so that a document cannot end itself.
    `token_bytes` is exact for byte-level BPE without a normalizer. Otherwise a token's bytes are those it adds when
    decoded after a letter, which is right for "▁word" and "##ing" and approximate for what a normalizer changed.
    """

    def __init__(self, text: str, name: str) -> None:
        from tokenizers import Tokenizer as Library  # late: byte and character runs need no library

        self._text = text
        try:
            self._library: Any = Library.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise _broken(name, error) from None
        # The file may set these for its own use; our documents are neither cut nor filled up.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        self._special = {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}
        # Not the number of tokens: ids may have gaps, and the embedding needs a row up to the largest.
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        ends = [i for i in map(self._library.token_to_id, _KNOWN_ENDS) if i in self._special]
        if not ends:
            raise TokenizerError(
                f"{name} has no token that ends a document.\n"
                f"  One of {', '.join(_KNOWN_ENDS)} must be among its special tokens. Add {END} to its added_tokens."
            )
        self.end_of_document = ends[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with _threads():
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> str:
        return self._text

    def _pieces(self) -> list[bytes]:
        pieces = [b""] * self.vocab_size
        # The bytes of byte-level BPE's tokens are in its vocabulary; others only by decoding a token after another one.
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self._text).get("decoder"))
        added = self._library.get_added_tokens_decoder()
        # A plain word to decode other tokens after: at the start of a text, "▁the" loses its space.
        plain = {t: i for t, i in self._library.get_vocab().items() if t.isascii() and t.isalnum()}
        anchor = plain[min(plain)] if plain else 0
        before = len(self._library.decode([anchor]).encode())
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in self._special:
                continue
            if i in added:
                pieces[i] = token.encode()
            elif is_byte_level:
                pieces[i] = bytes(_BYTE_OF_CHARACTER.get(c, ord("?")) for c in token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                pieces[i] = bytes.fromhex(token[3:5])  # for characters outside the vocabulary
            else:
                pieces[i] = self._library.decode([anchor, i]).encode()[before:]
        return pieces


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one character: a printable one as itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def train(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of `kind` ("bpe", "chars" or "bytes"); the same texts give the same tokenizer.

    A BPE has fewer than `vocab_size` tokens if the text has no more pairs to merge. Of more than 8 million characters,
    it sees pieces picked by hash, evenly spread over the whole.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer("".join(sorted(set(itertools.chain.from_iterable(texts)))))
    return _train_bpe(texts, vocab_size)


def from_json(text: str, name: str) -> Tokenizer:
    """Return the tokenizer that `text` describes; `name` is for errors. Raises TokenizerError."""
    try:
        tree = files.parse_object(text)
    except ValueError as error:
        raise _broken(name, error) from None
    kind = tree.get("toprope")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars" and isinstance(tree.get("characters"), str) and tree["characters"]:
        return CharTokenizer(tree["characters"])
    return LibraryTokenizer(text, name)


def read_json(path: Path) -> str:
    """Read a tokenizer.json; `path` may be "hub:OWNER/NAME@COMMIT". Raises TokenizerError if it cannot be read."""
    if str(path).startswith("hub:"):
        return _from_hub(str(path))
    try:
        return files.read(path.expanduser()).decode()  # as bytes: text mode would alter line ends
    except FileNotFoundError:
        raise TokenizerError(
            f"{path} does not exist (from {Path.cwd()}).\n"
            '  data.tokenizer is "bpe", "bytes", "chars", or the path of a tokenizer.json. Check the spelling.'
        ) from None
    except OSError as error:
        rule, remedy = "It says what the token ids mean.", "Make it readable."
        raise TokenizerError(errors.of_system(error, f"{path} cannot be read", rule, remedy)) from None
    except UnicodeDecodeError as error:
        raise _broken(str(path), error) from None
    except RuntimeError:
        raise TokenizerError(
            f"{path} has no place: the home directory is not known.\n  Write the whole path, or set $HOME."
        ) from None


def _from_hub(source: str) -> str:
    from tokenizers import Tokenizer as Library

    name, _, commit = source.removeprefix("hub:").partition("@")
    try:
        return Library.from_pretrained(name, revision=commit).to_str()
    except Exception as error:  # the library raises plain Exception, also for what the network does
        remedy = "Check name, commit and the network; a private repository needs HF_TOKEN."
        raise TokenizerError(f"{source} cannot be read: {first_line(error)}.\n  {remedy}") from None


def _broken(name: str, why: object) -> TokenizerError:
    rule = "It must be a whole tokenizer.json as the tokenizers library saves it. Save or copy it again."
    return TokenizerError(f"{name} is no usable tokenizer: {why}.\n  {rule}")


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _threads():
        library.train_from_iterator(_sample(texts), trainer)
    return LibraryTokenizer(library.to_str(), "the trained tokenizer")


def _sample(texts: Iterable[str]) -> list[str]:
    """Return pieces of the texts in order, at most BPE_TRAINING_CHARACTERS together, chosen by their hash."""
    kept: list[tuple[int, int, str]] = []  # a heap: the piece with the largest hash is dropped first
    total = 0
    pieces = (text[start : start + _PIECE] for text in texts for start in range(0, len(text), _PIECE))
    for order, piece in enumerate(pieces):
        rank = int.from_bytes(hashlib.blake2b(piece.encode(), digest_size=8).digest(), "big")
        heapq.heappush(kept, (-rank, order, piece))
        total += len(piece)
        while total > BPE_TRAINING_CHARACTERS and len(kept) > 1:  # one piece is always kept
            total -= len(heapq.heappop(kept)[2])
    return [piece for _, _, piece in sorted(kept, key=lambda entry: entry[1])]


@contextmanager
def _threads() -> Iterator[None]:
    """Let the library use all cores inside, and one thread afterwards, for processes forked later.

    A forked child does not have the thread pool and would hang on it. A value that the user has set is kept.
    """
    name = "TOKENIZERS_PARALLELISM"
    is_ours = name not in os.environ or _parallelism_is_ours
    if is_ours:
        _parallelism_is_ours.add(True)
        os.environ[name] = "true"
    try:
        yield
    finally:
        if is_ours:
            os.environ[name] = "false"
