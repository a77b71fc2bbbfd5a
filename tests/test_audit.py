"""tools/audit.py and tools/oldest.py: an audit that did not happen is no all-clear; the oldest
versions are those of settings.ini."""
import json, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
import audit, oldest

def report(*packages):
    return json.dumps({"dependencies": [{"name": n, **more} for n, more in packages]})
FINE = {"version": "1", "vulns": []}
BAD = {"version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
SKIPPED = {"skip_reason": "not found at the service"}

CASES = [
    ((0, report(("a", FINE), ("b", FINE)), ""), audit.CLEAR, "no known vulnerabilities in 2 pack"),
    ((1, report(("a", FINE), ("b", BAD)), ""), audit.FOUND, "b 1: PYSEC-1, mended in 2"),
    ((0, report(("a", FINE), ("b", SKIPPED)), ""), audit.CLEAR, "not known to the service: b"),
    ((0, report(("a", SKIPPED), ("b", SKIPPED)), ""), audit.NOT_AUDITED, "NOT AUDITED"),
    ((0, report(("a", FINE)), ""), audit.NOT_AUDITED, "NOT AUDITED"),
    ((1, "", "Traceback\nrequests.ConnectionError: no route\n"), audit.NOT_AUDITED, "no route"),
    ((0, "[]", ""), audit.NOT_AUDITED, "NOT AUDITED"),
    ((0, "", ""), audit.NOT_AUDITED, "no report"),
    ((1, report(("a", FINE), ("b", FINE)), ""), audit.NOT_AUDITED, "ended with 1")]

@pytest.mark.parametrize("case,status,words", CASES)
def test_only_a_report_on_all_packages_is_an_audit(case, status, words):
    found = audit.verdict(*case, asked=2)
    assert found[0] == status and words in found[1]
    assert status == audit.FOUND or "\n" not in found[1]

def test_what_is_installed_is_asked_about():
    names = [r.split("==")[0].lower() for r in audit.installed()]
    assert {"torch", "transformers", "pytest"} <= set(names) and "mgsr_nb" not in names
    assert not [r for r in audit.installed() if "+" in r]

def test_the_oldest_versions_are_those_of_settings():
    from test_project import settings
    stated = [*settings()["requirements"].split(), *settings()["dev_requirements"].split()]
    assert [r.replace("==", ">=") for r in oldest.all_oldest("dev")] == stated
    assert oldest.oldest("a-b>=0.7;platform_system=='Linux'") == "a-b==0.7;platform_system=='Linux'"
    for wrong in ("a", "a==1", "a>1", "a>=1,<2"):
        with pytest.raises(ValueError, match="no lower bound"): oldest.oldest(wrong)
