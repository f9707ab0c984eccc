"""The environment: what is taken, what stops the start with a message that names the variable and shows no secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.job import redact
from pipeline.settings import REPOSITORY, BadSetting, Settings, find_weights


def test_settings(tmp_path: Path) -> None:
    assert Settings.from_env({}).storage == "local"
    b2 = {"B2_KEY_ID": "k", "B2_APP_KEY": "a", "B2_BUCKET_NAME": "b"}
    assert Settings.from_env(b2).storage == "b2"
    with pytest.raises(BadSetting, match="BATCH_SIZE"):
        Settings.from_env({"BATCH_SIZE": "many"})
    with pytest.raises(BadSetting, match="B2_APP_KEY"):
        Settings.from_env({"B2_KEY_ID": "k"})
    with pytest.raises(BadSetting, match="MODEL_DIR"):
        Settings.from_env({"RUNPOD_POD_ID": "p", **b2})
    folder = str(tmp_path)
    with pytest.raises(BadSetting, match="B2_KEY_ID"):
        Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": folder})
    on_runpod = Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": folder, **b2})
    assert on_runpod.local_input_root is None
    with pytest.raises(BadSetting, match="DOWNLOAD_ALLOW_HOSTS"):
        Settings.from_env({"DOWNLOAD_ALLOW_HOSTS": "10.0.0.0/99"})


@pytest.mark.parametrize(("name", "value"), [
    ("B2_REALM", "nonsense"), ("B2_REALM", "http://"), ("B2_PUBLIC_URL_BASE", "not a url"),
    ("B2_PUBLIC_URL_BASE", "ftp://cdn"), ("B2_PUBLIC_URL_BASE", "https://c d"), ("B2_PUBLIC_URL_BASE", "http://["),
    ("MODEL_DIR", "/no/such/folder"), ("AI_LABEL", "perhaps"), ("C2PA_CERT", "/no/such/file"), ("QUALITY", "good"),
    ("C2PA_TSA_URL", "stamps"), ("PORT_HEALTH", "70000"), ("PORT", "-1"), ("C2PA_TSA_REQUIRED", "maybe"),
    *[(n.upper(), v) for n, f in Settings.model_fields.items() if f.annotation is float
      for v in ("inf", "nan", "-inf", "1e308")],
    *[(n, v) for n in ("B2_PREFIX", "S3_PREFIX") for v in ("a//b", "a/../b", "./a", "a\nb", "a" * 900)],
    ("S3_ENDPOINT_URL", "https://h/?x=1"), ("S3_ENDPOINT_URL", "minio:9000"),
    ("B2_PUBLIC_URL_BASE", "https://cdn/x?y=1"), ("B2_PUBLIC_URL_BASE", "https://cdn/#x"), ("B2_REALM", "http://h?x"),
    *[(n, v) for n in ("B2_KEY_ID", "B2_APP_KEY", "B2_BUCKET_NAME", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "S3_BUCKET",
                            "S3_REGION", "HOST") for v in ("  ", "a b", "a\n")],
    *[("DOWNLOAD_ALLOW_HOSTS", v) for v in ("http://h", "h:80", "*.h.example", "[::1]", "h/x", "a,10.0.0.0/99", "999.1.1.1",
                                           "a..b", "10.0.0", "a b")],
    *[(n, v) for n in ("LOCAL_INPUT_ROOT", "MODEL_DIR", "C2PA_CERT", "C2PA_KEY") for v in ("/no/such/thing", "x" * 5000)],
    ("HTTP_QUEUE_MAX", "9" * 30), ("MAX_PIXELS", "9" * 30),
])
def test_a_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=f"^{name}=") as e:
        Settings.from_env({name: value})
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 500
    assert "(" in str(e.value), "what the setting is for"


@pytest.mark.parametrize(("name", "value"), [
    ("C2PA_KEY", "canary" * 60), ("C2PA_KEY", "canary"), ("B2_KEY_ID", "canary x"), ("B2_APP_KEY", "canary\n"),
    ("B2_REALM", "https://user:canary@h"), ("B2_REALM", "user:canary@h"), ("B2_PUBLIC_URL_BASE", "https://canary@cdn/x"),
    ("S3_ENDPOINT_URL", "https://user:canary@h"), ("B2_PUBLIC_URL_BASE", "https://cdn/x?canary"), ("C2PA_TSA_URL", "ftp://user:canary@h"),
    ("DATABASE_URL", "mysql://u:canary@h/x"), ("C2PA_TSA_URL", "h/?canary"),
    ("C2PA_CERT", "PRIVATE KEY canary"), ("DOWNLOAD_ALLOW_HOSTS", "http://user:canary@h"), ("MODEL_DIR", "http://u:canary@h"),
    ("LOCAL_INPUT_ROOT", "http://u:canary@h/x"),
])
def test_a_bad_setting_shows_no_secret(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=rf"^{name}=\(hidden\)") as e:
        Settings.from_env({name: value})
    assert "canary" not in str(e.value)


def test_secrets_of_the_settings(tmp_path: Path) -> None:
    """A key with literal line breaks, a key in a file and a time-stamp server's password are cut from every text."""
    body = "MC4CAQAwBQYDK2VwBCIEIJ0123456789"
    pem = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
    (tmp_path / "key.pem").write_text(pem)
    for key in (pem, pem.replace("\n", "\\n"), str(tmp_path / "key.pem")):
        secrets = Settings.from_env({"C2PA_KEY": key, "C2PA_CERT": "-----BEGIN CERTIFICATE-----", "B2_KEY_ID": "key-id-0123",
                                     "B2_APP_KEY": "app-key-0123", "B2_BUCKET_NAME": "bucket",
                                     "C2PA_TSA_URL": "http://user:tsa-pass@h/x?token=0123456789ab"}).secrets()
        with redact.job():
            redact.hide_in_job(*(s for s in secrets if s))
            shown = redact.text(f"{body} key-id-0123 app-key-0123 tsa-pass 0123456789ab rest")
        assert set(shown.split()) == {"***", "rest"}, shown


