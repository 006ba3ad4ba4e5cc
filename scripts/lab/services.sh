# What runs in a host: sshd and guix-daemon.

await_systemd() {
    inside "$1" sh -eu -s <<'END' ||
for n in $(seq 200); do
    [ ! -S /run/systemd/private ] || break
    sleep 0.05
done
state=$(systemctl is-system-running --wait) || { echo "$state"; systemctl --failed; } >&2
umount -l /proc/sys
[ "$state" = running ]
END
        fail "systemd of '$1' does not start: see above"
}

start_sshd() {
    name=$1
    shift
    inside "$name" sh -eu -s "$(address_of "$name")" "$@" <<'END' ||
printf '%s\n' "ListenAddress $1" 'UsePAM no' >/etc/ssh/sshd_config.d/lab.conf
shift
if [ -e /run/sshd.pid ]; then
    kill "$(cat /run/sshd.pid)"
    while [ -e /run/sshd.pid ]; do sleep 0.02; done
fi
/usr/sbin/sshd -E /var/log/sshd.log "$@"
for n in $(seq 200); do
    [ ! -e /run/sshd.pid ] || exit 0
    sleep 0.05
done
tail -n 5 /var/log/sshd.log >&2
exit 1
END
        fail "sshd of '$name' does not start: is something else on that address, or an option wrong?"
}

# Start HOST's guix-daemon anew: HOST [VAR=VALUE…] [-- OPTION…]
start_daemon() {
    name=$1
    shift
    inside "$name" sh -eu -s "$(flavours_of "$name")" "$@" <<'END' ||
flavours=$1
shift

descendants() {
    for child in $(pgrep -P "$1"); do
        descendants "$child"
        echo "$child"
    done
}

# The daemon has a process for each client, and these must not outlive it.
stop() {
    all="$1 $(descendants "$1")"
    kill -KILL $all 2>/dev/null || :
    for pid in $all; do
        while [ -e "/proc/$pid" ]; do sleep 0.02; done
    done
}

# Whether somebody greets at the socket as a daemon does.
answers() {
    perl -MIO::Socket::UNIX -e '
        alarm 5;
        $socket = IO::Socket::UNIX->new(Peer => "/var/guix/daemon-socket/socket") or exit 1;
        syswrite $socket, pack("Q<", 0x6e697863);
        sysread $socket, $answer, 16;
        exit 1 unless substr($answer, 0, 8) eq pack("Q<", 0x6478696f)'
}

start_process() {
    # Two clients that end at the wrong moment end guix-daemon as well, with
    # "select error: No child processes".  As systemd does, start it again; not
    # where it was killed, and not where it fails to start.
    setsid perl -e '
        do {
            my $start = time;
            defined($child = fork) or exit 1;
            unless ($child) {
                open my $file, ">", "/run/guix-daemon.pid";
                print $file "$$\n";
                close $file;
                exec @ARGV or exit 127;
            }
            waitpid $child, 0;
            $lived = time - $start;
        } while $? == 1 << 8 && $lived > 1' -- \
        $as guix-daemon "$@" \
        </dev/null >>/var/log/guix-daemon.log 2>&1 &
}

# Has systemd start it by its unit, with these options.
start_unit() {
    mkdir -p /run/systemd/system/guix-daemon.service.d
    {
        # Tests may have it started as often as they like.
        printf '%s\n' '[Unit]' StartLimitIntervalSec=0 '[Service]'
        for variable in $variables; do
            value=$(printenv "$variable" | sed 's/["\\]/\\&/g; s/%/%%/g')
            echo "Environment=\"$variable=$value\""
        done
        echo ExecStart=
        echo "ExecStart=/usr/bin/guix-daemon $*"
    } >/run/systemd/system/guix-daemon.service.d/lab.conf
    systemctl daemon-reload
    # As at boot, the store is read-only for all but the daemon.
    systemctl start gnu-store.mount
    systemctl restart guix-daemon
}

[ ! -e /run/guix-daemon.pid ] || stop "$(cat /run/guix-daemon.pid)"
rm -f /var/guix/daemon-socket/socket

as=
case " $flavours " in
    *' unprivileged '*)
        # As its systemd unit does, in mounts of its own.
        as='unshare --mount setpriv --reuid=guix-daemon --regid=guix-daemon --init-groups
            --inh-caps=+chown --ambient-caps=+chown'
        options=--discover=no
        export HOME=/var/empty USER=guix-daemon LOGNAME=guix-daemon LC_ALL=C.UTF-8 ;;
    *' bullseye '*) options=--build-users-group=guixbuild ;;
    *) options='--build-users-group=guixbuild --discover=no' ;;
esac
variables=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    export "$1"
    variables="$variables ${1%%=*}"
    shift
done
[ $# = 0 ] || shift
# No network in the builds, unless a test has substitutes of its own.
case "$*" in
    *--substitute-urls=*) ;;
    *) options="$options --no-substitutes" ;;
esac

case " $flavours " in
    *' systemd '*)
        start_unit $options "$@"
        starter=1 ;;
    *)
        start_process $options "$@"
        starter=$! ;;
esac
for n in $(seq 400); do
    ! answers || exit 0
    kill -0 $starter 2>/dev/null || break
    sleep 0.05
done
tail -n 5 /var/log/guix-daemon.log >&2 || journalctl -n 5 -u guix-daemon >&2
exit 1
END
        fail "guix-daemon of '$name' does not answer: is an option wrong?"
}
