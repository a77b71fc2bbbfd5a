"""The table of tests/README.md: which test pins which pitfall, read from the markers.

`python tests/pitfall_table.py` writes it again; with numbers it prints the tests of these pitfalls, for pytest's command line."""
import ast, sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
BEGIN, END = "<!-- pitfalls: begin, made by pitfall_table.py -->", "<!-- pitfalls: end -->"
PITFALLS = {
    1: "a divergence is 0 between equals and never negative; cross-entropy is no KL", 2: "which way round a KL is", 3: "values and gradients against the written-out definition",
    4: "the gradient goes to the student, never to the teacher", 5: "the mixture weight of the JSD belongs to the teacher", 6: "the skew divergences mix inside the logarithm",
    7: "bounds of TVD and JSD", 8: "extreme and infinite logits", 9: "low precision is raised before the softmax", 10: "the order of the vocabulary means nothing",
    11: "no 0/0 where student and teacher agree", 12: "a KL over some classes is none: sign and gradient of each treatment", 13: "one temperature for both sides, another one for sampling",
    14: "padding of batch and vocabulary changes nothing; means are over tokens", 15: "nothing supervised gives 0 with a graph", 16: "the chunk size changes nothing",
    17: "masked positions and the borders of a response count for nothing", 18: "the shift by one token, in data and in samples", 19: "the closing EOS is trained, also when it is the padding",
    20: "a text ends at the first of several stop ids", 21: "left padding: positions and mask are passed on", 22: "prompts of different lengths", 23: "truncation keeps the template's end and a response token",
    24: "special tokens are the same in training and evaluation", 25: "vocabularies of different sizes, and different tokenizers", 26: "gradient accumulation changes nothing; denominators are counted after generation",
    27: "all that trains moves, the teacher does not", 28: "no cross-entropy on text that the student wrote", 29: "evaluation mode while writing, training mode after",
    30: "the draw between sources depends on seed and step only", 31: "a replay buffer is bounded, on the CPU, and saved", 32: "interrupted and resumed is the same, bit for bit", 33: "the schedule counts updates",
    34: "SeqKD is the NLL of the teacher's text", 35: "a baseline differs from the method only in what defines it", 36: "several processes are one", 37: "ROUGE-L: stemmed, F, best reference",
    38: "answers in number and order; an empty one scores 0 and is counted", 39: "answers are drawn at temperature 1 from all classes, with the paper's seeds", 40: "what SCRG may change, and where it ends",
    41: "the parameters tag survives, and what is passed is what runs", 42: "unknown names and wrong types are refused", 43: "papermill without an output path", 44: "where executed copies go, and who makes the folder",
    45: "kernel name and language", 46: "a run that was cut off does not count as finished"}

def marked(source: str) -> list[tuple[str, list[int]]]:
    "(test, numbers) for each test function of a source text that has a `pitfall` marker."
    found = []
    for node in ast.walk(ast.parse(source)):
        calls = [d for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call) and ast.unparse(d.func) == "pytest.mark.pitfall"]
        if calls: found.append((node.name, [arg.value for call in calls for arg in call.args]))
    return found

def tests_of() -> dict[int, list[tuple[str, str]]]:
    "Number -> (file, test), in the order of the files."
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for name, numbers in marked(path.read_text(encoding="utf-8")):
            for n in numbers: found.setdefault(n, []).append((path.name, name))
    return found

def table() -> str:
    "The table as Markdown."
    found, lines = tests_of(), ["| | pitfall | tests |", "|---|---|---|"]
    for n, text in PITFALLS.items():
        by_file = {}
        for file, name in found.get(n, []): by_file.setdefault(file, []).append(f"`{name.removeprefix('test_')}`")
        lines.append(f"| {n} | {text} | {'; '.join(f'**{f}** ' + ', '.join(names) for f, names in by_file.items())} |")
    return "\n".join(lines)

def with_table(readme: str) -> str:
    "The README's text with the current table between the two marks."
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"

if __name__ == "__main__" and sys.argv[1:]:
    print("\n".join(dict.fromkeys(f"{TESTS/file}::{name}" for n in map(int, sys.argv[1:]) for file, name in tests_of().get(n, []))))
elif __name__ == "__main__":
    path = TESTS/"README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
