"""Messages ↔ tokens: the only place that knows a tokenizer or a chat template.

    chat = load_chat("builtin:bytes")
    prompt = chat.encode([Message("system", system), Message("user", observation)])
    response = …  # sampled token ids
    text = chat.decode(response)
    prompt = chat.extend(prompt, response, next_observation)  # what was sampled stays as it is

**Tokens in, tokens out.** The second prompt of an episode is the first prompt, the sampled tokens
and the tokens of the next user turn; no answer is ever tokenized again.

**Contents are data.** A template is rendered once per sequence of roles, with a marker in place of
every content, and cut at the markers. The pieces between are tokenized as control text, the
contents as plain text in which no control token exists: a hint that holds "<|im_end|>" becomes
the ordinary tokens of these ten characters and cannot end a turn. Control tokens are the special
tokens of the tokenizer and all further added tokens that its template writes. The price: a
template's own editing of contents (trimming blanks, dropping old reasoning) does not happen, and
no token spans the border of a content (only a content that begins with a newline can notice).
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from codjax import checks

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Contents one after the other; only the end of the model's own turn is marked.
SYMBOLS_TEMPLATE = (
    "^{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %};{% endif %}{% endfor %}"
)
SYMBOLS = "abcdUDLR?-:#<>+"

_CACHED_TEXTS = 4096  # system prompts and short observations come again and again
_CACHED_LENGTH = 4000  # characters; longer texts are rarely repeated and would fill the cache


class Message(NamedTuple):
    """One message of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Chat:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: the transformers tokenizer, to be saved beside exported weights.
        vocab_size: one more than the largest token id.
        pad_token: id that fills unused places.
        end_of_turn: id with which the template closes a turn of the model.
        stop_tokens: ids that end a response: `end_of_turn`, and the tokenizer's own end of text.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self.tokenizer = tokenizer
        self._name = name
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise checks.ConfigError(
                f"tokenizer.source: {name!r} has no fast tokenizer (tokenizer.json); "
                "save one there with transformers' save_pretrained."
            )
        if not tokenizer.chat_template:
            raise checks.ConfigError(
                f"tokenizer.source: {name!r} has no chat template; use the instruct model's "
                "tokenizer or put a chat_template.jinja into the folder."
            )
        self._backend = tokenizer.backend_tokenizer
        self._pieces_of = functools.cache(self._render_pieces)
        self._short_tokens = functools.lru_cache(_CACHED_TEXTS)(self._tokenize_content)
        self._open_user, self._close_user, written = self._extension()
        self._contents = _without_control(tokenizer, written, name=name)
        self._control = _control_tokens(tokenizer, written)
        self.vocab_size: int = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.end_of_turn = int(self._open_user[0])
        eos = tokenizer.eos_token_id
        self.stop_tokens: tuple[int, ...] = (
            (self.end_of_turn,) if eos in (None, self.end_of_turn) else (self.end_of_turn, int(eos))
        )
        pad = tokenizer.pad_token_id
        self.pad_token: int = self.stop_tokens[-1] if pad is None else int(pad)
        self._check_composition()

    def encode(self, messages: Sequence[Message]) -> np.ndarray:
        """The int32 prompt that asks the model for its next turn, without a thinking part."""
        pieces = self._pieces_of(tuple(message.role for message in messages))
        parts = [pieces[0]]
        for message, piece in zip(messages, pieces[1:], strict=True):
            parts += [self._content(message.content), piece]
        return np.concatenate(parts)

    def extend(self, prompt: np.ndarray, response: np.ndarray, observation: str) -> np.ndarray:
        """The next prompt of a conversation: `prompt`, `response`, then the next user turn.

        Args:
            prompt: int32 `[n]`, what the model was fed.
            response: int32 `[m]`, what it sampled. If it was cut before its end of turn, that
                token is added, as a token of the prompt.
            observation: content of the next user message.

        Returns:
            int32, beginning with `prompt` and `response`.
        """
        ends = len(response) > 0 and response[-1] == self.end_of_turn
        opening = self._open_user[1:] if ends else self._open_user
        content = self._content(observation)
        return np.concatenate([prompt, response, opening, content, self._close_user])

    def messages(self, prompt: np.ndarray) -> list[Message]:
        """The conversation that a prompt of `encode` and `extend` holds, for those who take texts.

        Contents hold no control tokens and the template's pieces do, so a prompt falls apart in one
        way only. Where the template opens an answer with an empty thinking part, that is left out.

        Args:
            prompt: int32 `[n]`, of a conversation that begins with a system and a user message.

        Raises:
            ValueError: the template does not mark where a message ends, or the prompt is not
                made of its pieces.
        """
        head, to_user, ask = self._pieces_of(("system", "user"))
        answered = self._pieces_of(("system", "user", "assistant", "user"))[2]
        asking = sorted((ask, answered, self._close_user), key=len, reverse=True)
        follows = {"system": [to_user], "user": asking, "assistant": [self._open_user]}
        if not np.array_equal(prompt[: len(head)], head):
            raise ValueError("the prompt does not begin as the template does.")
        found, role, start = [], "system", len(head)
        while role != "assistant" or start < len(prompt):
            end, after = self._border(prompt, start, follows[role])
            found.append(Message(role, self.decode(prompt[start:end])))
            role, start = "assistant" if role == "user" else "user", after
        return found

    def _border(
        self, prompt: np.ndarray, start: int, pieces: Sequence[np.ndarray]
    ) -> tuple[int, int]:
        """(end of the content that begins at `start`, end of the piece behind it)."""
        ends = start + np.flatnonzero(np.isin(prompt[start:], self._control))
        for piece in pieces:
            marks = np.flatnonzero(np.isin(piece, self._control))
            if not len(marks):
                raise ValueError("the template does not mark where every message ends.")
            begin = int(ends[0] - marks[0]) if len(ends) else -1
            stop = begin + len(piece)
            if begin >= start and np.array_equal(prompt[begin:stop], piece):
                return begin, stop
        raise ValueError("a message of the prompt does not end as the template ends it.")

    def respond(self, text: str) -> np.ndarray:
        """The int32 tokens of a model's turn that says `text`, with its end of turn."""
        return np.concatenate([self._content(text), self._open_user[:1]])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of the tokens without special tokens; bytes that are no text become U+FFFD."""
        return self._backend.decode(tokens.tolist(), skip_special_tokens=True)

    def show(self, tokens: np.ndarray) -> str:
        """The text of the tokens with special tokens visible, for people and for scripts."""
        return self._backend.decode(tokens.tolist(), skip_special_tokens=False)

    def _content(self, text: str) -> np.ndarray:
        if len(text) <= _CACHED_LENGTH:
            return self._short_tokens(text)
        return self._tokenize_content(text)

    def _tokenize_content(self, text: str) -> np.ndarray:
        # A lone surrogate, which model output read from JSON can hold, has no bytes.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return np.array(self._contents.encode(text, add_special_tokens=False).ids, np.int32)

    def _tokenize_control(self, text: str) -> np.ndarray:
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def _render_pieces(self, roles: tuple[str, ...]) -> list[np.ndarray]:
        return [self._tokenize_control(text) for text in self._template_texts(roles)]

    def _template_texts(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes before, between and after the contents of these roles."""
        markers = [f"codjax-content-{index}-here" for index in range(len(roles))]
        rest = self._apply_template(roles, markers)
        texts = []
        for marker in markers:
            before, found, rest = rest.partition(marker)
            if not found or marker in rest:
                raise self._unusable(f"it does not write the content of every {roles} once, as is")
            texts.append(before)
        return [*texts, rest]

    def _apply_template(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        import jinja2

        # Only templates of models that can think know the switch.
        switch = {"enable_thinking": False} if self._knows_thinking() else {}
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **switch
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise self._unusable(f"it refuses the roles {tuple(roles)} ({error})") from error

    def _knows_thinking(self) -> bool:
        return "enable_thinking" in str(self.tokenizer.chat_template)

    def _extension(self) -> tuple[np.ndarray, np.ndarray, set[int]]:
        """Tokens before and after the next user content; and all added ids that are written.

        Raises:
            ValueError: the template writes something else there in a longer conversation, or
                changes what stands before, so that turns cannot be appended.
        """
        first = self._template_texts(("system", "user"))
        short = self._template_texts(("system", "user", "assistant", "user"))
        long = self._template_texts(("system", *("user", "assistant") * 2, "user"))
        if first[:2] != short[:2] or first[:2] != long[:2] or short[:3] != long[:3]:
            raise self._unusable("it changes the beginning of a conversation as more turns follow")
        if not first[2].startswith(short[2]):
            raise self._unusable("it opens the model's turn differently once the turn is over")
        if short[3:] != long[5:] or short[3] != long[3]:
            raise self._unusable("what it writes around a user turn depends on the turns before")
        opening, closing = map(self._tokenize_control, short[3:])
        added = set(self._backend.get_added_tokens_decoder())
        if len(opening) == 0 or int(opening[0]) not in added:
            raise self._unusable("it does not end the model's turn with a token of its own")
        pieces = [self._tokenize_control(text) for text in (*first, *long)]
        return opening, closing, added & {int(token) for piece in pieces for token in piece}

    def _check_composition(self) -> None:
        """Piecewise tokens must be those of the whole text, or the model meets an odd format."""
        roles, contents = ("system", "user"), ("Be brief.", "What now?")
        whole = self._tokenize_control(self._apply_template(roles, contents))
        parts = self.encode([Message(*pair) for pair in zip(roles, contents, strict=True)])
        if not np.array_equal(whole, parts):
            raise self._unusable(
                "its tokenizer writes a text differently when cut at the template's borders"
            )

    def _unusable(self, reason: str) -> checks.ConfigError:
        return checks.ConfigError(
            f"tokenizer.source: the chat template of {self._name!r} cannot be extended turn by "
            f"turn: {reason}. Use a template that appends turns, such as ChatML."
        )


def load_chat(source: str) -> Chat:
    """The chat of `config.tokenizer.source`.

    Args:
        source: a Hugging Face folder with a fast tokenizer and a chat template, "builtin:bytes"
            (256 bytes and ChatML; every text survives encoding and decoding), or
            "builtin:symbols" (one token a character of the compact environments).

    Raises:
        ConfigError: no such builtin or folder, or a tokenizer or template that cannot serve.
    """
    if source in _BUILTINS:
        return Chat(_BUILTINS[source](), name=source)
    if source.startswith("builtin:"):
        raise checks.ConfigError(
            f"tokenizer.source: no builtin {source!r}; there are {', '.join(sorted(_BUILTINS))}."
        )
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        raise checks.ConfigError(
            f"tokenizer.source: {source!r} is no folder; give a Hugging Face folder on this "
            f"machine (nothing is downloaded) or one of {', '.join(sorted(_BUILTINS))}."
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its parsers raise what they like, `Exception` itself among it
        said = " ".join(str(error).split())
        raise checks.ConfigError(f"tokenizer.source: no tokenizer in {source!r}: {said}") from error
    return Chat(tokenizer, name=source)


def _bytes_tokenizer() -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={_byte_letter(byte): byte for byte in range(256)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(backend, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _symbols_tokenizer() -> Any:
    import tokenizers

    # "^" and ";" are no letters of the model but added tokens, so that contents cannot hold them.
    letters = {letter: index for index, letter in enumerate(("<unk>", *SYMBOLS))}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=letters, merges=[], unk_token="<unk>", fuse_unk=False)
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["<unk>", "^", ";", "<pad>"])
    specials = {"bos_token": "^", "eos_token": ";", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _wrap(backend, SYMBOLS_TEMPLATE, **specials)


_BUILTINS = {"builtin:bytes": _bytes_tokenizer, "builtin:symbols": _symbols_tokenizer}


def _wrap(backend: Any, template: str, **specials: str) -> Any:
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    tokenizer.chat_template = template
    return tokenizer


def _byte_letter(byte: int) -> str:
    """The printable character that stands for a byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def _control_tokens(tokenizer: Any, written: set[int]) -> np.ndarray:
    """int32 ids that no content holds; see `_without_control`."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    control = {
        token_id
        for token_id, token in added.items()
        if token.special or (token_id in written and not token.content.isspace())
    }
    # An unknown character of a content may well become the unknown token.
    return np.array(sorted(control - {tokenizer.unk_token_id}), np.int32)


def _without_control(tokenizer: Any, written: set[int], *, name: str) -> Any:
    """A copy of the fast tokenizer that reads no control token from a text.

    Args:
        tokenizer: the transformers tokenizer.
        written: added tokens that the template writes; some models leave theirs unmarked.
        name: of the tokenizer, for the message.
    """
    import tokenizers

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    control = {}
    for token in description["added_tokens"]:
        # Some tokenizers keep plain line breaks among their added tokens.
        is_written = token["id"] in written and not token["content"].isspace()
        token["special"] = token["special"] or is_written
        if token["special"]:
            control[token["id"]] = token["content"]
    plain = tokenizers.Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True
    # An unknown character may well become the unknown token: that commands nothing.
    commands = control.keys() - {tokenizer.unk_token_id}
    for text in control.values():
        if not commands.isdisjoint(plain.encode(text, add_special_tokens=False).ids):
            raise ValueError(
                f"tokenizer.source: in {name!r} the text {text!r} of a message would become a "
                "control token; use a tokenizer that keeps its control tokens apart."
            )
    return plain
