"""Step decoding of networks that are tables: every answer is known, or worked out by trying all sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from server.runtime.decoding import Encoder, Prompt, StepDecoder
from server.runtime.search import Candidate, Options, normalized
from tests.server.chains import BEGIN, END, Chain, chance, specs

A, B, C = 4, 5, 6


class Recorder:
    """A session that keeps how many rows every run had."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        self.inner = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        self.rows.append(len(next(iter(inputs.values()))))
        found: list[np.ndarray] = self.inner.run(outputs, inputs)
        return found


def words(tokens: list[int]) -> str:
    return "".join("....abcdefgh"[token] for token in tokens)


AROUND: dict[str, Any] = {"begin": BEGIN, "end": END, "text": words, "max_sequences": 10_000}


def translator(chain: Chain) -> StepDecoder:
    graph, source = chain.decoder(), chain.encoder()
    encoder = Encoder(Recorder(source), specs(source.graph.output), pad_token_id=0, max_length=32)
    return StepDecoder(encoder, Recorder(graph), specs(graph.graph.input), specs(graph.graph.output), **AROUND)


def steps(decoder: StepDecoder) -> list[int]:
    assert isinstance(decoder.session, Recorder)
    return decoder.session.rows


def certain(*followers: tuple[int, Mapping[int, float]]) -> Chain:
    """A chain of these probabilities of what follows a token."""
    table = np.full((7, 7), -30.0)
    for token, shares in followers:
        for next_token, share in shares.items():
            table[token, next_token] = np.log(share)
    return Chain(table)


# After the likelier first token nothing is sure.
GARDEN = certain(
    (BEGIN, {A: 0.6, B: 0.4}),
    (A, {A: 0.25, B: 0.25, C: 0.25, END: 0.25}),
    (B, {END: 0.9, C: 0.1}),
    (C, {END: 1.0}),
)


def test_greedy_takes_the_likeliest_and_two_beams_find_a_better_sequence() -> None:
    decoder = translator(GARDEN)
    (greedy,), (best, second) = decoder.decode(
        [Prompt([3], Options(max_tokens=5)), Prompt([3], Options(max_tokens=5, beams=2, n=2, length_penalty=0.0))]
    )
    assert greedy.tokens[0] == A
    assert (best.tokens, best.finish_reason) == ([B], "stop")
    assert best.log_probability == pytest.approx(np.log(0.4 * 0.9), abs=1e-5)
    assert best.log_probabilities == pytest.approx([np.log(0.4)], abs=1e-5)
    assert second.score == pytest.approx(np.log(0.6 * 0.25), abs=1e-5)


