"""Raw input to tensors and tensors to answers."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from export.processing import answers
from export.processing.images import decode_image
from export.processing.inputs import BadInput, ImageInput, TextInput, VectorInput
from export.processing.text import TextProcessor, pad
from export.processing.vectors import vector

STRETCH = ImageInput(height=8, width=6, resize="stretch", crop_fraction=1.0)


def file_of(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


def test_an_image_of_the_right_size_is_passed_on_bit_for_bit() -> None:
    image = noise(6, 8)
    np.testing.assert_array_equal(decode_image(file_of(image), STRETCH), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_the_graphs_shape(mode: str, channels: int) -> None:
    spec = ImageInput(height=5, width=7, channels=channels)  # type: ignore[arg-type]
    found = decode_image(file_of(Image.new(mode, (20, 30)), "TIFF" if mode == "CMYK" else "PNG"), spec)
    assert found.shape == (5, 7, channels)
    assert found.dtype == np.uint8


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (6, 8), (255, 0, 0, 0))
    assert (decode_image(file_of(clear), STRETCH) == 255).all()


def test_sixteen_bits_are_scaled_to_eight() -> None:
    deep = Image.fromarray(np.full((8, 6), 65535, np.uint16))
    assert (decode_image(file_of(deep), STRETCH) == 255).all()


def test_a_photograph_is_turned_as_its_camera_says() -> None:
    image = noise(8, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    found = decode_image(file_of(image, exif=exif), STRETCH)
    np.testing.assert_array_equal(found, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_crop_takes_the_centre_and_pad_keeps_everything() -> None:
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    crop = ImageInput(height=10, width=10, crop_fraction=1.0, interpolation="nearest")
    assert (decode_image(file_of(wide), crop) == 255).all()
    padded = decode_image(file_of(wide), ImageInput(height=30, width=30, resize="pad", interpolation="nearest"))
    assert padded[15, 15].tolist() == [255] * 3
    assert padded[0].max() == 0


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"no image", "not an image"),
        (file_of(noise(50, 50))[:2000], "damaged"),
        (bomb(20_000, 10_000), "pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "large|pixels"),
    ],
)
def test_what_is_no_image_says_so(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        decode_image(data, STRETCH)


def processor(max_length: int = 4) -> TextProcessor:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=9)
    return TextProcessor(TextInput(max_length=max_length), tokenizer.to_str().encode())


def test_texts_are_cut_and_never_padded_by_the_tokenizer() -> None:
    assert processor().encode(["a b", "b a b a b a"]) == [[1, 2], [2, 1, 2, 1]]


def test_an_empty_text_is_refused_with_its_place() -> None:
    with pytest.raises(BadInput, match="text 1 is empty"):
        processor().encode(["a", " "])


def test_padding_goes_to_a_multiple_but_not_beyond_the_longest_allowed() -> None:
    ids, mask = pad([[5, 6, 7], [8]], pad_id=9, max_length=100)
    assert ids.shape == (2, 8)
    assert ids[1].tolist() == [8, 9, 9, 9, 9, 9, 9, 9]
    assert mask.sum(axis=1).tolist() == [3, 1]
    assert pad([[1] * 9], 0, max_length=10)[0].shape == (1, 10)


def test_vectors_come_from_lists_and_from_bytes_alike() -> None:
    spec = VectorInput(features=3)
    np.testing.assert_array_equal(vector([1, 2.5, -3], spec), vector(np.float32([1, 2.5, -3]).tobytes(), spec))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 2.0], "takes 3"),
        ([1.0, float("nan"), 2.0], "number 1 of the vector is nan"),
        ([1e39, 0.0, 0.0], "finite"),
        (b"12345", "4 bytes"),
        ([["a"], 1, 2], "list of numbers"),
    ],
)
def test_what_is_no_vector_says_so(values: list[float] | bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        vector(values, VectorInput(features=3))


def test_softmax_does_not_overflow_and_sums_to_one() -> None:
    found = answers.softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5], [0.0, 1.0]])


def test_top_k_is_in_order_and_no_longer_than_there_are_labels() -> None:
    best = answers.top_k(np.array([0.2, 0.5, 0.3], np.float32), ["a", "b", "c"], 9)
    assert [p.label for p in best] == ["b", "c", "a"]
    assert best[0].index == 1


def test_embeddings_get_unit_length_and_zero_stays_zero() -> None:
    found = answers.normalize(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)


def of_bytes() -> Tokenizer:
    """Bytes as GPT-2 writes them, some of them merged, and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "he"), ("Ã", "©")]
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return made


def of_pieces() -> Tokenizer:
    """Pieces as SentencePiece has them: ▁ for a space, and bytes for what is in no piece."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁he", "é"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.mark.parametrize("tokenizer", [of_bytes(), of_pieces()])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40) | st.just(" he é <end>"))
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    processor = TextProcessor(TextInput(max_length=7), str(tokenizer.to_str()).encode())
    tokens = processor.whole(text, special=True)
    assert b"".join(map(processor.token_bytes, tokens)) == text.encode()
    assert processor.decode(tokens, special=True) == text


@pytest.mark.parametrize("length", [0, 1, 3, 5, 6, 23])
def test_a_whole_text_is_whole_however_long(length: int) -> None:
    tokenizer = of_bytes()
    end = tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing("<end> <end> $A <end>", special_tokens=[("<end>", end)])
    processor = TextProcessor(TextInput(max_length=8), str(tokenizer.to_str()).encode())
    letters = [tokenizer.token_to_id("x")] * length
    assert processor.whole("x" * length, special=False) == letters
    assert processor.whole("x" * length, special=True) == [end, end, *letters, end]
    assert processor.whole("x" * length + "<end>", special=True) == [end, end, *letters, end, end]
