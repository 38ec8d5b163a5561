"""Tokenizers from SentencePiece's own files (`spiece.model`), read without its library. Needs no torch."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

_UNKNOWN, _USER_DEFINED = 2, 4
_UNIGRAM = 1


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces with score and type, in the order of their ids; SentencePiece's normalisation as a compiled map."""

    pieces: tuple[tuple[str, float, int], ...]
    characters: bytes
    is_unigram: bool
    byte_fallback: bool
    dummy_prefix: bool
    single_spaces: bool


def parse_model(data: bytes) -> SentencePieceModel:
    """Reads a ModelProto (sentencepiece_model.proto of github.com/google/sentencepiece); raises ValueError for others.

    Of its fields: 1 pieces (1 piece, 2 score, 3 type), 2 trainer (3 kind of model, 35 byte fallback), 3 normaliser (2
    compiled characters, 3 dummy prefix, 4 no extra white space).
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0]
                pieces.append((_bytes(piece[1]).decode(), float(score), _integer(piece.get(3, 1))))
            elif number == 2:
                trainer |= dict(_fields(_bytes(value)))
            elif number == 3:
                normaliser |= dict(_fields(_bytes(value)))
        return SentencePieceModel(
            tuple(pieces),
            _bytes(normaliser.get(2, b"")),
            _integer(trainer.get(3, _UNIGRAM)) == _UNIGRAM,
            bool(trainer.get(35, 0)),
            bool(normaliser.get(3, 1)),
            bool(normaliser.get(4, 1)),
        )
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"this is no SentencePiece model ({error})") from error


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """The tokenizer that gives SentencePiece's ids, and </s> at the end; raises ValueError where it is no unigram's."""
    unknown = [index for index, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN]
    ids = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    if not model.is_unigram or len(unknown) != 1 or "</s>" not in ids or "<pad>" not in ids:
        raise ValueError("this is no unigram SentencePiece model with <pad> and </s>")
    vocabulary = [(piece, score) for piece, score, _ in model.pieces]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=unknown[0], byte_fallback=model.byte_fallback))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.characters)] if model.characters else []
    if model.single_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    own = [piece for piece, _, kind in model.pieces if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    return tokenizer


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message in protobuf's encoding."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, position = _varint(data, position)
        if length is None or position + length > len(data):
            raise IndexError(f"field {number} at byte {position}")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise IndexError(f"a number without end at byte {position}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise KeyError("a number in place of bytes")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise KeyError("bytes in place of a number")
    return value
