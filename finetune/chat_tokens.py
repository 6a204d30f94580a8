"""Conversations and completions as tokens, and which of them are learned: what a server would have read before each
answer, token by token, and the answer with the token that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from export.processing.chat import Message, render
from export.processing.inputs import BadInput, TextInput
from export.processing.text import TextProcessor
from finetune.data.chats import Chat, Completion, Conversation
from finetune.vocabulary import UNASKED

# More tokens than any text has.
UNCUT = 2**31 - 1
# For models that have no template of their own: OpenAI's ChatML, with the end of a text as the end of a turn.
START = "<|im_start|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Row:
    """tokens: int32 [tokens]. targets: the same, UNASKED where a token is read and not learned."""

    tokens: np.ndarray
    targets: np.ndarray


class ChatTokens:
    """How chats become rows of tokens. Raises BadInput for a chat that cannot be learned as it would be asked."""

    def __init__(self, spec: TextInput, tokenizer: bytes, template: str | None, ends: Sequence[int]) -> None:
        """template: of conversations, in Jinja. ends: the tokens that a model ends an answer with."""
        self.processor = TextProcessor(msgspec.structs.replace(spec, max_length=UNCUT), tokenizer)
        self.bos, self.eos = spec.bos_token_id, spec.eos_token_id
        self.template = template
        self.ends = frozenset(ends)

    def rows(self, chat: Chat) -> list[Row]:
        """One row; of a conversation that the template writes otherwise once it goes on (without what was thought, say)
        one for each answer that is learned, with what comes before it as it is then written."""
        if isinstance(chat, Completion):
            return [self._completion(chat)]
        spans = [self._span(chat, place) for place, learned in enumerate(chat.learned) if learned]
        whole = spans[-1][1]
        texts = [text for span in spans for text in span]
        if all(map(whole.startswith, texts)) and sorted(texts, key=len) == texts:
            return [self._conversation(spans)]
        return [self._conversation([span]) for span in spans]

    def _span(self, chat: Conversation, place: int) -> tuple[str, str]:
        """The text that asks for an answer, and the one that ends with it."""
        asking = self._render(chat.messages[:place], generate=True)
        answered = self._render(chat.messages[: place + 1], generate=False)
        if not answered.startswith(asking):
            raise BadInput(
                f"messages[{place}]: the chat template does not write an answer behind what asks for it, so it "
                "cannot be learned as it would be given"
            )
        return asking, answered

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        assert self.template is not None, "conversations have a template"
        name = self.processor.tokenizer.id_to_token
        bos, eos = ("" if token is None else name(token) or "" for token in (self.bos, self.eos))
        return render(self.template, messages, generate=generate, bos=bos, eos=eos)

    def _conversation(self, spans: Sequence[tuple[str, str]]) -> Row:
        text, tokens, learned = "", list[int](), list[bool]()
        for asking, answered in spans:
            tokens = self._longer(tokens, text, asking)
            begin = len(tokens)
            tokens = self._longer(tokens, asking, answered)
            ends = [place for place in range(begin, len(tokens)) if tokens[place] in self.ends]
            if not ends:
                raise BadInput("the chat template ends an answer with none of the tokens that the model ends at")
            learned += [False] * (begin - len(learned)) + [True] * (ends[-1] + 1 - begin)
            learned += [False] * (len(tokens) - len(learned))
            text = answered
        return _row(tokens, learned)

    def _completion(self, chat: Completion) -> Row:
        first = [] if self.bos is None else [self.bos]
        asked = self._longer([], "", chat.prompt)
        tokens = first + self._longer(asked, chat.prompt, chat.prompt + chat.completion)
        if self.eos is None:
            raise BadInput("the model has no token that ends a text")
        tokens.append(self.eos)
        begin = len(first) + len(asked)
        return _row(tokens, [False] * begin + [True] * (len(tokens) - begin))

    def _longer(self, tokens: list[int], text: str, longer: str) -> list[int]:
        """The tokens of `longer`, which begins with `text`, the first of them `tokens`: those of the whole, where they
        begin so; else, where a token would reach over the boundary, those of both parts."""
        whole = self._ids(longer)
        if whole[: len(tokens)] == tokens:
            return whole
        parts = tokens + self._ids(longer[len(text) :])
        decode = self.processor.tokenizer.decode
        if decode(parts, skip_special_tokens=False) != decode(whole, skip_special_tokens=False):
            raise BadInput("the tokenizer does not read an answer alone as it reads it behind what asks for it")
        return parts

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.processor.tokenizer.encode(text, add_special_tokens=False).ids
        return found


def _row(tokens: Sequence[int], learned: Sequence[bool]) -> Row:
    ids = np.array(tokens, np.int32)
    return Row(ids, np.where(np.array(learned), ids, UNASKED))
