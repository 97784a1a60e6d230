#!/usr/bin/env python3
"""A model and checkpoints in a bucket of moto, which is not our own server: the digests are those of a local load, two jobs that
commit the same step give one checkpoint, and boto3 reads what was written.

    python -m venv .s3 && .s3/bin/pip install 'moto[server]' && .s3/bin/python tests/interop/s3.py --binary B --model M

Expects moto 5 with boto3, and a model directory of safetensors.
"""

import argparse
import json
import os
import pathlib
import subprocess

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "weightcast"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = dict(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_REGION="us-east-1",
    )
    try:
        check(arguments, environment)
    finally:
        server.stop()
    print("s3.py: all held")


def check(arguments, environment):
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    for path in arguments.model.iterdir():
        client.upload_file(str(path), BUCKET, f"models/m/{path.name}")

    def start(*flags):
        command = [arguments.binary, *flags]
        return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(*flags):
        process = start(*flags)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
        return json.loads(out) if "--json" in flags else out.decode()

    launch = ["launch", "--nproc-per-node", "2", "--digests", "--json", "--model"]
    local = run(*launch, str(arguments.model))["digests"]
    remote = run(*launch, f"s3://{BUCKET}/models/m")["digests"]
    assert remote == local, "the digests differ"

    root = f"s3://{BUCKET}/run"
    save = [*launch, f"s3://{BUCKET}/models/m", "--checkpoint-dir", root, "--resume", "never", "--save", "--step", "5"]
    jobs = [start(*save), start(*save)]
    ended = [(job.communicate(timeout=300), job.returncode) for job in jobs]
    codes = sorted(code != 0 for _, code in ended)
    assert codes == [False, True], f"expected one of two to commit: {ended}"
    refused = next(error.decode() for (_, error), code in ended if code != 0)
    assert f"step 5 is committed already in {root}" in refused, refused
    run("checkpoint", "verify", "--deep", root)
    resumed = run("launch", "--nproc-per-node", "3", "--resume", "must", "--checkpoint-dir", root, "--digests", "--json")
    assert resumed["digests"] == local, "the digests differ after a resume"

    manifest = json.loads(client.get_object(Bucket=BUCKET, Key="run/step-000000005/manifest.json")["Body"].read())
    for file in manifest["files"]:
        head = client.head_object(Bucket=BUCKET, Key=f"run/step-000000005/{file['name']}")
        assert head["ContentLength"] == file["bytes"], file
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert not uploads, uploads


if __name__ == "__main__":
    main()
