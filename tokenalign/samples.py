"""Texts to try tokenizers on: many scripts, code, numbers, tags, and what trips byte tables up."""

ORDINARY = (
    "Let's see: the train leaves at 14:05 and needs 2.5 hours, so it arrives at 16:35.\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n"
    "\\[ x^2 + 1{,}000 \\le \\frac{1}{3} \\] Çà et là — naïve café, 東京は雨です, Привет! 🙂\n"
)
"""What models write every day."""

TEXTS = (
    *ORDINARY.splitlines(keepends=True),
    "A quick test: don't we'll I'm 1,234,567.89 + 3.14e-10 = ?!\n",
    "    indented\n\tby a tab\r\nand two  blanks   at the end   \n\n\n",
    "<think>\nFirst 7 + 5 = 12.\n</think>\n\n<action>open door 3</action>\n",
    '<tool_call>\n{"name": "search", "arguments": {"query": "rain", "limit": 5}}\n</tool_call>\n',
    "for (int i = 0; i < n; ++i) { sum += a[i] & 0xFF; } // done\n",
    "SELECT name, count(*) FROM t WHERE id >= 10 GROUP BY 1;\n",
    "$$\\sum_{k=1}^{n} k = \\frac{n(n+1)}{2}$$ and \\boxed{42}\n",
    "https://example.org/a/b?c=d&e=%20#top user@example.org\n",
    "Größe, Straße, Übermut; ça va où; mañana, ¿qué?; Łódź; İstanbul ılık\n",
    "e\u0301 and é, A\u030a and Å, ﬁne ﬁgures, ½ and ²\n",
    "Ελληνικά γράμματα και ΣΊΣΥΦΟΣ\n",
    "Съешь ещё этих мягких французских булок\n",
    "שלום עולם, נקודות: שָׁלוֹם\n",
    "مرحبا بالعالم، الأرقام ١٢٣\n",
    "हिन्दी में नमस्ते दुनिया, क्षत्रिय\n",
    "বাংলা ভাষা, தமிழ் மொழி, ภาษาไทยไม่มีช่องว่าง\n",
    "中文分詞沒有空格,今天天氣很好。\n",
    "日本語のひらがなとカタカナ、漢字。\n",
    "한국어 문장과 분해된 한글\n",
    "የአማርኛ ጽሑፍ, ქართული, Հայերեն\n",
    "🙂👍🏽👩‍👩‍👧‍👦🇪🇺 and ☕️ and 𝒳 and 𐍈\n",
    "no\u00a0break, thin\u2009space, zero\u200bwidth, soft\u00adhyphen, \ufeffmark, line\u2028end\n",
    "\x00\x01\x1b[0m bell\x07 and delete\x7f\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----------------------------------------________________________________________",
    "▁ is a block, Ġ a letter, Ċ another, <0x0A> five characters, ## two\n",
    " ",
    "\n",
)
"""Each is tokenized on its own."""
