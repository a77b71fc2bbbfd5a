"""Known vulnerabilities of the installed packages, asked of an advisory service by pip-audit, which
runs in an environment of its own that is removed after.

`python tools/audit.py` from the project's environment. Ends with 0: none are known; 1: some are,
and they are listed; 3: nothing was audited, because no advisory service (or no pip-audit) could be
reached. 3 says nothing about the packages. `make audit` turns every status but 0 into an error.
"""
import importlib.metadata as metadata, json, subprocess, sys, tempfile, venv
from pathlib import Path

CLEAR, FOUND, NOT_AUDITED = 0, 1, 3

def installed() -> list[str]:
    """`name==version` of what is installed here, local builds of a version (2.13.0+cpu) as that
    version; the project itself left out."""
    found = {d.metadata["Name"]: d.version.split("+")[0] for d in metadata.distributions()}
    found.pop("mgsr_nb", None)
    return [f"{name}=={found[name]}" for name in sorted(found, key=str.lower)]

def not_audited(why: str) -> tuple[int, str]: return NOT_AUDITED, f"NOT AUDITED: {why}"

def read_report(report: str) -> list[dict]:
    "The packages of pip-audit's JSON; none if it is not one."
    try: return json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError): return []

def described(package: dict) -> list[str]:
    "A line for every vulnerability of a package."
    lines = []
    for found in package.get("vulns", []):
        line = f"{package['name']} {package['version']}: {found['id']}"
        if found["fix_versions"]: line += f", mended in {', '.join(found['fix_versions'])}"
        lines.append(line)
    return lines

def verdict(status: int, report: str, error: str, asked: int) -> tuple[int, str]:
    """Status and words from what pip-audit returned: its exit status, its JSON, its messages, and
    how many packages it was asked about. Only a report on all of them counts as an audit."""
    found = read_report(report)
    if not found or len(found) < asked:
        last = ([line.strip() for line in error.splitlines() if line.strip()] or ["no report"])[-1]
        return not_audited(f"no advisory service gave a report on all {asked} packages "
                           f"({last[:160]})")
    skipped = [p for p in found if "skip_reason" in p]
    if len(skipped) == len(found):
        return not_audited(f"the advisory service knew none of the {asked} packages, which means "
                           f"that it was not reached (the first: {found[0]['skip_reason'][:160]})")
    names = ", ".join(p["name"] for p in skipped)
    unknown = f"; not known to the service: {names}" if skipped else ""
    bad = [line for package in found for line in described(package)]
    if bad:
        head = f"{len(bad)} known vulnerabilities in {len(found)} packages{unknown}"
        return FOUND, "\n".join([head, *bad])
    # pip-audit itself ends with 1 for vulnerabilities and for its own errors
    if status != 0: return not_audited(f"pip-audit ended with {status}{unknown}")
    return CLEAR, f"no known vulnerabilities in {len(found)} packages{unknown}"

def audit(requirements: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        venv.create(folder/"venv", with_pip=True)
        python = folder/"venv"/("Scripts" if sys.platform == "win32" else "bin")/"python"
        install = [python, "-m", "pip", "install", "--quiet", "pip-audit"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode: return verdict(done.returncode, "", done.stderr, len(requirements))
        listed = folder/"requirements.txt"
        listed.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        ask = [python, "-m", "pip_audit", "--no-deps", "--disable-pip", "-r", listed,
               "--format", "json", "--progress-spinner", "off", "--timeout", "20"]
        try: done = subprocess.run(ask, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return not_audited("no advisory service answered within ten minutes")
        return verdict(done.returncode, done.stdout, done.stderr, len(requirements))

if __name__ == "__main__":
    status, words = audit(installed())
    print(words)
    sys.exit(status)
