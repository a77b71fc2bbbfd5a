"""make bundle: files are cut, carried one after the other, joined and verified; a command runs with
nothing but what was carried. Fast tests use toy wheels; the slow one a real suite, no network."""
import hashlib, importlib.metadata as metadata, json, os, shutil, subprocess, sys, tarfile, venv, zipfile
from pathlib import Path
import pytest
from commands import ROOT, flags
from tiny_runs import tiny_parameters

sys.path.insert(0, str(ROOT/"tools"))
import bundle, bundle_node

HERE = "%d.%d" % sys.version_info[:2]
TOY = {  # what an archive of a module has in it
    "toy.py": "import os, sys\ndef main(): print('toy', *sys.argv[1:], os.environ['MGSR_DATA'])\n",
    "toy-1.0.dist-info/METADATA": "Name: toy\nVersion: 1.0\nRequires-Dist: numpy>=1.21\n"
                                  "Requires-Dist: absent>=3; extra == 'more'\n",
    "toy-1.0.dist-info/entry_points.txt": "[console_scripts]\nsay-toy = toy:main\n",
    "toy-1.0.data/data/share/toy.txt": "shared", "toy-1.0.data/purelib/more.py": "x = 1\n",
    "toy-1.0.data/headers/toy.h": "nothing"}

def make_wheel(folder, content=TOY):
    path = folder/"toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items(): archive.writestr(name, text)
    return path

@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A clone of the project with a bundle: a wheel in parts of 300 bytes, and a data folder."
    root, collected = tmp_path/"clone", tmp_path/"collected"
    for folder in (root/"nbs", collected, tmp_path/"raw"/"dolly"): folder.mkdir(parents=True)
    (root/"nbs"/"train.ipynb").touch()
    shutil.copy(ROOT/"settings.ini", root)
    (tmp_path/"raw"/"dolly"/"dev.jsonl").write_text('{"instruction": "é"}\n', encoding="utf-8")
    bundle.compact(tmp_path/"raw", collected/"data.tar.xz")
    files = [make_wheel(collected), collected/"data.tar.xz"]
    bundle.write_bundle(root/"build"/"bundle", files, HERE, {"numpy": "1.21"}, size=300)
    monkeypatch.setenv("MGSR_NODE", str(tmp_path/"store"))
    return root

def description(root): return json.loads((root/"build"/"bundle"/"bundle.json").read_text())

def taken(root):
    here = root/"build"/"bundle"
    return bundle_node.take(description(root), here, bundle_node.store_of(None))

def content(folder): return {p.name for p in folder.rglob("*") if p.is_file()}

def test_large_files_are_cut_and_their_list_says_all(clone):
    wheel, data = description(clone)["files"]
    files = clone/"build"/"bundle"/"files"
    assert len(wheel["parts"]) > 3 and wheel["parts"][0]["file"].endswith(".whl.00")
    assert sum(p["size"] for p in wheel["parts"]) == wheel["size"]
    assert all(p["size"] <= 300 for p in wheel["parts"])
    joined = b"".join((files/p["file"]).read_bytes() for p in wheel["parts"])
    assert hashlib.sha256(joined).hexdigest() == wheel["sha256"]
    lines = bundle.listed(description(clone))
    assert len(lines) == len(wheel["parts"]) + len(data["parts"]) + 1
    assert lines[-1].endswith(f"in {len(lines) - 1} files")

def test_parts_are_joined_and_unpacked_where_they_belong(clone, tmp_path):
    assert taken(clone) == []
    store = tmp_path/"store"
    assert (store/"site"/"toy.py").read_text() == TOY["toy.py"]
    assert (store/"site"/"more.py").is_file() and (store/"share"/"toy.txt").is_file()
    assert (store/"data"/"dolly"/"dev.jsonl").read_text("utf-8") == '{"instruction": "é"}\n'
    assert "toy.h" not in content(store) and content(store/"parts") == set()

