"""Where Slurm cannot be had, its tests are skipped with a reason, or fail where they must not be."""

import pytest
from support import slurm_packages


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_packages.shutil, "which", lambda name: None)
    monkeypatch.setenv("PATH", "/bin")


def test_a_skip_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(slurm_packages.REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"apt-get install .* slurm-wlm munge libpmix2"):
        slurm_packages.require()


def test_a_skip_that_is_not_allowed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slurm_packages.REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match="does not allow to skip"):
        slurm_packages.require()
