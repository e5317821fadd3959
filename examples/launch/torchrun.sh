#!/usr/bin/env bash
# Train on several hosts: the same command on each of them.
#
#   HOSTS=2 HEAD=10.0.0.1 RANKS=8 examples/launch/torchrun.sh --run.dir /shared/run --config my.toml
#
#   HOSTS     number of hosts
#   HEAD      name or address of one of them, the same everywhere; the ranks meet there
#   RANKS     ranks on this host: one a GPU, or one a core
#   PORT      of the meeting point (29500)
#   JOB       a name that this job alone uses (longspan)
#   ADDRESS   of this host, where its name leads to none; HEAD is then an address, too
#   RESTARTS  how often all ranks are started again after one has failed (3)
#   PYTHON    the Python that has longspan (python)
#
# run.dir must be on a file system that all hosts share. After a failure the ranks meet again and go on from the newest
# checkpoint there; the same command, given after everything has stopped, does so too.
set -euo pipefail

: "${HOSTS:?set HOSTS to the number of hosts}"
: "${HEAD:?set HEAD to the name or address of the host where the ranks meet}"
: "${RANKS:?set RANKS to the number of ranks on this host}"

# A store of their own each time the ranks meet. In the one of torchrun, they would find addresses of ranks that have failed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$HOSTS" --nproc-per-node "$RANKS" --max-restarts "${RESTARTS:-3}" \
    ${ADDRESS:+--local-addr "$ADDRESS" --rdzv-conf "is_host=$([ "$ADDRESS" = "$HEAD" ] && echo true || echo false)"} \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-longspan}" \
    -m longspan train --run.go_on True "$@"