def test_parts_may_come_one_after_the_other(clone, tmp_path):
    files = clone/"build"/"bundle"/"files"
    shutil.move(files, tmp_path/"all")
    names = sorted(p.name for p in (tmp_path/"all").iterdir())
    for i, name in enumerate(names):
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        shutil.copy(tmp_path/"all"/name, files)
        assert sorted(taken(clone)) == names[i + 1:]
    assert (tmp_path/"store"/"site"/"toy.py").is_file() and taken(clone) == []

def test_a_damaged_part_is_refused_by_name_and_can_be_carried_again(clone, tmp_path):
    part = sorted((clone/"build"/"bundle"/"files").iterdir())[-1]
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + b"?")
    with pytest.raises(bundle_node.Refused, match=f"{part.name} is damaged .* carry it again"):
        taken(clone)
    assert not (tmp_path/"store"/"site").exists()
    part.write_bytes(whole)
    assert taken(clone) == []

def test_a_join_that_is_not_the_whole_is_refused(clone):
    said = description(clone)
    said["files"][0]["sha256"] = "0" * 64
    (clone/"build"/"bundle"/"bundle.json").write_text(json.dumps(said))
    with pytest.raises(bundle_node.Refused, match="toy-1.0-py3-none-any.whl.whole is damaged"):
        taken(clone)

def test_a_wheel_cannot_write_elsewhere(tmp_path):
    wheel = make_wheel(tmp_path, {"../../evil.py": "x = 1"})
    (tmp_path/"store").mkdir()
    with pytest.raises(bundle_node.Refused, match="would lie outside"):
        bundle_node.unpack_wheel(wheel, tmp_path/"store")
    assert not list(tmp_path.rglob("evil.py"))

def test_data_cannot_be_written_elsewhere(tmp_path):
    (tmp_path/"store").mkdir()
    for name in ("../../evil.jsonl", "dolly/train.jsonl"):
        with tarfile.open(tmp_path/"data.tar.gz", "w:gz") as archive:
            archive.add(__file__, arcname=name)
            archive.add(tmp_path, arcname="folder", recursive=False)
        if "evil" in name:
            with pytest.raises(bundle_node.Refused, match="would lie outside"):
                bundle_node.unpack_data(tmp_path/"data.tar.gz", tmp_path/"store")
        else: bundle_node.unpack_data(tmp_path/"data.tar.gz", tmp_path/"store")
    assert [p.name for p in tmp_path.rglob("*.jsonl")] == ["train.jsonl"]

def run_sh(root, *words, **env):
    line = ["bash", str(root/"build"/"bundle"/"run.sh"), *words]
    env = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run(line, cwd=root, env=env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=60)

def test_a_command_runs_with_what_was_carried(clone, tmp_path):
    done = run_sh(clone, "say-toy", "a b", "c")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"toy a b c {tmp_path/'store'/'data'}\n"
    # the project's own, from its settings
    assert {"mgsr-run", "mgsr-ablate", "say-toy"} <= content(tmp_path/"store"/"bin")
    env = run_sh(clone, "env", HOME="/proc/nowhere", MGSR_CACHE="").stdout.splitlines()
    store = str(tmp_path/"store")
    assert {"HF_HUB_OFFLINE=1", f"HOME={store}"} <= set(env)
    assert f"PYTHONPATH={clone}:{store}/site" in [line[:len(f"PYTHONPATH={clone}:{store}/site")]
                                                  for line in env]

def test_without_a_command_it_says_what_is_there(clone):
    next((clone/"build"/"bundle"/"files").glob("*.00")).unlink()
    done = run_sh(clone)
    n = len(bundle.listed(description(clone))) - 1
    assert done.returncode == 0 and f"{n - 1} of {n} files are in " in done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("missing: ")

def lack_part(root, said): next((root/"build"/"bundle"/"files").glob("*.01")).unlink()
def other_python(root, said): said["python"] = "3.5"
def no_package(root, said): said["expects"] = {"no-such-package": "1"}
def old_package(root, said): said["expects"] = {"numpy": "999.1"}
def no_clone(root, said): (root/"nbs"/"train.ipynb").unlink()

