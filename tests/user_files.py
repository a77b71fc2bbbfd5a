"Files as people have them: what is in them, and what each gets. A case is (name, bytes, what)."
import io, json

N = 20
PAIRS = [(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(N)]

def rows(question="question", answer="answer", **more): return [{question: q, answer: a, **more} for q, a in PAIRS]

def lines(rows, **kw): return "\n".join(json.dumps(r, **kw) for r in rows).encode()

def table(names, body, sep=","):
    import csv
    out = io.StringIO()
    csv.writer(out, delimiter=sep).writerows([names, *body])
    return out.getvalue().encode()

def parquet(rows):
    import pandas as pd
    out = io.BytesIO()
    pd.DataFrame(rows).to_parquet(out)
    return out.getvalue()

def chat(*turns, role="role", content="content"): return [{role: r, content: c} for r, c in turns]

def chats(key, *before, **names):
    user, assistant = (("human", "gpt") if names else ("user", "assistant"))
    return [{key: chat(*before, (user, q), (assistant, a), **names)} for q, a in PAIRS]

SHAREGPT = dict(role="from", content="value")
TWO = [("user", "Hello."), ("assistant", "Hi.")]
QUESTION, ANSWER = PAIRS[0]

# what is understood: (records, kept, first question, first answer, a word of the line)
GOOD = {
    "usual.jsonl": (lines(rows()), N, "question: question, answer: answer"),
    "blank lines.jsonl": (b"\n\n" + lines(rows()).replace(b"\n", b"\n\n") + b"\n \n", N, "answer: answer"),
    "alpaca.json": (json.dumps(rows("instruction", "output", input="")).encode(), N, "question: instruction, input: input, answer: output"),
    "alpaca with text.jsonl": (lines(rows("instruction", "output", input="", text="all of it")), N, "(not used: text)"),
    "dolly.jsonl": (lines(rows("instruction", "response", context="", category="open_qa")), N, "input: context, answer: response (not used: category)"),
    "openai.jsonl": (lines(rows("prompt", "completion")), N, "question: prompt, answer: completion"),
    "only input and output.jsonl": (lines(rows("input", "output")), N, "question: input, answer: output"),
    "capitals.jsonl": (lines(rows("Question", " Answer ")), N, "question: Question"),
    "numbers.jsonl": (lines([{"question": q, "answer": i} for i, (q, _) in enumerate(PAIRS)]), N, "answer: answer"),
    "mark.jsonl": (b"\xef\xbb\xbf" + lines(rows()), N, "answer"),
    "windows.jsonl": (lines(rows()).replace(b"\n", b"\r\n"), N, "answer"),
    "emoji.jsonl": (lines(rows(note="\U0001f600"), ensure_ascii=False), N, "answer"),
    "nulls.jsonl": (lines([*rows(), {"question": "Why?", "answer": None}]), N, "1 left out: 1 without an answer"),
    "blank answers.jsonl": (lines([*rows(), {"question": "Why?", "answer": " \n\t"}, {"question": "How?", "answer": ""}]), N,
                            "2 left out: 1 with an answer of white space only, 1 without an answer"),
    "blank questions.jsonl": (lines([*rows(), {"question": " ", "answer": "x"}, {"answer": "x"}]), N, "2 left out: 2 without a question"),
    "ids of both kinds.jsonl": (lines([{"id": i if i % 2 else str(i), **r} for i, r in enumerate(rows())]), N, "not used: id"),
    "the same id twice.jsonl": (lines([{"id": 1, **r} for r in rows()]), N, "not used: id"),
    "several answers.jsonl": (lines([{"question": q, "answers": [a, "x"]} for q, a in PAIRS]), N, "answer: answers"),
    "squad.jsonl": (lines([{"question": q, "context": "c", "answers": {"text": [a], "answer_start": [0]}} for q, a in PAIRS]), N, "input: context, answer: answers"),
    "one object a line.json": (lines(rows()), N, "answer: answer"),
    "list under a name.json": (json.dumps({"version": 1, "data": rows()}).encode(), N, "answer: answer"),
    "comma.csv": (table(["question", "answer"], PAIRS), N, "question: question"),
    "semicolon.csv": (table(["question", "answer"], PAIRS, ";"), N, "question: question"),
    "tabs.tsv": (table(["question", "answer"], PAIRS, "\t"), N, "question: question"),
    "excel.csv": (b"\xef\xbb\xbf" + table(["question", "answer"], PAIRS, ";"), N, "question: question"),
    "line breaks and quotes.csv": (table(["question", "answer"], [(q, a + '\n"so", he said') for q, a in PAIRS]), N, "answer: answer"),
    "words that pandas takes for nothing.csv": (table(["question", "answer"], [(q, ("NA", "null", "nan", "007")[i % 4]) for i, (q, _) in enumerate(PAIRS)]), N, "answer: answer"),
    "usual.parquet": (parquet(rows()), N, "answer: answer"),
    "nulls.parquet": (parquet([*rows(), {"question": "Why?", "answer": None}]), N, "1 left out"),
    "chats.parquet": (parquet(chats("messages")), N, "messages: messages"),
    "messages.jsonl": (lines(chats("messages")), N, "messages: messages"),
    "sharegpt.json": (json.dumps(chats("conversations", **SHAREGPT)).encode(), N, "messages: conversations"),
    "messages and prompt.jsonl": (lines([{"prompt": "x", "prompt_id": 1, **r} for r in chats("messages")]), N, "messages: messages (not used: prompt, prompt_id)"),
    "chats in a table.csv": (table(["messages"], [[json.dumps(r["messages"])] for r in chats("messages")]), N, "messages: messages"),
    "prompt and completion as messages.jsonl": (lines([{"prompt": chat(("user", q)), "completion": chat(("assistant", a))} for q, a in PAIRS]), N, "question: prompt"),
    "parts of text.jsonl": (lines([{"messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, {"role": "assistant", "content": a}]} for q, a in PAIRS]), N, "messages"),
    "pictures.jsonl": (lines([*chats("messages"), {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "assistant", "content": "x"}]}]), N,
                       "1 left out: 1 with other parts than text"),
    "tools.jsonl": (lines([*chats("messages"), {"messages": chat(("user", "x"), ("tool", "y"), ("assistant", "z"))}]), N, "1 with turns of 'tool'"),
    "ends with a question.jsonl": (lines([{"messages": r["messages"] + chat(("user", "And?"))} for r in chats("messages")]), N, "messages"),
    "nobody answers.jsonl": (lines([*chats("messages"), {"messages": chat(("user", "x"))}, {"messages": []}]), N, "2 left out: 2 without an answer"),
    "nobody asks.jsonl": (lines([*chats("messages"), {"messages": chat(("assistant", "x"))}]), N, "1 left out: 1 without a question"),
    "a thousand times the same.jsonl": (lines([{"question": "Why?", "answer": str(i)} for i in range(1000)] + rows()), N + 1000, "answer: answer"),
    "as few as can be.jsonl": (lines(rows()[:3]), 3, "1 for training, 1 for validation, 1 for test"),
    "one very long.jsonl": (lines([*rows(), {"question": "x" * 10 ** 6, "answer": "y" * 10 ** 6}]), N + 1, "answer: answer"),
}
# chats that only a chat template can write: the roles before the answer
TURNS = {
    "two turns.jsonl": (lines(chats("messages", *TWO)), ["user", "assistant", "user"]),
    "system.jsonl": (lines(chats("messages", ("system", "Be brief."))), ["system", "user"]),
    "system in a column.jsonl": (lines(rows(system="Be brief.")), ["system", "user"]),
    "orca.parquet": (parquet(rows("question", "response", system_prompt="Be brief.")), ["system", "user"]),
}
# what is refused: words of the sentence
REFUSED = {
    "empty.jsonl": (b"", "no records"), "empty.csv": (b"", "the file is empty"), "empty.json": (b" \n", "the file is empty"), "no rows.json": (b"[]", "no records"), "no rows.csv": (b"question,answer\n", "no records"),
    "utf16.csv": ("question,answer\nq,a\n".encode("utf-16"), "it is UTF-16"), "latin.csv": ("question,answer\nWie heißt er?,Jürgen\n".encode("latin-1"), "not UTF-8"),
    "latin.jsonl": ('{"question": "für"}'.encode("latin-1"), "line 1: not UTF-8"), "utf16.jsonl": (lines(rows()).decode().encode("utf-16"), "line 1: not UTF-8"),
    "cut.jsonl": (lines(rows())[:-9], "line 20: not JSON"), "cut.json": (json.dumps(rows()).encode()[:-9], "not JSON"), "lists.jsonl": (b"[1]\n", "line 1: a JSON list"), "number.json": (b"7", "a JSON int"),
    "list of numbers.json": (b"[7]", "record 1: a JSON int"), "columns.json": (json.dumps({"question": ["a"], "answer": ["b"]}).encode(), "fields question, answer"),
    "half a character.jsonl": (b'{"question": "\\ud83d", "answer": "x"}', "field 'question': has an unpaired surrogate"),
    "deep.json": (b"[" * 100_000, "not JSON"), "no quotes.csv": (b"question,answer\nwhy,because, so\n", "record 1: 3 fields where the header has 2"),
    "open quote.csv": (b'question,answer\n"why,because\n', "unexpected end of data"), "twice.csv": (b"answer,answer\n1,2\n", "its header has 'answer' twice"),
    "no.parquet": (b"PAR1 and nothing", "not Parquet"), "an object.jsonl": (lines([{"question": {"a": 1}, "answer": "x"}]), "field 'question': expected text, found dict"),
    "two questions.jsonl": (lines(rows(prompt="x")), "its columns are question, answer, prompt, and question and prompt could each be the question"),
    "two answers.csv": (table(["question", "answer", "response"], [(q, a, a) for q, a in PAIRS]), "could each be the answer"),
    "chat and pair.jsonl": (lines([{**r, "messages": []} for r in rows()]), "could each be the messages"),
    "text.jsonl": (lines([{"text": "all of it"}]), "its columns are text, which have no question and answer"),
    "preferences.jsonl": (lines(rows("prompt", "chosen", rejected="x")), "its columns are prompt, chosen, rejected"),
    "no chat.jsonl": (lines([{"messages": "hello"}]), "expected a list of messages"), "words.jsonl": (lines([{"messages": ["hello"]}]), "expected a list of messages"),
    "all blank.jsonl": (lines([{"question": q, "answer": " "} for q, _ in PAIRS]), "0 questions of 20 records can be used"),
    "too few.jsonl": (lines(rows()[:2]), "2 questions of 2 records can be used, too few for train, validation, test"),
    "one question.jsonl": (lines([{"question": "Why?", "answer": str(i)} for i in range(9)]), "1 questions of 9 records"),
}
