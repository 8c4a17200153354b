"""The tokenizer as a GGUF file has it: its tokens with their types, its words, and the tokens that have a meaning."""

import json
from typing import NamedTuple

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from hf_oto import OTOError

from .words import SPACE, Words, words_of


class Vocabulary(NamedTuple):
    """A tokenizer.

    Attributes:
        tokens, types: of every row of the embedding.
        words: how a text becomes tokens.
        meanings: "bos", "eos", "pad", "unk" -> the id of that token, if there is one.
        bos_is_added, eos_is_added: to every text.
        chat_template: in Jinja.
    """

    tokens: list[str]
    types: list[TokenType]
    words: Words
    meanings: dict[str, int]
    bos_is_added: bool
    eos_is_added: bool
    chat_template: str | None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer.

    Args:
        size: the number of rows of the embedding. There may be more of them than tokens.

    Raises:
        OTOError: llama.cpp can't do what the tokenizer does, or would end a text at another token.
    """
    if not tokenizer.is_fast:
        raise OTOError(f"{type(tokenizer).__name__} has no tokenizer.json, which is what is read of a tokenizer")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = tokens_of(state, size)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    meanings = {name: number for name, number in ids.items() if number is not None}
    if "eos" not in meanings:
        raise OTOError("the tokenizer has no eos_token, and llama.cpp would take token 11 for it: set one")
    bos_is_added, eos_is_added = added_to_texts(tokenizer)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return Vocabulary(tokens, types, words_of(state), meanings, bos_is_added, eos_is_added, template)


def tokens_of(state: dict, size: int) -> tuple[list[str], list[TokenType]]:
    """The text and the type of every token; a row of the embedding without a token is unused."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    model = state["model"]
    numbered = [(number, text, TokenType.NORMAL) for text, number in model["vocab"].items()]
    for added in state["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise OTOError(f"the token {added['content']!r} takes the spaces beside it, or whole words: set it to not")
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        numbered.append((added["id"], added["content"], kind))  # after the model's own, of which it may be one
    for number, text, kind in numbered:
        if number >= size:
            raise OTOError(f"the token {text!r} has the number {number}, and the embedding has {size} rows")
        if model["byte_fallback"] and text == model["unk_token"]:
            kind = TokenType.UNKNOWN
        elif model["byte_fallback"] and kind == TokenType.NORMAL and is_byte(text):
            kind = TokenType.BYTE
        elif model["byte_fallback"] and kind == TokenType.USER_DEFINED:
            text = text.replace(SPACE, " ")  # llama.cpp looks for it before it writes spaces in SentencePiece's way
        tokens[number], types[number] = text, kind
    return tokens, types


def is_byte(text: str) -> bool:
    """Whether SentencePiece means a byte by this token, as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def added_to_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its last one behind it."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for before in ([], [tokenizer.bos_token_id]):
        for behind in ([], [tokenizer.eos_token_id]):
            if whole == before + bare + behind:
                return bool(before), bool(behind)
    raise OTOError(f"the tokenizer adds other tokens than bos and eos to a text: {bare} becomes {whole}")


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds all of it to a file."""
    words = vocabulary.words
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.splitter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores([words.scores.get(token, 0.0) for token in vocabulary.tokens])
    writer.add_add_space_prefix(words.space_prefix)
    for name, number in vocabulary.meanings.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.bos_is_added)
    writer.add_add_eos_token(vocabulary.eos_is_added)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
