# A Java program that is a database (H2): its heap and threads follow the pod's limits, and it keeps its data.
PACKAGES="openjdk-17-jre-headless libh2-java"
CONFIG='{"Cmd": ["java", "-cp", "/usr/share/java/h2.jar", "org.h2.tools.Server", "-tcp", "-ifNotExists", "-baseDir", "/data"], "Volumes": {"/data": {}}}'
sql() { inside java -cp /usr/share/java/h2.jar org.h2.tools.Shell -url jdbc:h2:tcp://localhost/people -user sa -sql "$1"; }
steps() {
    pod '.linux.resources = {memory_limit_in_bytes: 1073741824, cpu_quota: 100000, cpu_period: 100000}'
    local flags limits='.linux.resources = {memory_limit_in_bytes: 805306368, cpu_quota: 50000, cpu_period: 100000}'
    container flags "$limits"' | .command = ["java", "-XX:+PrintFlagsFinal", "-version"]'
    ended 0
    flags=$(cri logs "$CTR" 2>/dev/null | awk '$2 == "MaxHeapSize" {print $4}')
    # A quarter of the container's limit, as the JVM chooses it.
    [ "$flags" = 201326592 ] || fail "the heap is $flags, not a quarter of 768 MiB"
    container db "$limits"
    ready java -version
    until cri logs "$CTR" 2>&1 | grep -q 'TCP server running'; do sleep 1; done
    says "(Update count: 2" sql 'create table people(name varchar); insert into people values ('"'ada'"'), ('"'grace'"')'
    says grace sql 'select name from people order by name'
    stops 143
    met "heap of $((flags >> 20)) MiB at a limit of 768 MiB"
}
