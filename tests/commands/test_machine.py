"""Facts about the machine."""

import os

import pytest

import tokenpack
from tokenpack.commands import machine


def fake_files(monkeypatch, files):
    monkeypatch.setattr(machine, "_read_lines", lambda path: files.get(path, []))


def test_versions_list_missing_packages(monkeypatch):
    monkeypatch.setattr(machine.metadata, "version", lambda name: {"numpy": "9.9"}[name])
    monkeypatch.setattr(machine.metadata, "PackageNotFoundError", KeyError)
    versions = machine.versions()
    assert versions["numpy"] == "9.9"
    assert versions["triton"] == "not installed"
    assert versions["tokenpack"] == tokenpack.__version__


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 2), ("100000 100000", 1), ("50000 100000", 1), (None, 2)]
)
def test_hardware_threads_of_one_core_count_once(monkeypatch, quota, cores):
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {topology.format(cpu): [f"{cpu % 2},{cpu % 2 + 2}"] for cpu in range(4)}
    if quota:
        files["/sys/fs/cgroup/cpu.max"] = [quota]
    fake_files(monkeypatch, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert machine.physical_cores() == cores


def test_without_a_topology_each_processor_is_a_core(monkeypatch):
    fake_files(monkeypatch, {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6}, raising=False)
    assert machine.physical_cores() == 3


def test_the_description_has_no_host_name_and_no_home_folder():
    description = machine.describe_machine()
    assert description["physical_cores"] >= 1
    assert os.uname().nodename not in str(description)
    assert os.path.expanduser("~") not in str(description)
