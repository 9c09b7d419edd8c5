"""Text to token ids and back, for one model.

Control tokens (`<|im_end|>`, `</s>`) steer a model, so who wrote them matters. Text from users is
encoded with no control token recognised: typed `<|im_end|>` becomes the ids of its characters. In a
chat, the template's own control tokens count and those inside messages do not. How: before rendering,
each control token inside a message is wrapped in two characters that occur nowhere else; the rendered
text is then cut at the control tokens that are not wrapped, the wrapping is taken away, and what lies
between is encoded as plain text. String methods in a template may part a wrapping; a lone mark still
separates what stands on its two sides.

Control tokens are those the model marks as special, and added tokens that the chat template writes.

Decoding joins the bytes of the tokens and reads them as UTF-8. Bytes that are none become U+FFFD, one
for each maximal ill-formed run. The spacing of English punctuation is never "cleaned up".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import RequestError, TokenizerError
from .backends import Backend
from .chat_template import ChatTemplate
from .stream import StreamDecoder

_WHITE_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class ControlToken:
    """A token that steers the model.

    hidden: decoding leaves it out. lstrip, rstrip: it takes the white space before or after it along.
    single_word: it counts only where no word character touches it.
    """

    text: str
    id: int
    hidden: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def pattern(self) -> str:
        """A regular expression that finds the token. The white space it takes along is left to the code
        that searches: in the expression it would cost quadratic time on long runs of spaces."""
        found = re.escape(self.text)
        return rf"(?<!\w){found}(?!\w)" if self.single_word else found


@dataclass(frozen=True)
class Conventions:
    """What a model's files say about the use of its tokens.

    prefix_ids, suffix_ids: put around a text by `encode(add_special=True)`. named: names by which
    templates know tokens, for example {"bos_token": "<s>"}.
    """

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)


class Tokenizer:
    """The tokenizer of one model. Made by `load_tokenizer`; may be used from any thread."""

    def __init__(
        self, backend: Backend, control_tokens: Sequence[ControlToken], conventions: Conventions
    ) -> None:
        self._backend = backend
        self._conventions = conventions
        self._spelling = backend.spelling
        self._controls = {token.id: token for token in control_tokens}
        self._by_text = {token.text: token for token in control_tokens}
        unknown = conventions.named.get("unk_token")
        self._steering = {token.id for token in control_tokens if token.text != unknown}
        longest_first = sorted(control_tokens, key=lambda token: len(token.text), reverse=True)
        self._meant = _any_of(token.pattern for token in longest_first)
        self._typed = _any_of(re.escape(token.text) for token in longest_first)
        self._bytes_cache: dict[int, bytes] = {}
        source = conventions.chat_template
        self._template = None if source is None else ChatTemplate(source)
        self.vocab_size = max([backend.vocab_size, *(token.id + 1 for token in control_tokens)])

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None."""
        return self._conventions.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a reply."""
        return self._conventions.eos_ids

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the chat template, or None."""
        return self._conventions.chat_template

    def encode(self, text: str, *, add_special: bool = True, allow_special: bool = False) -> list[int]:
        """The ids of `text`.

        add_special: put around it what the model expects (often a BOS token). allow_special: control
        tokens written in the text count as such; never set it for text from users.
        Raises RequestError for text with lone surrogates, which is no Unicode text.
        """
        _check_unicode(text)
        parts = self._cut(text, re.compile(self._meant)) if allow_special else [text]
        ids = self._encode_parts(parts)
        if add_special:
            return [*self._conventions.prefix_ids, *ids, *self._conventions.suffix_ids]
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The ids of a conversation, rendered by the model's chat template.

        messages: dictionaries with "role" and "content", as in the chat API. variables: further inputs
        of the template, for example {"tools": [...]}. Control tokens inside either stay plain text.
        Raises TokenizerError where there is no template or it fails, RequestError for messages that
        are none.
        """
        if self._template is None:
            raise TokenizerError(
                "this model has no chat template, so messages cannot be rendered; give a plain prompt instead"
            )
        _check_messages(messages)
        inputs = {**(variables or {}), "messages": messages}
        opening, closing = _unused_characters([*_strings(inputs), self._template.source])
        typed = re.compile(self._typed)
        marked = _map_strings(inputs, lambda text: typed.sub(rf"{opening}\g<0>{closing}", text))
        assert isinstance(marked, dict), "mapping a dictionary gives one"
        rendered = self._template.render(
            {
                "tools": None,
                "documents": None,
                **self._conventions.named,
                **marked,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        _check_unicode(rendered)
        wrapped = rf"{opening}(?P<typed>{self._typed}){closing}|(?P<lone>[{opening}{closing}])"
        return self._encode_parts(self._cut(rendered, re.compile(f"{wrapped}|{self._meant}")))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of `ids`.

        skip_special: leave control tokens out. continuation: the ids go on from earlier text, so a
        leading space is text and stays.
        """
        data = b"".join(self._shown_bytes(token_id, skip_special) for token_id in ids)
        if self._spelling.strip_first_space and not continuation:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> StreamDecoder:
        """A decoder fed one id at a time; its pieces joined are `decode` of the same ids."""
        return StreamDecoder(
            lambda token_id: self._shown_bytes(token_id, skip_special),
            strip_first_space=self._spelling.strip_first_space and not continuation,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds inside a text; b"" for an id the vocabulary does not use."""
        found = self._bytes_cache.get(token_id)
        if found is None:
            control = self._controls.get(token_id)
            if control is not None:
                found = control.text.encode("utf-8")
            else:
                piece = self._backend.piece(token_id) if 0 <= token_id < self.vocab_size else None
                found = b"" if piece is None else self._spelling.to_bytes(piece)
            self._bytes_cache[token_id] = found
        return found

    def _shown_bytes(self, token_id: int, skip_special: bool) -> bytes:
        if skip_special and (control := self._controls.get(token_id)) is not None and control.hidden:
            return b""
        return self.token_bytes(token_id)

    def _encode_parts(self, parts: Iterable[str | ControlToken]) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, ControlToken):
                ids.append(part.id)
            else:
                ids += self._encode_plain(part, first=index == 0)
        return ids

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        """Ids of plain text. Vocabularies that list control tokens among their words (Unigram ones do)
        find them there; such words are then encoded character by character."""
        ids = self._backend.encode_plain(text, first=first)
        if self._steering.isdisjoint(ids):
            return ids
        parts = re.split(f"({self._typed})", text)
        pieces = [[part] if index % 2 == 0 else list(part) for index, part in enumerate(parts)]
        ids = []
        for piece in itertools.chain.from_iterable(pieces):
            ids += self._backend.encode_plain(piece, first=first and not ids) if piece else []
        return ids

    def _cut(self, text: str, finder: re.Pattern[str]) -> Iterator[str | ControlToken]:
        """Plain stretches and control tokens, in turn. Text that `finder` calls typed stays plain."""
        plain: list[str] = []
        end = 0
        for match in finder.finditer(text):
            plain.append(text[end : match.start()])
            end = match.end()
            groups = match.groupdict()
            if groups.get("typed") is not None:
                plain.append(groups["typed"])
            elif groups.get("lone") is None:
                token = self._by_text[match[0]]
                stretch = "".join(plain)
                if stretch := stretch.rstrip() if token.lstrip else stretch:
                    yield stretch
                plain.clear()
                yield token
                if token.rstrip and (spaces := _WHITE_SPACE.match(text, end)):
                    end = spaces.end()
        if stretch := "".join(plain) + text[end:]:
            yield stretch


def _any_of(patterns: Iterable[str]) -> str:
    return "|".join(patterns) or r"(?!)"


def _check_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a text is needed, and {type(text).__name__} was given")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}, which is no"
            " Unicode character; decode the input as UTF-8 with errors='replace'"
        ) from None


def _check_messages(messages: Sequence[Mapping[str, object]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError(
            'a chat is a list of messages like {"role": "user", "content": "Hi"}, at least one'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {index} of the chat is no dictionary with a text under 'role'")


def _strings(value: object) -> Iterator[str]:
    """All texts inside lists and dictionaries, keys left out; each checked to be Unicode."""
    if isinstance(value, str):
        _check_unicode(value)
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _map_strings(value: object, change) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    """Two private-use characters that occur in none of `texts`."""
    used = set().union(*map(set, texts))
    free = (chr(code) for code in range(0xF0000, 0xFFFFD) if chr(code) not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        raise RequestError("the messages use every character of Unicode's private-use plane 15") from None
