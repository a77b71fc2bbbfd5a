"""Known vulnerabilities of the installed packages, asked of an advisory service by pip-audit, which runs in an environment of its own that is removed after.

`python tools/audit.py` from the project's environment. Ends with 0: none are known; 1: some are, and they are listed; 3: nothing was audited, because no advisory service (or no pip-audit) could be
reached. 3 says nothing about the packages. `make audit` turns every status but 0 into an error."""
import importlib.metadata as metadata, json, subprocess, sys, tempfile, venv
from pathlib import Path

CLEAR, FOUND, NOT_AUDITED = 0, 1, 3

def installed() -> list[str]:
    "`name==version` of what is installed here, local builds of a version (2.13.0+cpu) as that version; the project itself left out."
    found = {d.metadata["Name"]: d.version.split("+")[0] for d in metadata.distributions() if d.metadata["Name"] != "mgsr_nb"}
    return [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda x: x[0].lower())]

def verdict(status: int, report: str, error: str, asked: int) -> tuple[int, str]:
    """Status and words from what pip-audit returned: its exit status, its JSON, its messages, and how many packages it was asked about. Only a report on all of them counts as an audit."""
    try: found = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError): found = None
    if not found or len(found) < asked:
        last = ([line for line in error.splitlines() if line.strip()] or ["no report"])[-1].strip()
        return NOT_AUDITED, f"NOT AUDITED: no advisory service gave a report on all {asked} packages ({last[:160]})"
    skipped = [p["name"] for p in found if "skip_reason" in p]
    bad = [f"{p['name']} {p['version']}: {v['id']}" + (f", mended in {', '.join(v['fix_versions'])}" if v["fix_versions"] else "") for p in found for v in p.get("vulns", [])]
    if len(skipped) == len(found): return NOT_AUDITED, f"NOT AUDITED: the advisory service knew none of the {asked} packages, which means that it was not reached (the first: {found[0]['skip_reason'][:160]})"
    known = f"; not known to the service: {', '.join(skipped)}" if skipped else ""
    if bad: return FOUND, f"{len(bad)} known vulnerabilities in {len(found)} packages{known}\n" + "\n".join(bad)
    # pip-audit itself ends with 1 for vulnerabilities and for its own errors
    if status != 0: return NOT_AUDITED, f"NOT AUDITED: pip-audit ended with {status}{known}"
    return CLEAR, f"no known vulnerabilities in {len(found)} packages{known}"

def audit(requirements: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        venv.create(folder/"venv", with_pip=True)
        python = folder/"venv"/("Scripts" if sys.platform == "win32" else "bin")/"python"
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", "pip-audit"], capture_output=True, text=True)
        if done.returncode: return verdict(done.returncode, "", done.stderr, len(requirements))
        (folder/"requirements.txt").write_text("\n".join(requirements) + "\n")
        command = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", folder/"requirements.txt", "--format", "json", "--progress-spinner", "off", "--timeout", "20"]
        try: done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired: return NOT_AUDITED, "NOT AUDITED: no advisory service answered within ten minutes"
        return verdict(done.returncode, done.stdout, done.stderr, len(requirements))

if __name__ == "__main__":
    status, words = audit(installed())
    print(words)
    sys.exit(status)
