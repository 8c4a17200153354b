"""How a tokenizer splits a text and merges pieces, in the words of llama.cpp.

llama.cpp has the regular expressions of known tokenizers in its code, under names. Which of them a tokenizer has is
read off its `tokenizer.json`, so its tokens may be any. SentencePiece's tokenizers have scores in place of merges.
"""

from typing import Any, NamedTuple

from hf_oto import OTOError

SPACE = "\u2581"  # what SentencePiece writes for a space
DIGITS, BYTES = "every digit", "GPT-2's words"  # steps that tokenizer.json has a type for
WORD, SIGNS, SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{WORD}|\p{{N}}{{1,3}}|{SIGNS}[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
MARK = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{MARK}{UPPER}*{LOWER}+|{MARK}{UPPER}+{LOWER}*|\p{{N}}|{SIGNS}[\r\n/]*|{SPACES}"
NAMES = {  # (steps, is a word that is a token left whole?) -> the name in llama.cpp
    ((BYTES,), False): "gpt-2",
    ((DIGITS, BYTES), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}


class Words(NamedTuple):
    """Merges or scores, and what stands before them.

    Attributes:
        kind: llama.cpp's name of the algorithm, "gpt2" or "llama".
        splitter: llama.cpp's name of the regular expressions.
        merges: "left right", by their rank.
        scores: token -> its score; the token with the highest is merged first.
        space_prefix: whether a space is put before a text.
        notes: what llama.cpp does in another way, as sentences.
    """

    kind: str
    splitter: str
    merges: list[str]
    scores: dict[str, float]
    space_prefix: bool
    notes: list[str]


def words_of(state: dict[str, Any]) -> Words:
    """The words of a tokenizer, of which `state` is what `tokenizer.json` holds.

    Raises:
        OTOError: llama.cpp has no code for it.
    """
    model = state["model"]
    if model["type"] != "BPE":
        raise OTOError(f"the tokenizer is a {model['type']} model, and only BPE is written")
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise OTOError("the tokenizer marks where words go on or end, which llama.cpp doesn't")
    return by_scores(state) if model["byte_fallback"] else by_merges(state)


def by_merges(state: dict[str, Any]) -> Words:
    """Bytes are merged, as GPT-2 does."""
    splitter, normalizer = state["pre_tokenizer"] or {}, state["normalizer"]
    steps = [step(part) for part in splitter.get("pretokenizers", [splitter])]
    key = (tuple(name for name in steps if name), state["model"]["ignore_merges"])
    if key not in NAMES:
        raise OTOError(f"llama.cpp has no name for this pre-tokenizer, with ignore_merges={key[1]}: {splitter}")
    if normalizer not in (None, {"type": "NFC"}):
        raise OTOError(f"llama.cpp doesn't normalise texts, and the tokenizer does: {normalizer}")
    notes = ["llama.cpp doesn't compose accents and letters (NFC), as the tokenizer does"] if normalizer else []
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return Words("gpt2", NAMES[key], merges, {}, False, notes)


def step(part: dict[str, Any]) -> str | None:
    """The regular expression or name of one step; None if it splits nothing."""
    match part:
        case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}:
            return expression
        case {"type": "Digits", "individual_digits": True}:
            return DIGITS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses_regex}:
            return BYTES if uses_regex else None
    return f"unknown to llama.cpp: {part}"


def by_scores(state: dict[str, Any]) -> Words:
    """Characters are merged, as SentencePiece does; a token's score is the rank of its first merge, negative."""
    tokens, scores = state["model"]["vocab"], {}
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    for rank, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(rank))
    known = set(merges)
    if any(f"<0x{byte:02X}>" not in tokens for byte in range(256)):
        raise OTOError("the tokenizer has no token for some byte, and llama.cpp makes bytes of unknown characters")
    for token in scores:
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            # llama.cpp asks only whether what it merges is a token
            if left in tokens and right in tokens and (left, right) not in known:
                raise OTOError(f"llama.cpp would merge {left!r} and {right!r}, and the tokenizer has no such merge")
    prefix, notes = prefix_of(state)
    return Words("llama", "default", [], scores, prefix, notes)


def prefix_of(state: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and in which cases not by the tokenizer."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    match state["normalizer"], state["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": [first, second]}, None if (first, second) == (prepend, replace):
            return True, []
        case None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}:
            where = {"always": "a space", "first": "a space or a special token", "never": ""}[scheme]
            note = f"llama.cpp puts a space before a text after {where}, too, and the tokenizer doesn't"
            return scheme != "never", [note] if where else []
    raise OTOError(f"llama.cpp has nothing for these spaces: {state['normalizer']}, {state['pre_tokenizer']}")
