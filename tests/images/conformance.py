"""Stand-ins for the images of the Kubernetes node suite, made from Debian packages and an agnhost.

    conformance.py http://127.0.0.1:PORT TREE PROGRAMS WANTED

TREE is as for images.py, with a directory `tools`: curl and util-linux, and all that they need. PROGRAMS holds the
static programs `pause` and `euid` (critest.c) and `agnhost`, and `localhost.crt` and `localhost.key`, which agnhost
serves with. WANTED is what `e2e_node.test --list-images` prints: the names and tags that the suite pulls. What each
has to do is in the suite's sources (test/images); those that a node alone does not need are left out. An image that
is pulled by a fixed digest can have no stand-in.
"""
import json
import pathlib
import sys

from oci import GROUP, OCI, PASSWD, PATH, Layer, Registry, digest, libraries, userland

E2E = "e2e-test-images/"
# Tags that single specs name beside the suite's list.
MORE = {E2E + "busybox": ["1.36.1-1"]}
SHELL = {"Env": [PATH], "Cmd": ["sh"]}
USERS = PASSWD + "user-defined-in-image:x:1000:1000::/home:/bin/sh\n"
GROUPS = GROUP + "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"

SERVER = """\
#!/bin/sh
httpd -f -p 80 -h /usr/share/nginx/html &
trap "kill $!; exit 0" TERM INT QUIT WINCH
while kill -0 $!; do wait $!; done
"""


def tools(tree, *programs):
    """A layer of dynamic programs of packages, and their libraries."""
    layer, found = Layer(), [tree / "tools/usr/bin" / name for name in programs]
    for path, data in libraries(tree / "tools", *found):
        layer.file(path, data, 0o755)
    for path in found:
        layer.file("usr/bin/" + path.name, path.read_bytes(), 0o755)
    return layer


def served(registry, name, tag):
    """The files of agnhost's own registry with this image, under the tag that the suite pulls from there."""
    get = lambda what: registry.call("GET", f"{registry.url}/v2/{name}/{what}", accept=OCI["manifest"]).read()
    place = lambda kind, reference: f"var/registry/{name}/{kind}/sha256/{reference[7:9]}/{reference[7:]}/data"
    manifest, layer = get("manifests/" + tag), Layer()
    document = json.loads(manifest)
    layer.file(f"var/registry/{name}/manifests/testing", digest(manifest) + "\n")
    layer.file(place("manifests", digest(manifest)), manifest)
    for blob in [document["config"], *document["layers"]]:
        layer.file(place("blobs", blob["digest"]), get("blobs/" + blob["digest"]))
    return layer.done()


def main(url, tree, programs, wanted):
    tree, programs, registry = pathlib.Path(tree), pathlib.Path(programs), Registry(url)
    tags = {name: list(more) for name, more in MORE.items()}
    for image in wanted.split():
        name, _, tag = image.partition("/")[2].rpartition(":")
        tags.setdefault(name, []).append(tag)

    def image(name, layers, config):
        for tag in tags.get(name, ()):
            # Each tag is an image of its own, as specs that change from one to the other expect.
            print(f"{name}:{tag} {registry.image(name, tag, layers, dict(config, Labels={'tag': tag}))['digest']}")

    content = lambda name: (programs / name).read_bytes()
    pause = Layer().dir("proc").dir("sys").dir("dev").file("pause", content("pause"), 0o755).done()
    image("pause", [pause], {"Env": [PATH], "Entrypoint": ["/pause"], "User": "65535:65535"})

    base = userland(tree).dir("var/run").dir("var/www").done()
    for name in ("busybox", "perl", "glibc-dns-testing"):
        image(E2E + name, [base], SHELL)
    image(E2E + "ipc-utils", [base, tools(tree, "ipcs", "ipcmk", "ipcrm").done()], SHELL)
    image(E2E + "nonroot", [base], dict(SHELL, User="1234"))
    # Set-uid root: with no_new_privs it must not become root.
    euid = Layer().file("usr/local/bin/nnp", content("euid"), 0o6755).done()
    image(E2E + "nonewprivs", [base, euid], {"Env": [PATH], "Cmd": ["nnp"]})
    nginx = Layer().file("usr/sbin/nginx", SERVER, 0o755)
    nginx.file("usr/share/nginx/html/index.html", "<h1>Welcome to nginx!</h1>\n")
    image(E2E + "nginx", [base, nginx.done()], {"Env": [PATH], "Cmd": ["nginx"]})

    agnhost = tools(tree, "curl").file("agnhost", content("agnhost"), 0o755).symlink("agnhost-2", "agnhost")
    agnhost.dir("uploads").file("etc/passwd", USERS).file("etc/group", GROUPS)
    for name in ("localhost.crt", "localhost.key"):
        agnhost.file(name, content(name))
    layers = [base, agnhost.done(), served(registry, "pause", tags["pause"][0])]
    config = {"Env": [PATH], "Entrypoint": ["/agnhost"], "Cmd": ["pause"]}
    image(E2E + "agnhost", layers, config)
    # Specs read these of a volume that is an image.
    kitten = Layer().file("data.json", '{"image": "kitten.jpg"}\n')
    kitten.file("etc/os-release", 'NAME="Alpine Linux"\n').file("etc/passwd", USERS)
    image(E2E + "kitten", [*layers, kitten.done()], dict(config, Cmd=["test-webserver"]))


main(*sys.argv[1:])
