"""The files that operators start from: they parse, agree with the code and each other, and give no more than needed.

No container engine and no Kubernetes are needed; what such tools said of these files is in docs/operations.md.
"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from sfumato.runtime.metrics import Metrics
from sfumato.runtime.settings import PartySettings
from sfumato.runtime.telemetry import KINDS, OUTCOMES, REASONS
from sfumato.shell import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
UID = 10001
#: What sfumato cluster init gives the three parties.
PARTIES = {0: ("a.example", 8440), 1: ("b.example", 8441), 2: ("c.example", 8442)}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_every_file_parses() -> None:
    seen = set()
    for path in sorted(DEPLOY.rglob("*")):
        if path.suffix in (".yaml", ".yml"):
            assert isinstance(load(path), dict), path
        elif path.suffix == ".json":
            assert isinstance(json.loads(path.read_text()), dict), path
        elif path.suffix == ".toml":
            tomllib.loads(path.read_text())
        seen.add(path.suffix)
    assert {".yaml", ".json", ".toml", ".service"} <= seen


def test_no_key_certificate_or_secret_lies_here() -> None:
    for path in DEPLOY.rglob("*"):
        assert path.suffix not in (".pem", ".key"), path
        if path.is_file():
            text = path.read_text()
            assert "PRIVATE KEY" not in text, path
            assert not re.search(r"^kind: Secret$", text, re.MULTILINE), path


def test_the_images_are_of_this_release() -> None:
    named = []
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            named += re.findall(r"sfumato:([0-9][\w.]*)", path.read_text())
            named += re.findall(r"newTag: (\S+)", path.read_text())
    assert len(named) > 5
    assert set(named) == {VERSION}


# ---- party.toml -----------------------------------------------------------------------------------------------------


def test_the_example_of_party_toml_shows_the_defaults() -> None:
    text = (DEPLOY / "party.toml").read_text()
    shown, default = PartySettings.parse(text), PartySettings.parse("")
    assert shown.operations_port == 9464
    for name in PartySettings.__slots__:
        if name != "operations_port":
            assert getattr(shown, name) == getattr(default, name), name
    keys = {(table, key) for table, values in tomllib.loads(text).items() for key in values}
    assert len(keys) == len(PartySettings.__slots__)


def test_a_container_keeps_its_models_on_the_volume() -> None:
    settings = PartySettings.parse((DEPLOY / "party.container.toml").read_text(), Path("/etc/sfumato"))
    assert settings.storage_folder == Path("/var/lib/sfumato/store")
    assert settings.storage_key == Path("/etc/sfumato/storage.key")
    assert settings.operations_port == 9464
    inside = (KUBERNETES / "base" / "party.toml").read_text()
    assert inside == (DEPLOY / "party.container.toml").read_text()


# ---- the image ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def test_the_image_is_small_rootless_and_repeatable() -> None:
    found = instructions()
    stages = [i for i, (name, _) in enumerate(found) if name == "FROM"]
    assert len(stages) == 2
    assert ("ARG", "PYTHON_IMAGE=python:3.11-slim") in found
    assert all(found[i][1].startswith("${PYTHON_IMAGE}") for i in stages)
    final = found[stages[1] :]
    assert ("USER", f"{UID}:{UID}") in final
    assert not any("gcc" in text or "apt-get" in text for _, text in final)  # no compiler where it runs
    assert not any(name == "ADD" for name, _ in found)
    assert not any("curl" in text or "://" in text.replace("http://127.0.0.1", "") for _, text in found)
    assert [text for name, text in final if name == "ENTRYPOINT"] == ['["sfumato"]']
    assert json.loads(next(text for name, text in final if name == "CMD")) == [
        "party",
        "--folder",
        "/etc/sfumato",
    ]
    health = next(text for name, text in final if name == "HEALTHCHECK")
    assert "http://127.0.0.1:9464/healthz" in health
    compile(json.loads(health.partition("CMD ")[2])[2], "HEALTHCHECK", "exec")


def test_the_image_installs_torch_first_and_only_pinned_packages() -> None:
    installs = [text for name, text in instructions() if name == "RUN" and "pip install" in text]
    assert len(installs) == 2
    assert "TORCH_INDEX" in installs[0]
    assert "sed -n 's/^torch==/torch==/p' constraints.txt" in installs[0]
    assert "install -c constraints.txt '.[ops,otel]'" in installs[1]
    assert re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for extra in ("ops", "otel"):
        assert {re.split(r"[<>=]", need)[0] for need in extras[extra]} <= pinned


def test_only_what_the_image_is_made_of_enters_the_build() -> None:
    copied = {
        source
        for name, text in instructions()
        if name == "COPY" and not text.startswith("--from")
        for source in text.split()[:-1]
    }
    lines = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)
    assert {"**/*.pem", "**/*.key", "**/*.so"} <= set(rules)


# ---- compose --------------------------------------------------------------------------------------------------------


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("compose.yaml", "compose.try.yaml"):
        for service, what in load(DEPLOY / name)["services"].items():
            yield f"{name}: {service}", what


@pytest.mark.parametrize(
    ("name", "service"), list(services()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_composed_service_has_no_rights(name: str, service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["user"] == f"{UID}:{UID}"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["core"] == 0
    assert "privileged" not in service
    assert "network_mode" not in service
    folder = next(v for v in service["volumes"] if "/etc/sfumato" in str(v))
    assert folder["read_only"] if isinstance(folder, dict) else folder.endswith(":ro")


def test_compose_opens_one_port_to_the_world() -> None:
    party = load(DEPLOY / "compose.yaml")["services"]["party"]
    world = [port for port in party["ports"] if not port.startswith("127.0.0.1:")]
    assert len(world) == 1
    assert "SFUMATO_PORT" in world[0]
    assert [port for port in party["ports"] if port.endswith(":9464")] == [
        "127.0.0.1:${SFUMATO_METRICS_PORT:-9464}:9464"
    ]
    tried = load(DEPLOY / "compose.try.yaml")
    assert tried["networks"]["parties"]["internal"] is True
    assert not any("ports" in service for service in tried["services"].values())


def test_compose_says_what_it_needs() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", text))
    assert needed == {"SFUMATO_FOLDER", "SFUMATO_HOST", "SFUMATO_PORT"}
    for name in needed:
        assert re.search(rf"^# {name} ", text, re.MULTILINE), name


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def patched(index: int) -> dict[str, Any]:
    """The base's resources under the patches of an overlay, by kind."""
    resources = {
        (document := load(KUBERNETES / "base" / name))["kind"]: document
        for name in load(KUBERNETES / "base" / "kustomization.yaml")["resources"]
    }
    for patch in load(KUBERNETES / f"party{index}" / "kustomization.yaml")["patches"]:
        target = resources[patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        for step in yaml.safe_load(patch["patch"]):
            assert step["op"] == "replace"
            *above, last = step["path"].strip("/").split("/")
            place: Any = target
            for key in above:
                place = place[int(key) if isinstance(place, list) else key]
            place[int(last) if isinstance(place, list) else last] = step["value"]
    return resources


@pytest.mark.parametrize("index", PARTIES)
def test_an_overlay_sets_host_and_port_of_its_party(index: int) -> None:
    host, port = PARTIES[index]
    found = patched(index)
    pod = found["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["hostAliases"] == [{"ip": "0.0.0.0", "hostnames": [host]}]
    ports = {p["name"]: p["containerPort"] for p in pod["containers"][0]["ports"]}
    assert ports == {"party": port, "operations": 9464}
    assert [(p["port"], p["targetPort"]) for p in found["Service"]["spec"]["ports"]] == [(port, "party")]
    space = load(KUBERNETES / f"party{index}" / "namespace.yaml")
    overlay = load(KUBERNETES / f"party{index}" / "kustomization.yaml")
    assert overlay["namespace"] == space["metadata"]["name"] == f"sfumato-party{index}"
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_pod_meets_the_restricted_standard() -> None:
    stateful = patched(0)["StatefulSet"]["spec"]
    pod = stateful["template"]["spec"]
    (party,) = pod["containers"]
    assert stateful["replicas"] == 1
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == UID
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert party["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"requests", "limits"} <= party["resources"].keys()
    assert not any(key in pod for key in ("hostNetwork", "hostPID", "hostIPC"))
    assert all("hostPath" not in volume for volume in pod["volumes"])
    mounts = {mount["mountPath"]: mount for mount in party["volumeMounts"]}
    assert mounts["/etc/sfumato"]["readOnly"] is True
    assert {m["name"] for m in mounts.values()} == {v["name"] for v in pod["volumes"]} | {
        claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]
    }


def test_probes_ask_what_is_answered() -> None:
    (party,) = patched(0)["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    paths = {name: party[name]["httpGet"]["path"] for name in party if name.endswith("Probe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert all(party[name]["httpGet"]["port"] == "operations" for name in paths)


def test_the_network_policy_opens_the_partys_port_alone() -> None:
    policy = patched(0)["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    open_to_all = [rule for rule in policy["ingress"] if "from" not in rule]
    assert [rule["ports"] for rule in open_to_all] == [[{"port": "party", "protocol": "TCP"}]]
    outwards = [rule["ports"] for rule in policy["egress"] if "to" not in rule]
    assert outwards == [[{"port": 8440, "endPort": 8442, "protocol": "TCP"}]]
    assert {port for _, port in PARTIES.values()} <= set(range(8440, 8443))


# ---- Prometheus and Grafana -----------------------------------------------------------------------------------------


def alerts() -> list[dict[str, Any]]:
    (group,) = load(DEPLOY / "prometheus" / "alerts.yaml")["groups"]
    return list(group["rules"])


def expressions() -> Iterator[str]:
    for rule in alerts():
        yield rule["expr"]
    for panel in json.loads((DEPLOY / "grafana" / "sfumato-party.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def test_alerts_and_panels_ask_for_numbers_that_a_party_has() -> None:
    shown = set(re.findall(r"^(sfumato_\w+)", Metrics(0).exposition().decode(), re.MULTILINE))
    asked = {name for text in expressions() for name in re.findall(r"sfumato_\w+", text)}
    assert len(asked) > 8
    assert asked <= shown
    words = {
        word
        for text in expressions()
        for pattern in re.findall(r"(?:kind|outcome|reason)[=!]~?\"([^\"]+)\"", text)
        for word in pattern.split("|")
    }
    assert words
    assert words <= KINDS | OUTCOMES | REASONS


def test_every_alert_has_an_answer_in_the_runbook_and_a_test() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    tested = (DEPLOY / "prometheus" / "alerts.test.yaml").read_text()
    for rule in alerts():
        assert f"| `{rule['alert']}` |" in runbook
        assert f"alertname: {rule['alert']}\n" in tested
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")


def test_every_metric_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "operations.md").read_text()
    for name in re.findall(r"^# HELP (sfumato_\w+)", Metrics(0).exposition().decode(), re.MULTILINE):
        assert f"`{name}`" in reference, name
    for word in KINDS | OUTCOMES | REASONS:
        assert f"`{word}`" in reference, word


# ---- systemd --------------------------------------------------------------------------------------------------------


def test_the_unit_has_no_rights_and_leaves_no_trace_of_shares() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / "sfumato-party.service")
    service = unit["Service"]
    assert service["ExecStart"] == "/opt/sfumato/bin/sfumato party --folder /etc/sfumato"
    assert service["User"] == "sfumato"
    assert service["LimitCORE"] == "0"
    assert service["MemorySwapMax"] == "0"
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""
    assert service["StateDirectory"] == "sfumato"


# ---- commands in the documents --------------------------------------------------------------------------------------


def documented() -> Iterator[tuple[str, str]]:
    """(where, command) of every command of ours in the two documents and in the comments of the files."""
    for name in ("runbook.md", "operations.md"):
        text = (ROOT / "docs" / name).read_text()
        for line in text.splitlines():
            found = re.match(r"\s*(sfumato [a-z].*)", line)
            commands = [found[1]] if found else re.findall(r"`(sfumato [a-z][^`]*)`", line)
            for command in commands:
                yield name, command.partition("  #")[0].strip()
    for path in [*DEPLOY.glob("*.yaml"), DEPLOY / "systemd" / "sfumato-party.service"]:
        text = path.read_text().replace(" \\\n#    ", "")
        for line in re.findall(
            r"(?:# +|ExecStart=/opt/sfumato/bin/)(sfumato (?:cluster|party|generate).*)", text
        ):
            yield path.name, line.partition("  #")[0].strip()


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    here: Any = typer.main.get_command(cli.app)
    while words and hasattr(here, "commands"):
        assert words[0] in here.commands, f"there is no command {words[0]}"
        here, words = here.commands[words[0]], words[1:]
    return here, words


def test_every_documented_command_exists_with_its_options() -> None:
    found = list(dict.fromkeys(documented()))
    assert len(found) > 12
    wrong = []
    for where, line in found:
        try:
            command, rest = command_of(shlex.split(line)[1:])
            known = {name for parameter in command.params for name in parameter.opts}
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= known, f"no option {', '.join(sorted(given - known))}"
        except AssertionError as error:
            wrong.append(f"{where}: {line}: {str(error).splitlines()[0]}")
    assert wrong == []