def test_allowed_hosts_in_every_spelling_match() -> None:
    said = Settings.from_env({"DOWNLOAD_ALLOW_HOSTS": "NAS.example., 10.0.0.5/8, 127.0.0.1,::1,m\u00fcnchen.example"})
    assert said.download_allow_hosts == ("nas.example", "10.0.0.0/8", "127.0.0.1/32", "::1/128", "m\u00fcnchen.example")


@pytest.mark.parametrize("door", ["handler.py", "pipeline/server.py"])
def test_no_door_opens_where_results_cannot_be_stored(door: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = ["-m", "pipeline.server"] if door == "pipeline/server.py" else ["handler.py"]
    done = subprocess.run([sys.executable, *module], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env={
        "PATH": os.environ["PATH"], "STORAGE": "local", "LOCAL_STORAGE_DIR": str(tmp_path / "file" / "out"), "PORT": "0",
        "CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"musetalk-worker: LOCAL_STORAGE_DIR='{tmp_path}/file/out': ")
    assert "Traceback" not in done.stderr


def test_new_settings(tmp_path: Path) -> None:
    default = Settings.from_env({})
    assert (default.ai_label, default.quality, default.c2pa_tsa_required, default.port_health) == ("on", "exact", True, None)
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----\n"
    (tmp_path / "chain.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    said = Settings.from_env({"AI_LABEL": "off", "C2PA_KEY": pem, "C2PA_CERT": str(tmp_path / "chain.pem"), "QUALITY": "fast",
                              "C2PA_TSA_REQUIRED": "false", "PORT_HEALTH": "8001", "B2_REALM": "http://127.0.0.1:9"})
    assert (said.ai_label, said.quality, said.c2pa_tsa_required, said.port_health) == ("off", "fast", False, 8001)
    assert pem in said.secrets()
    with pytest.raises(BadSetting, match="C2PA_CERT and C2PA_KEY"):
        Settings.from_env({"C2PA_CERT": str(tmp_path / "chain.pem")})
    with pytest.raises(BadSetting) as e:
        Settings.from_env({"C2PA_KEY": "secret-words"})
    assert "secret-words" not in str(e.value)


def test_a_machine_without_a_temporary_folder_is_told_in_a_line() -> None:
    code = """import tempfile
tempfile._candidate_tempdir_list = lambda: ["/proc/nothing"]
from pipeline.settings import Settings
Settings.from_env({'CACHE_DIR': '/data'})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("pipeline.settings.BadSetting: No usable temporary directory found in ")
    assert "TMPDIR" in done.stderr


def test_weights_on_a_volume_are_found(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="huggingface-cache"):
        find_weights(tmp_path)
    cached = tmp_path / "huggingface-cache" / "hub" / "models--org--musetalk"
    snapshot = cached / "snapshots" / "0123abcd"
    for name in ("whisper", "musetalkV15"):
        (snapshot / name).mkdir(parents=True)
    assert find_weights(tmp_path) == snapshot
    assert Settings.from_env({"MODEL_DIR": str(cached)}).model_dir == snapshot, "a repository means its snapshot"
    for name in ("whisper", "musetalkV15"):
        (tmp_path / "musetalk" / "v15" / name).mkdir(parents=True)
    assert find_weights(tmp_path) == tmp_path / "musetalk" / "v15", "a folder of one's own comes first"
