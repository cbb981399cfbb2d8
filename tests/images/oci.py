"""What test images are made of: layers, images, and the registry that they are pushed to."""
import gzip
import hashlib
import io
import json
import pathlib
import re
import subprocess
import tarfile
import urllib.error
import urllib.parse
import urllib.request

OCI = {
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "index": "application/vnd.oci.image.index.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
}
DOCKER = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
EPOCH = "2020-01-01T00:00:00Z"
PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/srv/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = "root:x:0:\ndaemon:x:1:\nwww-data:x:33:\nextra:x:2000:nobody\nnogroup:x:65534:\n"


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layer:
    """A tar made of nothing but arguments."""

    def __init__(self):
        self.raw = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.raw, mode="w", format=tarfile.PAX_FORMAT)
        self.seen = set()

    def add(self, name, kind, data=b"", mode=0o755, uid=0, gid=0, link=""):
        parent = name.rpartition("/")[0]
        if parent and parent not in self.seen:
            self.add(parent, tarfile.DIRTYPE)
        entry = tarfile.TarInfo(name)
        entry.type, entry.size, entry.mode = kind, len(data), mode
        entry.uid, entry.gid, entry.linkname, entry.mtime = uid, gid, link, 1577836800
        self.tar.addfile(entry, io.BytesIO(data))
        self.seen.add(name)
        return self

    def dir(self, name, mode=0o755):
        return self.add(name, tarfile.DIRTYPE, mode=mode)

    def file(self, name, data, mode=0o644, uid=0, gid=0):
        data = data.encode() if isinstance(data, str) else data
        return self.add(name, tarfile.REGTYPE, data, mode, uid, gid)

    def hardlink(self, name, target):
        return self.add(name, tarfile.LNKTYPE, link=target)

    def symlink(self, name, target):
        return self.add(name, tarfile.SYMTYPE, link=target, mode=0o777)

    def done(self):
        """(compressed bytes, diff id)"""
        self.tar.close()
        raw = self.raw.getvalue()
        return gzip.compress(raw, 6, mtime=0), digest(raw)


class Registry:
    def __init__(self, url):
        self.url = url

    def call(self, method, url, data=None, kind="application/octet-stream", accept="*/*"):
        headers = {"Accept": accept, **({"Content-Type": kind} if data is not None else {})}
        return urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method))

    def blob(self, repository, data):
        name = digest(data)
        try:
            self.call("HEAD", f"{self.url}/v2/{repository}/blobs/{name}")
            return name
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        location = self.call("POST", f"{self.url}/v2/{repository}/blobs/uploads/", b"").headers["Location"]
        location = urllib.parse.urljoin(self.url, location)
        self.call("PUT", f"{location}{'&' if '?' in location else '?'}digest={name}", data)
        return name

    def manifest(self, repository, reference, document, kind):
        data = json.dumps(document, separators=(",", ":")).encode()
        self.call("PUT", f"{self.url}/v2/{repository}/manifests/{reference or digest(data)}", data, kind)
        return {"mediaType": kind, "digest": digest(data), "size": len(data)}

    def image(self, repository, reference, layers, config, kinds=OCI, architecture="amd64"):
        """Pushes an image; its descriptor. Without a reference it is known by digest only."""
        document = {
            "architecture": architecture, "os": "linux", "created": EPOCH, "config": config,
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
            "history": [{"created": EPOCH, "created_by": "tests/images"} for _ in layers],
        }
        data = json.dumps(document, separators=(",", ":")).encode()
        descriptor = lambda kind, blob: {"mediaType": kinds[kind], "digest": self.blob(repository, blob), "size": len(blob)}
        return self.manifest(repository, reference, {
            "schemaVersion": 2, "mediaType": kinds["manifest"], "config": descriptor("config", data),
            "layers": [descriptor("layer", blob) for blob, _ in layers],
        }, kinds["manifest"])


def libraries(package, *programs):
    """(path in the image, bytes) of what dynamic programs need, from an unpacked package."""
    found = {path.name: path for path in package.rglob("*.so*") if path.is_file()}
    elf = lambda option, path: subprocess.check_output(["readelf", "-W", option, path], text=True)
    needed = lambda path: re.findall(r"NEEDED.*\[(.+)\]", elf("-d", path))
    loader = re.search(r"interpreter: (\S+)\]", elf("-l", programs[0])).group(1)
    yield loader.lstrip("/"), found[pathlib.Path(loader).name].read_bytes()
    wanted, done = [name for path in programs for name in needed(path)], {pathlib.Path(loader).name}
    while wanted:
        name = wanted.pop()
        if name not in done:
            done.add(name)
            yield "lib/x86_64-linux-gnu/" + name, found[name].read_bytes()
            wanted += needed(found[name])


def program(package):
    return next(path for path in (package / "bin/busybox", package / "usr/bin/busybox") if path.exists())


def userland(tree):
    """A layer with Debian's busybox: its shell executes applets, as a full system's would."""
    binary, layer = program(tree / "busybox"), Layer()
    for name in ("proc", "sys", "dev", "home", "mnt", "usr/bin", "usr/sbin"):
        layer.dir(name)
    layer.dir("root", 0o700).dir("tmp", 0o1777)
    layer.file("bin/busybox", binary.read_bytes(), 0o755)
    # Hard links, so that hiding one applet leaves the others alone.
    for applet in subprocess.check_output([binary, "--list"], text=True).split():
        if applet != "busybox":
            layer.hardlink("bin/" + applet, "bin/busybox")
    for path, data in libraries(tree / "libc6", binary):
        layer.file(path, data, 0o755)
    layer.file("etc/passwd", PASSWD).file("etc/group", GROUP)
    return layer.file("etc/hosts", "").file("etc/resolv.conf", "")
