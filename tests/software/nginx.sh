# nginx as its image on Docker Hub is: root with workers of another user, port 80, logs by links to /dev/stdout,
# SIGQUIT to end. Then as nginx-unprivileged: one user, port 80 all the same, a read-only root.
PACKAGES="nginx-light curl"
CONFIG='{"Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}}'
prepare() {
    ln -sf /dev/stdout "$1/var/log/nginx/access.log"
    ln -sf /dev/stderr "$1/var/log/nginx/error.log"
    cat >"$1/etc/nginx/unprivileged.conf" <<'C'
pid /tmp/nginx.pid;
error_log /dev/stderr;
worker_processes 2;
events {}
http {
    access_log /dev/stdout;
    client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
    uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
    server { listen 80; listen [::]:80; root /srv/www; }
}
C
}
steps() {
    local empty=$DIR/pods/$NAME-uid/volumes/kubernetes.io~empty-dir
    pod
    container root
    ready curl -fsS -o /dev/null http://localhost/
    says 'Welcome to nginx' inside curl -fsS http://localhost/
    inside sh -c 'head -c 50000000 /dev/urandom >/var/www/html/large'
    says same inside sh -c 'curl -fsS http://localhost/large | cmp - /var/www/html/large && echo same'
    inside nginx -s reload
    ready curl -fsS -o /dev/null http://localhost/
    stops 0
    says 'GET /large HTTP' cri logs "$CTR"
    met "50 MB served, reloaded, quit"

    mkdir -p "$empty"/{www,tmp}
    chmod 777 "$empty"/{www,tmp}
    container user '.command = ["nginx", "-g", "daemon off;", "-c", "/etc/nginx/unprivileged.conf"]
        | .linux.security_context = {readonly_rootfs: true, run_as_user: {value: 33}, run_as_group: {value: 33},
            capabilities: {drop_capabilities: ["ALL"]}, no_new_privs: true}
        | .mounts = [{container_path: "/srv/www", host_path: "'"$empty/www"'"}, {container_path: "/tmp", host_path: "'"$empty/tmp"'"}]'
    inside sh -c 'echo written >/srv/www/index.html'
    ready curl -fsS -o /dev/null http://127.0.0.1/
    says written inside curl -fsS http://127.0.0.1/
    says written inside curl -fsS 'http://[::1]/'
    says 33 inside sh -c 'stat -c %u /proc/$(cat /tmp/nginx.pid)'
    stops 0
    met "port 80 without any capability, read-only root"
}
