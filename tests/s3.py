"""A real S3 server for tests, by default on loopback: SeaweedFS, one process in a temporary folder; it checks signatures and honours conditions."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

UP_SECONDS = 300.0
KEY, SECRET, REGION, BUCKET = "synpref-test-key", "synpref-test-secret", "us-east-1", "synpref"


def server_program() -> str | None:
    """Return the server's program, which a wheel brings beside Python's own."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


class S3Server:
    """Up inside the `with` block, gone with all that it holds after. It listens at `host` alone, and asks for the one key of `environment`."""

    def __init__(self, program: str, host: str = "127.0.0.1") -> None:
        self._host = host
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))
        self._ports = _free_ports(8)
        self._log = self._folder / "log"
        keys = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}
        (self._folder / "s3.json").write_text(json.dumps({"identities": [keys]}))
        (self._folder / "data").mkdir()
        names = ("s3.port", "s3.port.grpc", "filer.port", "filer.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        ports = [f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)]
        common = [f"-ip={host}", f"-ip.bind={host}", f"-dir={self._folder / 'data'}", f"-s3.config={self._folder / 's3.json'}", "-s3"]
        self._command = [program, "server", *common, "-master.volumeSizeLimitMB=64", "-volume.max=0", *ports]
        self._process: subprocess.Popen[bytes] | None = None
        once = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20)
        keys_given = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        self._client = get_session().create_client("s3", REGION, endpoint_url=self.url, config=once, **keys_given)
        self._has_bucket = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return self._host, self._ports[0]

    @property
    def url(self) -> str:
        """The endpoint, without a proxy before it."""
        return f"http://{self._host}:{self._ports[0]}"

    def environment(self, endpoint: str) -> dict[str, str]:
        """Return what a process needs to know, by environment variables alone."""
        given = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION}
        return {**given, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}

    def use(self, patch: pytest.MonkeyPatch, endpoint: str) -> None:
        """Point this process, and the processes that it starts, at an endpoint."""
        for name, value in self.environment(endpoint).items():
            patch.setenv(name, value)

    def make_prefix(self) -> str:
        """Return the URL of a prefix that nothing is under."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> "S3Server":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        end = time.monotonic() + UP_SECONDS
        try:
            while not self._is_up():
                assert self._process.poll() is None, f"the S3 server ended: {self._log.read_text()[-2000:]}"
                assert time.monotonic() < end, f"the S3 server did not come up: {self._log.read_text()[-2000:]}"
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_up(self) -> bool:
        try:
            if not self._has_bucket:
                self._client.create_bucket(Bucket=BUCKET)
                self._has_bucket = True
            self._client.put_object(Bucket=BUCKET, Key="up", Body=b"up")
        except (BotoCoreError, ClientError):
            return False
        return True

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
