"""The images of pull.sh: pull.py http://127.0.0.1:PORT

    pull/large  one layer of 100 MB as it is sent, in three files
    pull/tiny   40 layers of one small file each
    pull/many   40 000 files of 100 bytes to 4 KiB in four layers, 100 to a directory
"""
import pathlib
import random
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "images"))
from oci import PATH, Layer, Registry  # noqa: E402


class Contents:
    """Bytes that gzip shrinks to about two fifths, as it does to what images hold."""

    def __init__(self):
        self.random = random.Random(1)
        self.words = [self.random.randbytes(self.random.randint(3, 13)) for _ in range(1024)]

    def bytes(self, size):
        return b"".join(self.random.choices(self.words, k=size // 6))[:size]


def main(url):
    registry, contents = Registry(url), Contents()

    def image(name, layers):
        registry.image(name, "latest", layers, {"Env": [PATH], "Cmd": ["/app"]})
        print(f"{name}: {len(layers)} layers, {sum(len(data) for data, _ in layers) / 1e6:.1f} MB", file=sys.stderr)

    large = Layer()
    for number in range(3):
        large.file(f"large/{number}", contents.bytes(101 << 20))
    image("pull/large", [large.done()])
    image("pull/tiny", [Layer().file(f"tiny/{number}", contents.bytes(1000)).done() for number in range(40)])
    many = []
    for number in range(4):
        layer = Layer()
        for file in range(10_000):
            size = contents.random.randint(100, 4 << 10)
            layer.file(f"many/{number}/{file // 100}/{file}", contents.bytes(size))
        many.append(layer.done())
    image("pull/many", many)


main(sys.argv[1])
