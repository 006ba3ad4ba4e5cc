# The roots of hosts, one a Debian suite, and what some have on top: made once.

# Another number here makes everybody's cached roots anew.
recipe=3

# What a host needs, and what only the tests of some features need: systemd, other
# SSH servers, compressors, shells, downloaders.
root_packages="guix openssh-server openssh-client busybox-static iproute2 iptables procps"
more_packages="systemd dropbear-bin avahi-daemon avahi-utils dbus zstd curl bash-completion zsh fish csh tcsh mandoc"

# What a host with $flavours is made from.
make_roots() {
    make_root "$(suite)"
    case $flavours in *nodejs*) make_nodejs ;; esac
}

# Make the root of a suite unless it is there.
make_root() { make_cached "$1" fill_root "the root of $1"; }

# Debian's Node, for hosts of that flavour alone: the others have none.
make_nodejs() {
    make_cached nodejs fill_nodejs "the layer of nodejs"
}

# make_cached NAME FILL WHAT: it gets its name when it is complete, so that an
# interrupted one is never taken for complete.
make_cached() {
    suite=$1
    root=$lab/roots/$suite
    [ "$(cat "$root/.lab" 2>/dev/null)" != $recipe ] || return 0
    [ ! -e "$root" ] || [ -z "$(hosts_up)" ] ||
        fail "$3 is out of date: run 'lab down' first"
    need_programs debootstrap
    source=$(mirror)
    rm -rf --one-file-system "$root.new"
    say "making $3: this takes a minute or two"
    below=
    "$2" "$suite" "$root.new" "$source" >"$lab/roots/$suite.log" 2>&1 || {
        tail -n 5 "$lab/roots/$suite.log" >&2
        fail "failed to make $3 from $source: see $lab/roots/$suite.log"
    }
    echo $recipe >"$root.new/.lab"
    rm -rf --one-file-system "$root"
    mv "$root.new" "$root"
}

fill_root() {
    include=
    case $3 in https:*) include=--include=ca-certificates ;; esac
    # Own namespaces, so that no mount outlives an interruption.
    retry unshare --mount debootstrap --variant=minbase $include "$1" "$2" "$3" || return
    printf '%s\n' 'Acquire::Check-Valid-Until "false";' 'Acquire::Retries "5";' \
        >"$2/etc/apt/apt.conf.d/lab"
    printf '#!/bin/sh\nexit 101\n' >"$2/usr/sbin/policy-rc.d"  # start no services
    chmod +x "$2/usr/sbin/policy-rc.d"
    retry in_root "$2" apt-get update || return
    more=
    [ "$1" != sid ] || more=$more_packages
    retry in_root "$2" apt-get install -y --no-install-recommends $root_packages $more || return
    in_root "$2" sh -eu -s <<'END' || return
apt-get clean
rm -f /etc/ssh/ssh_host_*
: >/etc/resolv.conf

# The packages' own set-up wants systemd, and has no build users in sid.
groupadd --system guixbuild
for n in 01 02 03 04 05 06 07 08 09 10; do
    useradd --system --gid guixbuild --groups guixbuild \
        --home-dir /var/empty --shell /usr/sbin/nologin "guixbuilder$n"
done
mkdir -p /gnu/store /var/guix /var/log/guix /etc/guix /var/empty /run/sshd /offload
chown root:guixbuild /gnu/store
chmod 1775 /gnu/store
chown root:root /var/guix /var/log/guix /etc/guix

# What builders run: work.scm interns it.
mkdir -p /opt/work/busybox/bin
cp "$(command -v busybox)" /opt/work/busybox/bin/busybox
for applet in $(busybox --list); do
    [ "$applet" = busybox ] || ln -sf busybox "/opt/work/busybox/bin/$applet"
done
END
}

# What it adds to the root of sid is a layer upon that.
fill_nodejs() {
    below=$lab/roots/sid
    rm -rf --one-file-system "$2.work"
    mkdir -p "$2/etc" "$2.work" && cp -L /etc/resolv.conf "$2/etc" || return
    set -- "$2" apt-get install -y --no-install-recommends nodejs
    in_root "$@" || { retry in_root "$1" apt-get update && retry in_root "$@"; } || return
    in_root "$1" apt-get clean || return
    rm -rf --one-file-system "$1.work" "$1/var/lib/apt/lists" "$1/etc/resolv.conf"
}

# Run a command in a root that is no host yet: all of it, or what is to lie upon
# the one $below.
in_root() {
    unshare --mount --pid --fork sh -eu -c '
        below=$1 root=$2; shift 2
        [ -z "$below" ] || mount -t overlay lab \
            -o "lowerdir=$below,upperdir=$root,workdir=$root.work" "$root"
        mount -t proc proc "$root/proc"
        exec chroot "$root" /usr/bin/env -i \
            PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive \
            http_proxy="${http_proxy:-}" https_proxy="${https_proxy:-}" \
            "$@"' sh "$below" "$@"
}
