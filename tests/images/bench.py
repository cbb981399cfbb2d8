"""The images of the storage benchmark and of tests with containerd, made from a Debian package and of nothing else.

    bench.py http://127.0.0.1:PORT TREE PROGRAMS

TREE is as for images.py; PROGRAMS holds the static program `pause` (critest.c).

    bench/many    busybox, and 10 000 files of 1 to 16 KiB in ten layers, 100 to a directory: /many/L/D/F
    bench/large   busybox, and in one layer /large/0 of 160 MiB, /large/1 and /large/2 of 40 MiB
    bench/shared  busybox, and /shared of 40 MiB
    bench/busybox busybox alone
    bench/pause   what containerd runs in a sandbox of its own
"""
import pathlib
import random
import sys

from oci import PATH, Layer, Registry, userland

LAYERS, DIRECTORIES, FILES = 10, 10, 100
LARGE = (160, 40, 40)
SHARED = 40


class Contents:
    """Bytes that gzip shrinks to about two fifths, as it does to what images hold."""

    def __init__(self):
        self.random = random.Random(1)
        self.words = [self.random.randbytes(self.random.randint(3, 13)) for _ in range(1024)]

    def bytes(self, size):
        # The mean word has 8.
        data = b"".join(self.random.choices(self.words, k=size // 6))
        return data[:size]


def main(url, tree, programs):
    tree, programs, registry = pathlib.Path(tree), pathlib.Path(programs), Registry(url)
    contents, base = Contents(), userland(tree).done()

    def image(name, layers, config):
        print(f"{name}:latest {registry.image(name, 'latest', layers, config)['digest']}")

    many = []
    for number in range(LAYERS):
        layer = Layer()
        for directory in range(DIRECTORIES):
            for file in range(FILES):
                size = contents.random.randint(1 << 10, 16 << 10)
                layer.file(f"many/{number}/{directory}/{file}", contents.bytes(size))
        many.append(layer.done())
    image("bench/many", [base, *many], {"Env": [PATH], "Cmd": ["sh"]})

    large = Layer()
    for number, mib in enumerate(LARGE):
        large.file(f"large/{number}", contents.bytes(mib << 20))
    image("bench/large", [base, large.done()], {"Env": [PATH], "Cmd": ["sh"]})

    shared = Layer().file("shared", contents.bytes(SHARED << 20))
    image("bench/shared", [base, shared.done()], {"Env": [PATH], "Cmd": ["sh"]})

    image("bench/busybox", [base], {"Env": [PATH], "Cmd": ["sh"]})
    pause = Layer().file("pause", (programs / "pause").read_bytes(), 0o755).done()
    image("bench/pause", [pause], {"Env": [PATH], "Entrypoint": ["/pause"], "User": "65535:65535"})


main(*sys.argv[1:])
