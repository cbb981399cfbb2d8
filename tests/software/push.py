"""Pushes an image of one layer: push.py http://127.0.0.1:PORT REPOSITORY TAR CONFIG"""
import gzip
import json
import pathlib
import sys

from oci import PATH, Registry, digest


def main(url, repository, tar, config):
    raw = pathlib.Path(tar).read_bytes()
    # The quickest: the registry is on the same machine.
    layer = gzip.compress(raw, 1, mtime=0), digest(raw)
    config = {"Env": [PATH], **json.loads(config)}
    print(repository, Registry(url).image(repository, "latest", [layer], config)["digest"])


main(*sys.argv[1:])
