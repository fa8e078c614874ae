"""A real S3 server on the loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


class Server:
    """moto's S3 server, a process of its own, and a user whose keys it can be told to ask for.

    Args:
        log: a file for the lines that the server prints, one for each request.
    """

    def __init__(self, log: Path = Path(os.devnull)) -> None:
        import boto3

        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with log.open("ab") as lines:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=lines)
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                break
            assert self._process.poll() is None
            time.sleep(0.1)
        known: dict[str, Any] = {"endpoint_url": f"http://127.0.0.1:{self.port}", "region_name": "us-east-1"}
        known |= {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing"}
        iam = boto3.client("iam", **known)
        self.client = boto3.client("s3", **known)
        self.client.create_bucket(Bucket="lab")
        allowed = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
        iam.create_user(UserName="avss")
        iam.put_user_policy(UserName="avss", PolicyName="s3", PolicyDocument=json.dumps(allowed))
        key = iam.create_access_key(UserName="avss")["AccessKey"]
        self.key = key["AccessKeyId"]
        self.secret = key["SecretAccessKey"]

    @contextmanager
    def asking_for_keys(self) -> Iterator[None]:
        """Whoever has not the user's keys is refused; else nobody is asked."""
        self._reset("0")
        yield
        self._reset("inf")

    def _reset(self, unasked: str) -> None:
        url = f"http://127.0.0.1:{self.port}/moto-api/reset-auth"
        plain = {"Content-Type": "text/plain"}
        urlopen(Request(url, data=unasked.encode(), headers=plain, method="POST")).read()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def uri(self, folder: str, *, bucket: str = "lab", user: str = "", port: int | None = None) -> str:
        return (
            f"s3://{user}{bucket}/{folder}?scheme=http&endpoint_override=127.0.0.1:{port or self.port}&region=us-east-1"
        )

    def paths(self, folder: str) -> list[str]:
        """The objects of a folder, by their paths below it."""
        listed = self.client.list_objects_v2(Bucket="lab", Prefix=f"{folder}/").get("Contents", [])
        return [o["Key"].removeprefix(f"{folder}/") for o in listed if not o["Key"].endswith("/")]

    def objects(self, folder: str) -> dict[str, bytes]:
        """What is in them."""
        key = f"{folder}/{{}}".format
        return {p: self.client.get_object(Bucket="lab", Key=key(p))["Body"].read() for p in self.paths(folder)}
