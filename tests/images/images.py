"""The test images: what is in them, and how they get into a registry.

    images.py http://127.0.0.1:PORT TREE VERSIONS

TREE holds unpacked Debian packages: TREE/busybox with its TREE/libc6, TREE/busybox-static, and in
TREE/network those of demo/network with all that they depend on.
Everything pushed depends on them alone, so the same packages give the same digests.

    demo/busybox    OCI index (arm64 with an empty layer first, then amd64), two gzip layers, dynamic
                    busybox, one hard link per applet; the second layer deletes and replaces files
    demo/static     Docker schema 2, one layer: busybox-static alone, Entrypoint, User 65534
    demo/network    demo/busybox's first layer and, under /usr, iptables of both kinds, nft, ip, ss, ping, socat,
                    inotifywait
    broken/layer    its layer is cut off in mid-gzip; its digests are right
    broken/diffid   its config names another diff id than its layer has
    broken/digest   build.sh flips a bit of its layer in the registry's storage afterwards
"""
import hashlib
import pathlib
import sys

from oci import DOCKER, OCI, PATH, Layer, Registry, digest, libraries, program, userland


def busybox(tree, versions):
    """The two layers of demo/busybox."""
    base = userland(tree).dir("var/log").file("etc/versions", versions)
    base.file("etc/deleted", "layer 2 deletes this\n").file("etc/replaced", "from layer 1\n")
    base.file("opaque/old", "layer 2 hides this\n").file("gone/with/all", "layer 2 deletes the directory\n")
    top = Layer()
    top.file("etc/.wh.deleted", "").file("etc/replaced", "from layer 2\n").file(".wh.gone", "")
    top.file("opaque/.wh..wh..opq", "").file("opaque/new", "from layer 2\n")
    top.file("srv/www/index.html", "<h1>hello from a microVM</h1>\n", uid=33, gid=33)
    top.file("srv/secret", "only www-data reads this\n", 0o400, 33, 33)
    top.symlink("srv/link", "www/index.html").file("srv/a name with blanks", "")
    return [base.done(), top.done()]


def network(package):
    """The tools of those who set up networks in pods, and of those who watch files."""
    # iptables-legacy keeps its lock in /run.
    layer, programs = Layer().dir("run"), []
    for name in ("ip", "ss", "nft", "ping", "socat", "ethtool", "inotifywait", "xtables-legacy-multi", "xtables-nft-multi"):
        found = (package / place / name for place in ("usr/sbin", "usr/bin", "sbin", "bin"))
        path = next(path for path in found if path.is_file())
        programs.append(path)
        layer.file("usr/sbin/" + name, path.read_bytes(), 0o755)
    for family in ("iptables", "ip6tables"):
        for command in ("", "-save", "-restore"):
            layer.symlink(f"usr/sbin/{family}{command}", "xtables-nft-multi")
            layer.symlink(f"usr/sbin/{family}-legacy{command}", "xtables-legacy-multi")
            layer.symlink(f"usr/sbin/{family}-nft{command}", "xtables-nft-multi")
    for path in sorted(package.rglob("xtables/*.so")):
        target = "usr/lib/x86_64-linux-gnu/xtables/" + path.name
        layer.symlink(target, str(path.readlink())) if path.is_symlink() else layer.file(target, path.read_bytes())
    for path, data in libraries(package, *programs):
        layer.file(path, data, 0o755)
    return layer.done()


def main(url, tree, versions):
    tree, registry = pathlib.Path(tree), Registry(url)
    pushed = []

    def show(name, descriptor):
        pushed.append(f"{name} {descriptor['digest']}")

    layers = busybox(tree, pathlib.Path(versions).read_text())
    config = {"Env": [PATH, "GREETING=hello from an OCI image"], "Cmd": ["sh"], "WorkingDir": "/srv",
              "Labels": {"hull.test": "busybox"}, "StopSignal": "SIGTERM"}
    other = registry.image("demo/busybox", None, [Layer().file("wrong-architecture", "").done()], {}, architecture="arm64")
    this = registry.image("demo/busybox", None, layers, config)
    show("demo/busybox:latest", registry.manifest("demo/busybox", "latest", {
        "schemaVersion": 2, "mediaType": OCI["index"], "manifests": [
            dict(other, platform={"architecture": "arm64", "os": "linux", "variant": "v8"}),
            dict(this, platform={"architecture": "amd64", "os": "linux"}),
        ]}, OCI["index"]))

    show("demo/network:latest", registry.image("demo/network", "latest", [layers[0], network(tree / "network")], {
        "Env": [PATH], "Cmd": ["sh"]}))

    static = Layer().file("bin/busybox", program(tree / "busybox-static").read_bytes(), 0o755)
    for name in ("proc", "sys", "dev"):
        static.dir(name)
    show("demo/static:latest", registry.image("demo/static", "latest", [static.done()], {
        "Env": [PATH], "Entrypoint": ["/bin/busybox"], "Cmd": ["echo", "hello from busybox-static"], "User": "65534:65534",
        "StopSignal": "SIGRTMIN+3"}, DOCKER))

    config = {"Env": [PATH], "Cmd": ["/bin/true"]}
    # Noise, because a tar of a few names would fit before the cut.
    noise = b"".join(hashlib.sha256(str(i).encode()).digest() for i in range(2000))
    blob, diff_id = Layer().file("noise", noise).done()
    show("broken/layer:latest", registry.image("broken/layer", "latest", [(blob[:len(blob) // 2], diff_id)], config))
    blob, _ = Layer().file("diffid", noise[::-1]).done()
    show("broken/diffid:latest", registry.image("broken/diffid", "latest", [(blob, digest(b"another"))], config))
    blob, diff_id = Layer().file("digest", noise[1:]).done()
    show("broken/digest:latest", registry.image("broken/digest", "latest", [(blob, diff_id)], config))
    pushed.append(f"flip {digest(blob)}")
    print("\n".join(pushed))


main(*sys.argv[1:])
