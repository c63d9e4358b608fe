"""Texts of pairs for chat servers, which tokenise messages themselves: what spells a control token is broken. Serves `wire.py`.

Our choice: one space after the first character, and one more where there is one already, so that the change can be undone. Where the server's
tokenizer is configured, its own added tokens are broken; besides, and without one, whatever looks like the control tokens of models that we know.
"""

import re
from collections.abc import Collection, Iterator

_NAMES = "s|bos|pad|unk|mask|cls|sep|think|sys|system|user|assistant|turn|image|video|audio|tool|pre|suf|mid|[es]o[a-z]|reponame|filename|fim-[a-z]+"
_NUMBERED = "unused|ctrl|extra|reserved|special|dummy|placeholder|token"
_BAR = "\uff5c"
_LOOKS = re.compile(
    rf"""([<\[]|\](?=\ *~))(\ *)(?=
        \|[^<>|\n]+\|>                   # <|im_end|>
        | {_BAR}[^<>{_BAR}\n]+{_BAR}>       # the same between full-width bars (DeepSeek)
        | \|[a-z_]+>|[a-z_]+\|>           # <|turn>, <turn|>
        | \|[^\[\]<>|\n]+\|\]             # [|endofturn|] (EXAONE)
        | ~!?b[\[\]]|e~\[                # ]~b]ai, ]~!b[, [e~[ (MiniMax)
        | \[[^\[\]<>\n]+\]>               # <[begin_of_sentence]>
        | /?(?:{_NAMES})>                 # <bos>, </s>, <think>
        | /?[a-z]+(?:[_\u2581][a-z0-9]+)+>  # <start_of_turn>, <tool_call>
        | /?[a-z]+:[a-z0-9_]+>            # <seed:bos>, <mask:1>
        | (?:{_NUMBERED})[0-9]+>          # <unused7>, <ctrl99>
        | <\ */?SYS>>                     # <<SYS>>
        | /?(?:BOS|EOS|EOT|EOD)\]
        | /?(?:INST|g?MASK|sMASK|CLS|SEP|PAD|UNK|IMG(?:_[A-Z]+)*|SYSTEM_PROMPT|MODEL_SETTINGS|(?:AVAILABLE_)?TOOLS?(?:_[A-Z]+)*|THINK|ARGS|CALL_ID)\]
        | (?:extra_id|unused_token|unused|control|reserved)_?[0-9]+\]  # [extra_id_1]
        | (?:start|end)_header_id\]       # Kimi
    )""",
    re.VERBOSE | re.IGNORECASE,
)


class ControlTokens:
    """The added tokens of one tokenizer, all but white space, found in a text in one pass however many there are (Gemma 3 has 6,206).

    A token whose second character is a space is not among them: one more space there would not be told from its own. We know of none.
    """

    def __init__(self, tokens: Collection[str] = ()) -> None:
        rests: dict[str, set[str]] = {}
        for token in (token.lstrip(" ") for token in tokens if not token.replace("\u2581", " ").isspace()):
            if len(token) > 1 and token[1] != " ":
                rests.setdefault(token[0], set()).add(token[1:])
        self._rests = {first: (sorted({len(rest) for rest in found}), frozenset(found)) for first, found in rests.items()}
        self._first = re.compile(f"([{''.join(map(re.escape, rests))}])( *)" if rests else r"(?!)")

    def starts(self, text: str) -> Iterator[int]:
        """Yield the place after the first character of every token in `text`, also where spaces stand there already."""
        for match in self._first.finditer(text):
            lengths, rests = self._rests[match[1]]
            if any(text[match.end() : match.end() + length] in rests for length in lengths):
                yield match.end(1)


NO_TOKENS = ControlTokens()


def break_control_text(text: str, tokens: ControlTokens = NO_TOKENS) -> str:
    """Return `text` with one space put after the first character of every one of `tokens`, and of all that looks like one: `< |im_end|>`.

    What was broken before gets one more, so no two texts become the same one.
    """
    cuts = sorted({*(match.end(1) for match in _LOOKS.finditer(text)), *tokens.starts(text)})
    return " ".join(text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True))
