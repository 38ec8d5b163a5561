"""Tokenizers from SentencePiece's files: the pieces of highest score, bytes for what no piece has, </s> at the end."""

import pytest

from longtake.models.wan.sentencepiece import build_tokenizer, parse_model
from releases import sentencepiece_model

WORDS = (("▁a", -2.0, 1), ("▁rab", -3.0, 1), ("bit", -3.0, 1), ("▁rabbit", -4.0, 1), ("▁", -5.0, 1), ("b", -6.0, 1))


def test_a_model_is_read_as_it_was_written() -> None:
    model = parse_model(sentencepiece_model(WORDS))
    assert model.pieces[:4] == (("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁a", -2.0, 1))
    assert len(model.pieces) == 3 + len(WORDS) + 256
    assert (model.is_unigram, model.byte_fallback, model.dummy_prefix, model.single_spaces) == (True,) * 4


def test_ids_are_those_of_sentencepiece() -> None:
    """As `SentencePieceProcessor.encode` gives them (0.2.3, on this model's file), with </s> behind."""
    tokenizer = build_tokenizer(parse_model(sentencepiece_model(WORDS)))
    ids = {word: index + 3 for index, (word, _, _) in enumerate(WORDS)}
    first_byte = 3 + len(WORDS)
    assert tokenizer.encode("a rabbit").ids == [ids["▁a"], ids["▁rabbit"], 1]
    assert tokenizer.encode("  a   rabb ").ids == [ids["▁a"], ids["▁rab"], ids["b"], 1]
    assert tokenizer.encode("bé").ids == [ids["▁"], ids["b"], first_byte + 0xC3, first_byte + 0xA9, 1]
    assert tokenizer.encode("").ids == [1]
    without = build_tokenizer(parse_model(sentencepiece_model(WORDS, fallback=False)))
    assert without.encode("bé").ids == [ids["▁"], ids["b"], 2, 1]


@pytest.mark.parametrize("damage", ["", "cut", "noise", "no pad"])
def test_other_bytes_are_refused(damage: str) -> None:
    whole = sentencepiece_model(WORDS)
    data = {"": b"", "cut": whole[:-3], "noise": b"\xff" * 40, "no pad": whole.replace(b"<pad>", b"<pod>")}[damage]
    with pytest.raises(ValueError, match="SentencePiece"):
        build_tokenizer(parse_model(data))
