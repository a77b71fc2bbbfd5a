"""On a compute node without a network: unpack what `make bundle` collected, and run a command.

    bash build/bundle/run.sh                 takes what is here, and says what is missing
    bash build/bundle/run.sh COMMAND ...     runs it when all is there

The files may be carried one after the other: each is verified, and kept in a folder outside the
tree (MGSR_NODE, else one below the temporary folder). The node's own Python and torch are used;
nothing is fetched, nothing is installed. Standard library only, and no pip. This file is copied
into the bundle as node.py.
"""
import hashlib, importlib.metadata as metadata, json, os, re, shlex, shutil, sys, tarfile, tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = re.compile(r"[^/]+\.data/(\w+)/(.+)")      # of a wheel: what does not go to its root


class Refused(Exception): "Why nothing is run; the text says what to do."

def digest_of(path):
    "SHA-256, in hexadecimal."
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()

def verified(path, expected):
    if digest_of(path) != expected:
        raise Refused(f"{path.name} is damaged (its SHA-256 is not that of the list); carry it "
                      "again")
    return path

def store_of(bundle):
    "The folder outside the tree; another bundle gets another one."
    named = os.environ.get("MGSR_NODE")
    if named: return Path(named).resolve()
    name = hashlib.sha256(json.dumps(bundle, sort_keys=True).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()).resolve()/f"mgsr-node-{name}"


# --- taking what is here

def take(bundle, here, store):
    """Unpack into `store` what is whole, keep the parts of what is not; the files that are missing.

    Raises `Refused` for a damaged file."""
    missing = []
    for blob in bundle["files"]:
        done = store/"done"/blob["name"]
        if done.is_file(): continue
        lacking = [part["file"] for part in blob["parts"] if not kept(part, here, store)]
        missing += lacking
        if not lacking:
            unpack(blob, store)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
    return missing

def kept(part, here, store):
    "Whether a part is in the store; it is copied there from the bundle, verified."
    place, carried = store/"parts"/part["file"], here/"files"/part["file"]
    if place.is_file(): return True
    if not carried.is_file(): return False
    verified(carried, part["sha256"])
    place.parent.mkdir(parents=True, exist_ok=True)
    copy = place.with_suffix(place.suffix + ".copy")
    shutil.copyfile(carried, copy)
    os.replace(copy, place)
    return True

def joined(blob, store):
    "The whole file of a blob's parts, verified."
    whole = store/"parts"/f"{blob['name']}.whole"
    with open(whole, "wb") as out:
        for part in blob["parts"]:
            with open(store/"parts"/part["file"], "rb") as f: shutil.copyfileobj(f, out)
    return verified(whole, blob["sha256"])

def unpack(blob, store):
    "Join the parts of `blob`, unpack it where it belongs, and remove the parts."
    whole = joined(blob, store)
    (unpack_wheel if blob["kind"] == "wheel" else unpack_data)(whole, store)
    for path in (whole, *(store/"parts"/part["file"] for part in blob["parts"])): path.unlink()

def unpack_wheel(path, store):
    "A wheel is an archive of files for the module path; some are for other folders."
    roots = {"purelib": store/"site", "platlib": store/"site", "scripts": store/"bin",
             "data": store}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir(): continue
            found = DATA.fullmatch(member.filename)
            if found and found[1] not in roots: continue        # headers
            target = roots[found[1]]/found[2] if found else store/"site"/member.filename
            with archive.open(member) as source: put(source, target, store, path)

def unpack_data(path, store):
    "Plain files of a folder. (extractall is safe from Python 3.11.4 on; a node may be older.)"
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                put(archive.extractfile(member), store/"data"/member.name, store, path)

def put(source, target, store, archive):
    "Copy an open file to `target`, which has to lie in `store`."
    if store.resolve() not in target.resolve().parents:
        raise Refused(f"{archive.name}: {target} would lie outside of {store}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as out: shutil.copyfileobj(source, out)


# --- running

def version(text): return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])