@pytest.mark.parametrize("change,words", [
    (lack_part, "files are missing; carry them to"), (other_python, "the bundle is for 3.5"),
    (no_package, "lacks no-such-package (not here)"), (old_package, "(needed: 999.1)"),
    (no_clone, "is not the build/bundle of a clone")])
def test_what_is_lacking_is_said_in_a_sentence(clone, change, words):
    said = description(clone)
    change(clone, said)
    (clone/"build"/"bundle"/"bundle.json").write_text(json.dumps(said))
    done = run_sh(clone, "say-toy")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("bundle: ")

def test_an_unknown_command_is_named(clone):
    done = run_sh(clone, "no-such-command")
    assert done.returncode == 2 and done.stderr == "bundle: there is no command 'no-such-command'\n"

# --- what is collected

def test_what_the_node_has_and_all_that_this_requires_is_left_out():
    there = bundle.with_requirements(["torch"])
    assert {"torch", "sympy", "jinja2", "filelock"} <= there and "papermill" not in there

def test_the_node_must_have_what_the_wheels_require_and_the_bundle_lacks(tmp_path):
    found = bundle.expected(["torch", "pandas"], [make_wheel(tmp_path)])
    assert found["torch"] == "2.6" and found["pandas"] == "2.2.2"      # of settings.ini
    assert bundle_node.version(found["numpy"]) >= (2, 0) and "absent" not in found
    assert [str(r) for r in bundle.needs_of(make_wheel(tmp_path))] == ["numpy>=1.21"]

@pytest.mark.parametrize("lock", sorted((ROOT/"tools").glob("bundle-*.txt")), ids=lambda p: p.stem)
def test_the_locked_versions_are_those_that_a_run_needs(lock):
    pins = dict(line.split("==") for line in lock.read_text(encoding="utf-8").split())
    for r in bundle.required():
        if r.name in pins: assert r.specifier.contains(pins[r.name]), r
    assert {"papermill", "rouge-score", "textblob", "gguf", "ipykernel"} <= set(pins)
    assert not {"torch", "transformers", "numpy"} & set(pins)

# --- a node

def node_python(folder):
    "A Python that has what a node has, by links to what is installed here."
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder/"lib"/f"python{HERE}"/"site-packages"
    for name in bundle.with_requirements(bundle.HAVE):
        dist = metadata.distribution(name)
        for top in {f.parts[0] for f in dist.files or [] if f.parts[0] != ".."}:
            if not (site/top).exists(): (site/top).symlink_to(dist.locate_file(top))
    return str(folder/"bin"/"python")

def without_network(line):
    "The same command where no network is, if this user may have such a place."
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode: return line
    return ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *line]

@pytest.mark.slow
def test_a_suite_runs_on_a_node_without_a_network(tmp_path, local_models):
    root = tmp_path/"clone"
    hidden = shutil.ignore_patterns(".*", "runs", "build", "_docs")
    shutil.copytree(ROOT, root, ignore=hidden, symlinks=True)
    make = [sys.executable, str(root/"tools"/"bundle.py"), "--python", HERE, "--no-teacher"]
    made = subprocess.run(make, cwd=root, capture_output=True, text=True)
    if made.returncode: pytest.skip(f"no registry: {made.stderr[-200:]}")
    shutil.copytree(local_models["llama"][0], root/"teacher")
    parameters = tiny_parameters("runs", "teacher")
    del parameters["runs_dir"]
    node = {"PYTHON": node_python(tmp_path/"node"), "MGSR_NODE": str(tmp_path/"store"),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
            "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    suite = ["mgsr-ablate", "loss_weights", "--preset", "quickstart", "--seeds", "1",
             "--cells", "dac=1,span=1;dac=0.5,span=1", *flags(parameters)]
    line = without_network(["bash", "build/bundle/run.sh", *suite])
    done = subprocess.run(line, cwd=root, env=node, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((root/"runs").rglob("metrics.json"))) == 2 and "[2/2]" in done.stdout
