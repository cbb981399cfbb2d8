# Python with processes of its own: a pool by fork, a server by spawn, semaphores and queues in /dev/shm.
PACKAGES="python3-minimal libpython3-stdlib"
CONFIG='{"Cmd": ["python3", "/srv/app.py"], "User": "65534", "StopSignal": "SIGTERM"}'
prepare() {
    cat >"$1/srv/app.py" <<'PY'
import multiprocessing, os, pathlib, signal

def square(n):
    return n * n, os.getpid()

def child(queue):
    queue.put(sum(range(1000)))

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    with multiprocessing.get_context("fork").Pool(8) as pool:
        results = pool.map(square, range(1000), chunksize=5)
    assert [r for r, _ in results] == [n * n for n in range(1000)]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=120) == 499500
    process.join()
    with multiprocessing.Manager() as manager:
        shared = manager.dict(a=1)
        assert shared["a"] == 1
    pathlib.Path("/data/result").write_text(f"{len({pid for _, pid in results})} processes, {os.cpu_count()} CPUs\n")
    print("ready", flush=True)
    while True:
        signal.pause()
PY
}
steps() {
    mkdir -m 777 "$DIR/data"
    pod '.linux.resources = {memory_limit_in_bytes: 268435456}'
    container app '.mounts = [{container_path: "/data", host_path: "'"$DIR/data"'"}]'
    ready test -s /data/result
    says processes cat "$DIR/data/result"
    stops 3
    met "$(cat "$DIR/data/result")"
}
