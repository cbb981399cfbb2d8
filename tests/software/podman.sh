# podman in a privileged pod: an image is built in it, and run from there with a network, a port and limits.
# Its storage is an emptyDir, since an overlay needs something else than an overlay below it.
PACKAGES="podman buildah crun netavark aardvark-dns iptables fuse-overlayfs busybox-static"
CONFIG='{"Cmd": ["podman", "system", "service", "--time=0", "unix:///run/podman.sock"], "StopSignal": "SIGTERM"}'
prepare() {
    # There is no systemd and no journal.
    mkdir -p "$1/etc/containers" "$1/srv/app"
    printf '[containers]\nlog_driver = "k8s-file"\n[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nnetwork_backend = "netavark"\nruntime = "crun"\n' \
        >"$1/etc/containers/containers.conf"
    cp "$1/bin/busybox" "$1/srv/app/busybox"
    cat >"$1/srv/app/Containerfile" <<'FILE'
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "sh", "-c", "/bin/busybox --install -s /bin; mkdir -p /www /etc; echo built by $(id -u) >/www/index.html"]
RUN rm /bin/vi && mv /www /srv && echo user:x:7:7::/:/bin/sh >/etc/passwd
USER user
CMD ["httpd", "-f", "-p", "8080", "-h", "/srv"]
FILE
}
steps() {
    local storage=$DIR/pods/podman-uid/volumes/kubernetes.io~empty-dir/storage
    mkdir -p "$storage"
    pod '.linux.security_context = {privileged: true} | .linux.resources = {memory_limit_in_bytes: 805306368}'
    # As podman's own image has it: so podman leaves the cgroup that it divides. Nobody may be in one that is.
    container engine '.linux.security_context = {privileged: true} | .envs = [{key: "container", value: "oci"}] | .mounts = [{container_path: "/var/lib/containers", host_path: "'"$storage"'"}]'
    ready test -S /run/podman.sock
    local engine=(podman --url unix:///run/podman.sock)
    says overlay inside podman info --format '{{.Store.GraphDriverName}} {{index .Store.GraphStatus "Native Overlay Diff"}}'
    inside buildah bud --quiet --tag app /srv/app
    says "built by 0" inside podman run --rm app cat /srv/index.html
    inside "${engine[@]}" run --detach --name web --publish 80:8080 --memory 64m --pids-limit 50 --volume data:/data:U app >/dev/null
    says 67108864 inside "${engine[@]}" exec web cat /sys/fs/cgroup/memory.max
    inside "${engine[@]}" exec web sh -c 'echo kept >/data/file'
    says "built by 0" inside busybox wget -qO - http://127.0.0.1
    says "built by 0" curl -s --max-time 60 "http://$(cri inspectp "$POD" | jq -r .status.network.ip)/"
    inside "${engine[@]}" rm --force --time 5 web >/dev/null
    says kept inside podman run --rm --volume data:/data app cat /data/file
    # Where no volume is: on the container's own root, which is an overlay.
    local fuse=(podman --root /srv/fuse --runroot /run/fuse --storage-driver overlay
        --storage-opt overlay.mount_program=/usr/bin/fuse-overlayfs)
    inside "${fuse[@]}" build --quiet --tag app /srv/app >/dev/null
    says "built by 0" inside "${fuse[@]}" run --rm app cat /srv/index.html
    met "storage: $(inside podman info --format '{{.Store.GraphDriverName}} on {{index .Store.GraphStatus "Backing Filesystem"}}')"
    stops 0
}
