"""Compare the library with a fresh export of the notebooks: the same files, the same bytes.

    python tools/check_export.py [EXPORT_COMMAND ...]      (default: nbdev-export)

The project is copied without the generated modules, the export command runs in the copy, and the
two `mgsr_nb/` folders are compared. So a module whose notebook is gone, a module that was never
exported and a stale index entry are all found. Standard library only: nbdev 2's environment runs it
too.
"""
import os, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = 'mgsr_nb'
CONFIG = ['settings.ini', 'pyproject.toml', 'setup.py', 'README.md']


def modules(lib):
    "Python files of the package: relative path -> bytes."
    return {p.relative_to(lib).as_posix(): p.read_bytes() for p in sorted(lib.rglob('*.py'))}


def copy_sources(dest, root=ROOT):
    "Copy what an export reads: configuration, notebooks, the one module that is written by hand."
    for name in CONFIG: shutil.copy(root/name, dest/name)
    hidden = shutil.ignore_patterns('.*', '_*.ipynb')
    shutil.copytree(root/'nbs', dest/'nbs', ignore=hidden)
    (dest/LIB).mkdir()
    shutil.copy(root/LIB/'__init__.py', dest/LIB/'__init__.py')


def fresh_export(dest, command=('nbdev-export',), root=ROOT):
    "Export into the empty folder `dest`; returns the package's modules."
    copy_sources(dest, root)
    # nbdev-export does nothing while IN_TEST is set (so nbdev-test keeps notebooks from exporting)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    done = subprocess.run(list(command), cwd=dest, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n{done.stdout}\n{done.stderr}')
    return modules(dest/LIB)


def differences(committed, exported):
    "One line for every module that is missing, left over or different."
    said = {}
    for f in committed.keys() | exported.keys():
        if f not in committed: said[f] = 'exported by a notebook, missing in the library'
        elif f not in exported: said[f] = 'in the library, exported by no notebook'
        elif committed[f] != exported[f]: said[f] = 'differs from the export'
    return sorted(f'{LIB}/{f}: {what}' for f, what in said.items())


def main(command):
    with tempfile.TemporaryDirectory() as folder:
        found = differences(modules(ROOT/LIB), fresh_export(Path(folder), command))
    for line in found: print(line, file=sys.stderr)
    print(f'{LIB}/ ' + ('differs from' if found else 'equals') + f' the export by {command[0]}')
    return 1 if found else 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:] or ['nbdev-export']))
