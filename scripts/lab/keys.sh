# Keys of hosts, who trusts whom, and machine files.

make_keys() {
    inside "$1" sh -eu -s "$(flavours_of "$1")" <<'END'
key() { ssh-keygen -q -N '' -C "root@$(hostname)" "$@" </dev/null; }

guix archive --generate-key >/tmp/key.log 2>&1 &
for type in rsa ecdsa ed25519; do
    key -t $type -f /etc/ssh/ssh_host_${type}_key
done
mkdir -p -m 700 /root/.ssh
case " $1 " in
    *' master '*) key -t ed25519 -f /root/.ssh/id_ed25519 ;;
esac
wait $! || { cat /tmp/key.log >&2; exit 1; }
rm /tmp/key.log

case " $1 " in
    *' unprivileged '*)
        # Its hook can't read what is root's.
        ! [ -e /root/.ssh/id_ed25519 ] ||
            cp /root/.ssh/id_ed25519 /etc/guix/offload_key
        chown -R guix-daemon:guix-daemon /gnu/store /var/guix /etc/guix /var/log/guix
        chmod 755 /gnu/store ;;
esac
END
}

private_key() {
    if has "$1" unprivileged; then echo /etc/guix/offload_key
    else echo /root/.ssh/id_ed25519
    fi
}

# Print an ACL of these hosts' keys.
write_acl() (
    echo '(acl'
    for friend in "$@"; do
        echo "(entry $(cat "$(files "$friend")/etc/guix/signing-key.pub") (tag (guix import)))"
    done
    echo ')'
)

# Let masters and build machines trust each other, in every way that
# offloading needs, and all hosts find one another.
introduce() {
    all_masters=$(without_strangers $(masters))
    all_machines=$(without_strangers $(build_machines))
    hosts_file=$(write_hosts)
    for h in $(hosts_up); do
        find_pid "$h"
        etc=/proc/$pid/root/etc
        echo "$hosts_file" >"$etc/hosts"
        if has "$h" stranger; then write_acl >"$etc/guix/acl"
        elif has "$h" master; then write_acl $all_machines >"$etc/guix/acl"
        else
            keys=/proc/$pid/root/root/.ssh/authorized_keys
            write_acl $all_masters >"$etc/guix/acl"
            for m in $all_masters; do
                cat "$(files "$m")/root/.ssh/id_ed25519.pub"
            done >"$keys"
        fi
    done
    for m in $(masters); do
        machines "$m" >"$(files "$m")/etc/guix/machines.scm"
    done
}

write_hosts() {
    echo '127.0.0.1 localhost'
    for other in $(hosts_up); do
        echo "$(address_of "$other") $other"
    done
}

# Print a master's machine file, for these hosts or for all build machines.
# All hosts share the load of this machine, which says nothing of any of them.
machines() {
    master=$1
    shift
    [ $# -gt 0 ] || set -- $(without_strangers $(build_machines))
    key=$(private_key "$master")
    cpu=$(uname -m)
    echo "(list"
    for h in "$@"; do
        is_up "$h" || fail "host '$h' is not up: run 'lab up $h'"
        read -r type host_key comment <"/proc/$pid/root/etc/ssh/ssh_host_ed25519_key.pub"
        cat <<END
 (build-machine
  (name "$h")
  (systems (list "$cpu-linux"))
  (user "root")
  (private-key "$key")
  (host-key "$type $host_key")
  (overload-threshold #f)
  (parallel-builds 2))
END
    done
    echo ")"
}
