#!/bin/sh
# pod.sh: what the pod of the DaemonSet runs: brings the programs onto its node, has node.sh do ACTION there
# (install or remove), and then stays, so that the node is looked at again when the pod is made anew. It needs to be
# privileged and to have the node's process IDs.
set -eu

bundle=/var/lib/hull-installer

rm -rf "/proc/1/root$bundle"
mkdir -p "/proc/1/root$bundle"
cp -a /hull/. "/proc/1/root$bundle"
code=0
nsenter -t 1 -m -u -i -n -p -- /bin/sh "$bundle/node.sh" "${ACTION:-install}" || code=$?
rm -rf "/proc/1/root$bundle"
[ "$code" = 0 ] || exit "$code"
touch /done
trap exit TERM
while :; do sleep 3600 & wait $!; done
