"""Room sizes: what in the library and its notebooks is over the bounds. `make sizes` prints it; tests/test_sizes.py holds it.

Code is read on the documentation page, which shows 100 columns: so lines are short, and so are functions, classes and modules.
"""
import ast, json, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE, FUNCTION, CLASS, MODULE = 100, 40, 150, 300
HIDDEN = re.compile(r'#\|\s*hide\b')


def lines_of(node):
    "Lines of a function or class, its decorators included."
    return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1

def too_long(path):
    "(what, lines, bound) of a module, its functions, methods and classes that are over their bounds."
    text = path.read_text(encoding='utf-8')
    found = [(path.name, text.count('\n'), MODULE)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): bound = FUNCTION
        elif isinstance(node, ast.ClassDef): bound = CLASS
        else: continue
        found.append((f'{path.name}:{node.name}', lines_of(node), bound))
    return [row for row in found if row[1] > row[2]]

def wide_lines(notebook):
    "(cell, line) of the code cells that are exported or shown, for the lines over the bound."
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    # the parameters cell is a table: papermill reads each meaning from the line of its parameter
    sources = {c['id']: ''.join(c['source']) for c in cells
               if c['cell_type'] == 'code' and 'parameters' not in c.get('metadata', {}).get('tags', [])}
    return [(f'{notebook.name} {cell}', line) for cell, source in sources.items()
            if not HIDDEN.match(source) for line in source.split('\n') if len(line) > LINE and not line.startswith('#|')]

def modules(root=ROOT): return sorted(p for p in (root/'mgsr_nb').rglob('*.py') if p.name != '_modidx.py')

def notebooks(root=ROOT): return sorted((root/'nbs').glob('*.ipynb'))

def over(root=ROOT):
    "Everything that is over a bound, as lines of text."
    sizes = [f'{what}: {n} lines, allowed {bound}' for p in modules(root) for what, n, bound in too_long(p)]
    wide = [f'{where}: {len(line)} columns, allowed {LINE}: {line.strip()[:60]}'
            for p in notebooks(root) for where, line in wide_lines(p)]
    return sizes + wide

def lint(root=ROOT):
    "What ruff says of the notebooks (its rules are in pyproject.toml); empty if nothing."
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'concise', 'nbs'],
                          cwd=root, capture_output=True, text=True)
    if done.returncode > 1: raise SystemExit(done.stderr)
    return [line for line in done.stdout.splitlines() if re.search(r':\d+:\d+:', line)]

def main():
    found, said = over(), lint()
    code = [p.read_text(encoding='utf-8').count('\n') for p in modules()]
    print(f'{len(code)} modules, {sum(code)} lines, the longest {max(code)}; {len(notebooks())} notebooks')
    print('\n'.join(found) or f'over the bounds (module {MODULE}, class {CLASS}, function {FUNCTION} lines, {LINE} columns): none')
    print('\n'.join(said) or 'unused names, joined statements: none')
    sys.exit(bool(found or said))

if __name__ == '__main__': main()
