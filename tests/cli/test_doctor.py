"""`grpo-ext doctor`: every line that can be provoked here, and the remedy that it names."""

import shutil
import socket
import sys
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires

import huggingface_hub
import pytest
from bitsandbytes.nn import Linear4bit
from huggingface_hub import constants

from grpo_ext import cli
from grpo_ext.cli import doctor

GIB = 2**30


@pytest.fixture
def closed_port():
    """A local port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def free(monkeypatch):
    """`free(0.5)` leaves 0.5 GB free on every disk."""

    def leave(gigabytes):
        usage = namedtuple("usage", "total used free")(100 * GIB, 0, int(gigabytes * GIB))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    return leave


def test_a_machine_that_passes_the_tests_is_green():
    """A false alarm here would be ignored when it matters."""
    for finding in (doctor.python(), doctor.packages(), doctor.four_bits()):
        assert finding.colour == "green", finding
    packages = doctor.packages().text
    assert packages.startswith("all ")
    assert "trl 1.16" in packages


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
def test_a_working_sandbox():
    assert doctor.sandbox().colour == "green"


def test_no_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.sandbox()
    assert (finding.colour, finding.remedy) == ("yellow", "apt install bubblewrap")
    assert "rewards that run programs do not work; others do" in finding.text


def test_a_bubblewrap_that_cannot_make_a_sandbox(monkeypatch, tmp_path):
    """In a container without user namespaces, the line must give bwrap's own reason, not the name of a package."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho No permission to create new namespace >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.sandbox()
    assert finding.colour == "yellow"
    assert "No permission to create new namespace" in finding.text
    assert "apt install" not in finding.remedy


def test_workers_of_rewards(monkeypatch):
    """The line says how to isolate a reward, and what to do if no process can be started."""
    assert "reward_funcs=isolated(REWARD)" in doctor.reward_workers().text
    monkeypatch.setattr(sys, "executable", "/no/python/here")
    finding = doctor.reward_workers()
    assert (finding.colour, finding.remedy.split(":")[0]) == ("yellow", "--reward_workers 0")


def test_packages_out_of_range_or_missing(monkeypatch):
    """The version of TRL matters most, since its methods are overridden."""
    found = {"trl": "1.17.0", "peft": ""}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: found.get(name, real(name)))
    finding = doctor.packages()
    assert finding.colour == "red"
    assert finding.text == "peft missing (needs >=0.20), trl 1.17.0 (needs <1.17,>=1.16)"
    assert finding.remedy == 'pip install "peft>=0.20" "trl<1.17,>=1.16"'


def test_a_missing_package_spoils_only_its_own_lines(monkeypatch, capsys):
    """An error about the first import would hide the line that says what to install."""
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "psutil" else real(name))
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(SystemExit, match="No run works until the red lines are fixed"):
        cli.main(["doctor"])
    output = capsys.readouterr().out
    assert 'pip install "psutil' in output
    assert "not examined: import of psutil" in output
    assert "float32, as on every CPU" in output


def test_packages_of_extras_are_optional(monkeypatch):
    """No line asks for reasoning-gym or pytest."""
    extras = [line for line in requires("grpo-ext") if "extra ==" in line]
    assert extras
    monkeypatch.setattr(doctor, "requires", lambda name: extras)
    assert doctor.packages().text.startswith("all 0 ")


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.9")
    finding = doctor.python()
    assert (finding.colour, finding.text) == ("red", "3.10.9, and grpo-ext needs >=3.11")


def test_broken_four_bit_layers(monkeypatch):
    """Yellow, because only runs with --load_in_4bit need them."""

    def broken(self, x):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(Linear4bit, "forward", broken)
    finding = doctor.four_bits()
    assert (finding.colour, finding.remedy) == ("yellow", "pip install -U bitsandbytes")
    assert finding.text == "--load_in_4bit does not work: no kernel image is available"


@pytest.mark.parametrize(("gigabytes", "colour"), [(0.5, "red"), (5, "yellow"), (50, "green")])
def test_disks(free, gigabytes, colour, tmp_path):
    """This includes a cache folder that does not exist yet, in which the first download would fail."""
    free(gigabytes)
    finding = doctor.disk("disk", tmp_path / "not" / "yet", "hf cache prune")
    assert (finding.colour, bool(finding.remedy)) == (colour, colour != "green")
    assert f"{gigabytes:.1f} GB free in {tmp_path}/not/yet" in finding.text


def test_a_folder_that_cannot_be_written_to(free, monkeypatch, tmp_path):
    """It is red however little is free: with little space it was yellow, and the run failed at its first save."""
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    free(5)
    finding = doctor.disk("disk", tmp_path, "output_dir=FOLDER")
    assert (finding.colour, finding.text) == ("red", f"{tmp_path} cannot be written to")


def test_offline_by_choice_is_not_an_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = doctor.hub()
    assert (finding.colour, finding.remedy) == ("yellow", "unset HF_HUB_OFFLINE")


def test_a_hub_that_does_not_answer(monkeypatch, closed_port):
    """The line is yellow, comes quickly, and names the endpoint."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    finding = doctor.hub()
    assert finding.colour == "yellow"
    assert f"http://127.0.0.1:{closed_port} does not respond" in finding.text


@pytest.mark.parametrize(
    ("status", "token", "colour", "text"),
    [
        (200, "hf_right", "green", "logged in as somebody"),
        (401, "hf_wrong", "yellow", "it responds, but rejects the saved token (401)"),
        (401, None, "yellow", "it responds; not logged in, so no gated models and no push"),
    ],
)
def test_a_hub_that_answers(monkeypatch, status, token, colour, text, hub_of):
    """The token is sent if there is one."""
    url, asked = hub_of(status)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    finding = doctor.hub()
    assert (finding.colour, finding.text) == (colour, text)
    assert asked == [token and f"Bearer {token}"]


@pytest.fixture
def hub_of():
    """`hub_of(status)`: the address of a server that answers with this status, and a list of the tokens that it
    receives."""
    asked, servers = [], []

    def start(status):
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.headers["authorization"])
                body = b'{"name": "somebody"}'
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_through_its_command_line(capsys, free, monkeypatch, tmp_path):
    """It fits on one screen. The exit code is 0 with yellow lines, 1 with a red one."""
    monkeypatch.chdir(tmp_path)
    free(50)
    cli.main(["doctor"])
    text = capsys.readouterr().out
    names = ("Python", "packages", "device", "precision", "4-bit bases", "sandbox", "reward workers", "disk", "Hub")
    assert [name for name in names if name not in text] == []
    assert len(text.splitlines()) <= 24
    free(0.5)
    with pytest.raises(SystemExit, match="No run works until the red lines are fixed"):
        cli.main(["doctor"])
    assert "stop" in capsys.readouterr().out
