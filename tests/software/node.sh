# A Node.js server that watches files (inotify) and tells of what changed.
PACKAGES="nodejs"
CONFIG='{"Cmd": ["node", "/srv/server.js"], "User": "65534", "StopSignal": "SIGINT"}'
prepare() {
    cat >"$1/srv/server.js" <<'JS'
const fs = require('fs'), http = require('http');
const seen = new Set();
// A directory of its own for each watch, as bundlers and editors have thousands of them.
for (let i = 0; i < 2000; i++) fs.mkdirSync(`/tmp/watched/${i}`, { recursive: true });
for (let i = 0; i < 2000; i++) fs.watch(`/tmp/watched/${i}`, (event, name) => seen.add(`${i}/${name}`));
const server = http.createServer((request, response) => {
  const file = '/data' + request.url;
  if (request.method !== 'PUT') return response.end(request.url === '/seen' ? [...seen].sort().join(' ') : fs.readFileSync(file));
  request.pipe(fs.createWriteStream(file)).on('finish', () => response.end('written'));
});
server.listen(8080, () => fs.writeFileSync('/tmp/ready', ''));
process.on('SIGINT', () => server.close(() => process.exit(0)));
JS
}
# http METHOD PATH [BODY]: what the server answers.
http() {
    # shellcheck disable=SC2016 # expands in the container
    inside bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080; printf "%s %s HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" "$1" "$2" "${#3}" "$3" >&3; cat <&3' - "$1" "$2" "${3:-}"
}
steps() {
    mkdir -m 777 "$DIR/data"
    pod '.linux.resources = {memory_limit_in_bytes: 268435456}'
    container app '.mounts = [{container_path: "/data", host_path: "'"$DIR/data"'"}]'
    ready test -e /tmp/ready
    says written http PUT /note "kept by node"
    says "kept by node" http GET /note
    [ "$(cat "$DIR/data/note")" = "kept by node" ] || fail "the host does not have what was written"
    inside sh -c 'echo x >/tmp/watched/7/a; echo x >/tmp/watched/1999/b'
    says "1999/b 7/a" http GET /seen
    stops 0
    met "2000 directories watched"
}
