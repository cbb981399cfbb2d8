"""Stand-ins for the images that critest names, made from Debian packages.

    critest.py http://127.0.0.1:PORT TREE PROGRAMS

TREE is as for images.py; PROGRAMS holds the static programs `pause` and `euid` (critest.c).
A registry that serves them is to be the mirror of registry.k8s.io, gcr.io and k8s.gcr.io. What each
has to do is in critest's own sources (pkg/validate); the names and tags are critest's. One image
is pulled by a fixed digest there, which no stand-in can have: that spec fails.
"""
import pathlib
import sys

from oci import DOCKER, GROUP, OCI, PASSWD, PATH, Layer, Registry, userland

E2E, STAGING = "e2e-test-images/", "k8s-staging-cri-tools/"

# Debian's busybox lacks both.
PGREP = """\
#!/bin/sh
# pgrep NAME: pids of the processes whose name contains NAME.
found=1
for stat in /proc/[0-9]*/comm; do
    read -r comm 2>/dev/null <"$stat" || continue
    case $comm in *"$1"*) pid=${stat%/comm}; echo "${pid#/proc/}"; found=0 ;; esac
done
exit $found
"""
IPCS = "#!/bin/sh\nexec cat /proc/sysvipc/shm\n"

# critest finds the server by its process's name and its argument "master process".
SERVER = """\
#!/bin/sh
mkdir -p /var/run
echo $$ >/var/run/{name}.pid
echo "{name} serves port {port}"
httpd -f -p {port} -h /srv/www &
trap "kill $!; exit 0" TERM INT QUIT WINCH
while kill -0 $!; do wait $!; done
"""


def server(name, port):
    layer = Layer().file("usr/sbin/" + name, SERVER.format(name=name, port=port), 0o755)
    return layer.file("srv/www/index.html", f"<h1>{name}</h1>\n").done()


def main(url, tree, programs):
    tree, programs, registry = pathlib.Path(tree), pathlib.Path(programs), Registry(url)
    layer = userland(tree).dir("var/run").dir("var/www")
    base = layer.file("usr/bin/pgrep", PGREP, 0o755).file("usr/bin/ipcs", IPCS, 0o755).done()
    shell = {"Env": [PATH], "Cmd": ["sh"]}

    def image(name, layers, config, kinds=OCI, tags=("latest",)):
        for tag in tags:
            print(f"{name}:{tag} {registry.image(name, tag, layers, config, kinds)['digest']}")

    def marked(name, config=shell, **options):
        """An image that differs from others by a file of its name."""
        image(STAGING + name, [base, Layer().file(name, "").done()], config, **options)

    def serving(name, daemon, port, kinds=DOCKER, **options):
        config = {"Env": [PATH], "Cmd": ["/usr/sbin/" + daemon, "master process"], "ExposedPorts": {f"{port}/tcp": {}}}
        image(name, [base, server(daemon, port)], config, kinds, **options)

    image(E2E + "busybox", [base], shell, DOCKER, tags=("1.29-2", "latest"))
    serving(E2E + "nginx", "nginx", 80, tags=("1.14-2",))
    serving(E2E + "httpd", "httpd-foreground", 80, tags=("2.4.39-4",))
    serving(STAGING + "hostnet-nginx-amd64", "nginx", 12003, OCI)
    # Set-uid root: with no_new_privs it must not become root.
    euid = Layer().file("euid", (programs / "euid").read_bytes(), 0o4755).done()
    image(E2E + "nonewprivs", [base, euid], {"Env": [PATH], "Entrypoint": ["/euid"]}, tags=("1.3",))
    for which in ("1", "2", "3", "latest", "digest"):
        marked("test-image-" + which)
    marked("test-image-tags", tags=("1", "2", "3"))
    for tag in ("test", "all"):
        image(STAGING + "test-image-tag", [base, Layer().file("tag-" + tag, "").done()], shell, tags=(tag,))
    for form, user in (("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"), ("username-group", "www-data:1004")):
        marked("test-image-user-" + form, dict(shell, User=user))
    groups = Layer().file("etc/passwd", PASSWD + "default-user:x:1000:1000::/home:/bin/sh\n")
    groups.file("etc/group", GROUP + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    image(STAGING + "test-image-predefined-group", [base, groups.done()], dict(shell, User="1000"))
    pause = Layer().dir("proc").dir("sys").dir("dev").file("pause", (programs / "pause").read_bytes(), 0o755).done()
    image("pause", [pause], {"Env": [PATH], "Entrypoint": ["/pause"], "User": "65535:65535"}, tags=("3.9",))


main(*sys.argv[1:])
