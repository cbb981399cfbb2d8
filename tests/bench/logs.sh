#!/bin/bash
# logs.sh: what output costs the daemon, and others, on this machine: `hull serve` with the VMM and the guest of
# node.sh, whose processes write as fast as they are read.
#
#   rate-short   output of one pod in lines of 40 bytes, MB/s;  rate-long   in lines of 4000
#   cpu-short    what the daemon uses of a processor meanwhile, percent;  cpu-long
#   cost-short   time of a processor for each MB of output, ms;  cost-long
#   start        create and start a container in another pod, until its line is in its log, ms
#
# The last while nobody, one, and FLOODS pods (4) write short lines; medians of ROUNDS (40). Each is a line
#   bench logs-NAME hull=… peer=none ratio=… target=none
# where the ratio of a start is to that with no other pod. HULL is another program to measure than target/hull/hull.
set -euo pipefail
LOAD=log-load PODS="${FLOODS:-4} ${ROUNDS:-40}" exec "$(dirname "$(realpath "$0")")/node.sh"