def check_node(bundle):
    "Refuse a node that lacks what the bundle counts on. Raises `Refused`."
    here = "%d.%d" % sys.version_info[:2]
    if here != bundle["python"]:
        raise Refused(f"this is Python {here}, and the bundle is for {bundle['python']}; set "
                      f"PYTHON, or make the bundle with --python {here}")
    wrong = []
    for name, least in bundle["expects"].items():
        try: found = metadata.version(name)
        except metadata.PackageNotFoundError: wrong.append(f"{name} (not here)")
        else:
            if version(found) < version(least): wrong.append(f"{name} {found} (needed: {least})")
    if wrong:
        raise Refused(f"this Python lacks {', '.join(wrong)}; set PYTHON to the one that has "
                      "torch, or make the bundle with a shorter --have, or with --carry NAME")

def script(target):
    module, function = target.split(":")
    code = f"import sys; from {module} import {function} as main; sys.exit(main())"
    return f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} \"$@\"\n"

def write_scripts(root, store):
    "The console scripts of the project and of what was unpacked."
    settings = ConfigParser(delimiters=["="])
    settings.read(root/"settings.ini", encoding="utf-8")
    found = dict(entry.split("=") for entry in settings["DEFAULT"]["console_scripts"].split())
    for dist in metadata.distributions(path=[str(store/"site")]):
        found |= {e.name: e.value for e in dist.entry_points if e.group == "console_scripts"}
    (store/"bin").mkdir(parents=True, exist_ok=True)
    for name, target in found.items():
        path = store/"bin"/name
        path.write_text(script(target.split("[")[0].strip()), encoding="utf-8")
        path.chmod(0o755)

def environment(root, store, given):
    "The variables for a command: paths, no hub, a cache and a home that can be written."
    def paths(*own, rest): return os.pathsep.join(filter(None, [*map(str, own), rest]))
    env = dict(given, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
               PYTHONPATH=paths(root, store/"site", rest=given.get("PYTHONPATH")),
               PATH=paths(store/"bin", Path(sys.executable).parent, rest=given.get("PATH")))
    env.setdefault("MGSR_CACHE", str(store/"cache"))
    if not os.access(given.get("HOME", ""), os.W_OK): env["HOME"] = str(store)
    if (store/"data").is_dir(): env.setdefault("MGSR_DATA", str(store/"data"))
    return env

def prepare(bundle, here, root, store, wanted):
    "Take what is here; refuse to go on if a command is `wanted` and something is missing."
    missing = take(bundle, here, store)
    sizes = {p["file"]: p["size"] for blob in bundle["files"] for p in blob["parts"]}
    for name in missing: print(f"missing: {name} ({sizes[name] / 1e6:.1f} MB)", file=sys.stderr)
    if missing and wanted:
        raise Refused(f"{len(missing)} of {len(sizes)} files are missing; carry them to "
                      f"{here/'files'}, all at once or one after the other")
    if wanted and not (root/"nbs"/"train.ipynb").is_file():
        raise Refused(f"{here} is not the build/bundle of a clone of the project")
    if not wanted: print(f"{len(sizes) - len(missing)} of {len(sizes)} files are in {store}")

def main(command, here=HERE):
    bundle = json.loads((here/"bundle.json").read_text(encoding="utf-8"))
    root, store = here.parents[1], store_of(bundle)
    try:
        prepare(bundle, here, root, store, wanted=bool(command))
        if not command: return 0
        check_node(bundle)
        write_scripts(root, store)
        env = environment(root, store, os.environ)
        program = shutil.which(command[0], path=env["PATH"])
        if program is None: raise Refused(f"there is no command {command[0]!r}")
    except (Refused, OSError) as e:
        print(f"bundle: {e}", file=sys.stderr)
        return 2
    os.execve(program, command, env)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
