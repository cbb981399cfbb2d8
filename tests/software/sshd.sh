# OpenSSH in an ordinary pod: a login by key with a terminal, a file by sftp, a forwarded port.
PACKAGES="openssh-server openssh-client"
CONFIG='{"Cmd": ["/usr/sbin/sshd", "-D", "-e"], "StopSignal": "SIGTERM"}'
prepare() {
    mkdir -p "$1/run/sshd"
    chroot "$1" sh -ec 'useradd --create-home --shell /bin/bash dev
        ssh-keygen -q -t ed25519 -N "" -f /root/key
        install -d -m 700 -o dev -g dev /home/dev/.ssh
        install -m 600 -o dev -g dev /root/key.pub /home/dev/.ssh/authorized_keys'
}
steps() {
    pod
    container sshd
    local options=(-i /root/key -o StrictHostKeyChecking=no -o ConnectTimeout=60 -o LogLevel=ERROR)
    ready ssh "${options[@]}" dev@127.0.0.1 true
    says "/dev/pts/" inside ssh -tt "${options[@]}" dev@127.0.0.1 'tty; id -un >file; stty size'
    says dev inside ssh "${options[@]}" dev@127.0.0.1 cat file
    inside sh -c "echo 'put /etc/hostname copy' | sftp -q -b - ${options[*]} dev@127.0.0.1" >/dev/null
    says sshd inside cat /home/dev/copy
    says OpenSSH inside sh -c "ssh ${options[*]} -f -L 2222:127.0.0.1:22 dev@127.0.0.1 sleep 20; ssh-keyscan -p 2222 127.0.0.1"
    # From outside of the pod, as a client would come.
    says SSH-2.0 bash -c "exec 3<>/dev/tcp/$(cri inspectp "$POD" | jq -r .status.network.ip)/22; head -n 1 <&3"
    stops 0
}