def every_sequence(chain: Chain, prefix: list[int], source: list[int], most: int) -> list[tuple[float, list[int]]]:
    """All that can be said in `most` tokens, its end among them, with its log-probability, likeliest first."""
    going_on = [token for token in range(chain.vocabulary) if token != END]
    whole = [[*said, END] for length in range(most) for said in product(going_on, repeat=length)]
    found = []
    for tokens in whole + [list(said) for said in product(going_on, repeat=most)]:
        places = range(len(prefix), len(prefix) + len(tokens))
        path = [*prefix, *tokens]
        found.append((float(sum(chain.log_probabilities(path[:i], source)[path[i]] for i in places)), tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", [1, 2])
def test_beams_that_hold_everything_find_the_best_of_all_sequences(seed: int) -> None:
    chain = chance(vocabulary=7, seed=seed)
    options = Options(max_tokens=4, beams=300, n=5, length_penalty=0.0)
    source = [4, 6, 5]
    expected = every_sequence(chain, [BEGIN], source, 4)[:5]
    (found,) = translator(chain).decode([Prompt(source, options)])
    assert [one.tokens for one in found] == [[t for t in tokens if t != END] for _, tokens in expected]
    assert [one.log_probability for one in found] == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_the_length_penalty_prefers_the_longer() -> None:
    chain = certain((BEGIN, {A: 0.48, END: 0.52}), (A, {B: 0.9, C: 0.1}), (B, {C: 1.0}), (C, {END: 1.0}))
    (plain,), (normal,) = translator(chain).decode(
        [Prompt([4], Options(max_tokens=9, beams=2, length_penalty=alpha)) for alpha in (0.0, 1.0)]
    )
    assert plain.tokens == []
    assert normal.tokens == [A, B, C]
    # Equation 14 of Wu et al.: lp(4 tokens) = (5 + 4)^1 / (5 + 1)^1.
    assert normal.score == pytest.approx(np.log(0.48 * 0.9) / 1.5, abs=1e-5)
    assert normalized(-3.0, 4, 0.5) == pytest.approx(-3.0 / 1.5**0.5)


MIXED = [
    Options(max_tokens=12),
    Options(max_tokens=9, beams=3, n=2),
    Options(max_tokens=7, temperature=0.8, seed=5, n=2, best_of=3),
    Options(max_tokens=3),
    Options(max_tokens=12, temperature=1.5, top_p=0.8, seed=-1),
    Options(max_tokens=12, beams=4),
]
LENGTHS = [3, 9, 1, 17, 6, 2]


def test_a_batch_answers_as_one_by_one() -> None:
    numbers = np.random.default_rng(0)
    decoder = translator(chance(vocabulary=12, seed=3))
    prompts = [
        Prompt(numbers.integers(4, 12, length).tolist(), options)
        for length, options in zip(LENGTHS, MIXED, strict=True)
    ]
    together = decoder.decode(prompts)
    assert steps(decoder)[1] == 1 + 3 + 3 + 1 + 1 + 4
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = decoder.decode([prompt])
        assert [one.tokens for one in found] == [one.tokens for one in alone]
        assert [one.finish_reason for one in found] == [one.finish_reason for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-5)
        assert len(found) == prompt.options.n


def oracle(chain: Chain, prefix: list[int], source: list[int], most: int) -> tuple[list[int], list[float]]:
    tokens, gains = list(prefix), []
    while len(tokens) < len(prefix) + most:
        shares = chain.log_probabilities(tokens, source)
        if (best := int(shares.argmax())) == END:
            break
        tokens.append(best)
        gains.append(float(shares[best]))
    return tokens[len(prefix) :], gains


def test_greedy_is_the_likeliest_token_of_every_step() -> None:
    numbers, chain = np.random.default_rng(1), chance(vocabulary=12, seed=3)
    prompts = [numbers.integers(4, 12, length).tolist() for length in LENGTHS]
    asked = [Prompt(prompt, Options(max_tokens=10)) for prompt in prompts]
    for prompt, (found,) in zip(prompts, translator(chain).decode(asked), strict=True):
        tokens, gains = oracle(chain, [BEGIN], prompt, 10)
        assert found.tokens == tokens
        assert found.log_probabilities == pytest.approx(gains, abs=1e-4)


def test_what_is_finished_costs_no_more() -> None:
    decoder = translator(certain((BEGIN, {A: 1.0}), (A, {B: 1.0}), (B, {C: 1.0}), (C, {A: 1.0})))
    found = decoder.decode([Prompt([4], Options(max_tokens=most)) for most in (4, 1, 2, 4)])
    assert steps(decoder) == [4, 3, 2, 2]
    assert [one.tokens for (one,) in found] == [[A, B, C, A], [A], [A, B], [A, B, C, A]]
    assert {one.finish_reason for (one,) in found} == {"length"}
    assert isinstance(decoder.encoder.session, Recorder)
    assert decoder.encoder.session.rows == [4]


def test_who_is_finished_is_told_before_the_others() -> None:
    decoder = translator(certain((BEGIN, {A: 1.0}), (A, {B: 1.0}), (B, {C: 1.0}), (C, {A: 1.0})))
    told: list[tuple[int, int, list[int]]] = []

    def prompt(most: int) -> Prompt:
        return Prompt(
            [4], Options(max_tokens=most), done=lambda found: told.append((most, len(steps(decoder)), found[0].tokens))
        )

    decoder.decode([prompt(3), prompt(1), prompt(2)])
    assert told == [(1, 1, [A]), (2, 2, [A, B]), (3, 3, [A, B, C])]


def first_tokens(found: list[Candidate]) -> np.ndarray:
    return np.bincount([one.tokens[0] for one in found], minlength=7) / len(found)


def test_what_is_drawn_has_the_shares_of_the_model() -> None:
    decoder = translator(certain((BEGIN, {A: 0.5, B: 0.3, C: 0.2})))

    def asked(temperature: float, top_p: float = 1.0) -> Prompt:
        return Prompt([A], Options(1, n=4000, best_of=4000, temperature=temperature, top_p=top_p, seed=7))

    plain, cold, nucleus = decoder.decode([asked(1.0), asked(0.5), asked(1.0, 0.79)])
    assert first_tokens(plain)[[A, B, C]] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert first_tokens(cold)[[A, B, C]] == pytest.approx(np.array([25, 9, 4]) / 38, abs=0.03)
    assert first_tokens(nucleus)[[A, B, C]] == pytest.approx([5 / 8, 3 / 8, 0.0], abs=0.03)
    # Whatever the temperature, the log-probabilities are the model's.
    assert {round(one.log_probability, 4) for one in cold} == {round(np.log(share), 4) for share in (0.5, 0.3, 0.2)}


def test_a_seed_brings_the_same_again_and_another_does_not() -> None:
    decoder = translator(chance(vocabulary=12, seed=4))

    def drawn(seed: int | None, company: int) -> list[int]:
        others = [Prompt([5] * (i + 1), Options(max_tokens=6, temperature=1.0)) for i in range(company)]
        options = Options(max_tokens=8, temperature=1.2, seed=seed)
        return decoder.decode([*others, Prompt([4, 6], options)])[-1][0].tokens

    assert drawn(1, 0) == drawn(1, 0) == drawn(1, 5)
    assert len({tuple(drawn(seed, 0)) for seed in range(8)}) > 1
    assert len({tuple(drawn(None, 0)) for _ in range(8)}) > 1


def test_a_stop_text_ends_an_answer_even_where_it_spans_tokens() -> None:
    decoder = translator(certain((BEGIN, {B: 1.0}), (A, {B: 1.0}), (B, {C: 1.0}), (C, {A: 1.0})))
    ((one,), (two,)) = decoder.decode(
        [
            Prompt([A], Options(max_tokens=9, stop=("xy", "ca"))),
            Prompt([A], Options(max_tokens=9, beams=2, stop=("bc",))),
        ]
    )
    assert (words(one.tokens), one.finish_reason) == ("bca", "stop")
    assert (words(two.tokens), two.finish_reason) == ("bc", "stop")


def test_a_listener_hears_every_token_and_may_have_enough() -> None:
    decoder = translator(certain((BEGIN, {B: 1.0}), (B, {C: 1.0}), (C, {A: 0.3, END: 0.7})))
    heard: list[int] = []

    def listen(token: int) -> bool:
        heard.append(token)
        return True

    ((one,), (two,)) = decoder.decode(
        [Prompt([A], Options(max_tokens=9), listen), Prompt([A], Options(max_tokens=9), lambda token: False)]
    )
    assert heard == one.tokens == [B, C]
    assert two.tokens == [B]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_likeliest_others_are_noted(beams: int) -> None:
    chain = chance(vocabulary=12, seed=7)
    (found,), (plain,) = translator(chain).decode(
        [Prompt([4], Options(max_tokens=5, beams=beams, alternatives=2)), Prompt([4, 5], Options(max_tokens=5))]
    )
    assert found.tokens
    assert plain.alternatives == []
    for step, others in enumerate(found.alternatives):
        shares = chain.log_probabilities([BEGIN, *found.tokens[:step]], [4])
        best = np.argsort(-shares)[:2].tolist()
        assert list(others) == best
        assert list(others.values()) == pytest.approx(shares[best].tolist(), abs=1e-4)


def test_no_more_sequences_run_together_than_may() -> None:
    decoder = translator(chance(vocabulary=12, seed=3))
    decoder.max_sequences = 5
    asked = [Prompt([4], Options(max_tokens=2, beams=beams)) for beams in (1, 3, 2, 8, 1)]
    found = decoder.decode(asked)
    assert [len(one) for one in found] == [1] * 5
    assert isinstance(decoder.encoder, Encoder)
    assert isinstance(decoder.encoder.session, Recorder)
    assert decoder.encoder.session.rows == [2, 1, 1, 1]


@pytest.mark.parametrize("beams", [1, 3])
def test_attention_follows_the_path_of_an_answer(beams: int) -> None:
    decoder = translator(chance(vocabulary=12, seed=6))
    options = Options(max_tokens=6, beams=beams, n=beams, attention=True)
    for source, found in zip(
        ([4, 5, 6], [7] * 10), decoder.decode([Prompt([4, 5, 6], options), Prompt([7] * 10, options)]), strict=True
    ):
        for one in found:
            assert one.attention is not None
            fed = [BEGIN, *one.tokens][: len(one.tokens)]
            expected = [[token + 100 * step] * len(source) for step, token in enumerate(fed)]
            assert one.attention.tolist() == expected


def test_graphs_that_do_not_fit_together_are_refused() -> None:
    chain = chance(vocabulary=7, seed=1)
    source, graph = chain.encoder(), chain.decoder()
    inputs, outputs = specs(graph.graph.input), specs(graph.graph.output)

    def make(encoded: Any, taken: Any, answered: Any) -> StepDecoder:
        return StepDecoder(Encoder(Recorder(source), encoded, 0, 32), Recorder(graph), taken, answered, **AROUND)

    encoded = specs(source.graph.output)
    with pytest.raises(ValueError, match="puts out memory"):
        make(encoded[1:], inputs, outputs)
    with pytest.raises(ValueError, match="takes no past"):
        make(encoded, [tensor for tensor in inputs if tensor.name != "past"], outputs)
    with pytest.raises(ValueError, match="no logits"):
        make(encoded, inputs, outputs[1:])
    with pytest.raises(ValueError, match="no input token"):
        make(encoded, inputs[1:], outputs)
