"""Texts on which two encoders are compared before one stands in for the other."""

from __future__ import annotations

import random
import re


def probes(added: list[str]) -> list[str]:
    """Texts that tell encoders apart: hand-picked ones, every added token in context, and seeded mixtures."""
    picked = [
        "", " ", "  ", "\n", "\n\n\n", "\t\t x", "a", " a", "a ", "  a  b   c  ", "a\r\nb\rc",
        "\u00a0x\u2003y\u3000z", "Hello, world! It's what they've said: DON'T, we'll, I'd'VE.",
        "snake_case camelCase kebab-case HTTPServer2", "x²+y²=z² ∑∫√ ≠≤ αβγ → ⇒",
        "0 12 123 1234 12345678901234567890 3.14159e-10 1,000,000 0x1F ٣٤٥ ५६७ ½ ² Ⅷ",
        "def f(x: int) -> dict[str, int]:\n    return {'a': x ** 2}  # fin\n\n\tif x && y:\n\t\tgoto end;\n",
        '{"k": [1, 2.5, null, true, "\\u00e9\\n"], "nested": {"": []}}',
        "<b>html</b> &amp; <!-- x --> </think",
        "数据处理和机器学习。日本語のテキスト、한국어 문장입니다", "ภาษาไทย עברית العربية हिन्दी தமிழ்",
        "naïve résumé Straße ĳ ﬁ Å \u212b", "e\u0301 n\u0303 \u0300x a\u0308\u0323",
        "🚀👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈👍🏽🇩🇪 e🎉f", "\u200b\u200d\ufeff\u2028\u2029\x00\x07\x1b\x7f",
        "\U0001d4d0\U0001f9ff\ufffd\ue000", "a" * 300, "ab " * 200, " " * 120 + "x", "\n" * 50,
        "!" * 70 + "=" * 70,
        "https://example.org/a?b=c&d=%20#frag user@example.org C:\\dir\\file.txt ~/x/../y",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think></think>ok<|im_end|>\n",
        "<|im_start", "|im_end|>", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n",
    ]  # fmt: skip
    rng = random.Random(0)
    pieces = [part for text in picked for part in re.findall(r"\s+|\w+|[^\w\s]+", text) if len(part) < 30]
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(2, 24))) for _ in range(300)]
    around = [f"{left}{token}{right}" for token in added for left, right in ((" a", "b "), ("\n ", " \n"))]
    pairs = ["".join(rng.choices(added, k=3)) for _ in range(100)] if added else []
    return [*picked, *mixed, *added, *around, *pairs]
