# A host's life: its process 1 and file system, entering it, its end.

# Start a host's process 1, with the host's file system around it.
create_host() {
    destroy_host "$name"
    directory=$lab/hosts/$name
    address=$(choose_address "$name")
    mkdir -p "$directory/upper" "$directory/work" "$directory/root"
    echo "$flavours" >"$directory/flavours"
    echo "$address" >"$directory/address"
    shared=
    ! has "$name" master || shared=$checkout
    checkout_id >"$directory/checkout"
    setsid unshare --mount --pid --uts --ipc --fork \
        sh "$self" init "$name" "$(suite)" "$shared" "$directory" \
        </dev/null >"$directory/log" 2>&1 9>&- &
    until [ -s "$directory/entered" ]; do
        kill -0 $! 2>/dev/null || {
            cat "$directory/log" >&2
            fail "failed to start '$name'; if the overlay was refused, name another file system's directory in OFFLOAD_LAB"
        }
        sleep 0.02
    done
}

# What becomes process 1 of a host.  It leaves the machine's file system by
# pivot_root: in a mere chroot the kernel would refuse the user namespaces
# that an unprivileged daemon builds in.
init() {
    name=$1 suite=$2 shared=$3 directory=$4
    address=$(address_of "$name")
    # The machine's /proc still, hence the pid out there.
    read -r pid rest </proc/self/stat
    echo "$pid" >"$directory/pid"
    echo "$name" >/proc/sys/kernel/hostname
    cd "$directory"
    writes=.
    if [ -n "$memory" ]; then
        writes=memory
        mkdir -p memory
        mount -t tmpfs -o "size=$memory" memory memory
        mkdir memory/upper memory/work
    fi
    below=../../roots/$suite
    ! has "$name" nodejs || below=../../roots/nodejs:$below
    mount -t overlay lab -o "lowerdir=$below,upperdir=$writes/upper,workdir=$writes/work" root
    mount -t proc proc root/proc
    make_devices root/dev
    if [ -n "$shared" ]; then
        mount --bind "$shared" root/offload
        mount -o remount,bind,ro root/offload
    fi
    set -- sh -c 'while :; do sleep 3600; done' sh
    if has "$name" systemd; then
        prepare_systemd
        # What it is called with is its kernel's command line, too.
        set -- unshare --cgroup env -i container=lab /usr/lib/systemd/systemd \
            --unit=basic.target systemd.mask=timers.target systemd.ssh_auto=no
    fi
    exec 3>entered
    cd root
    mkdir .machine
    pivot_root . .machine
    cd /
    umount -l /.machine
    rmdir /.machine
    # Not before: whoever enters takes over this process's root.
    echo yes >&3
    exec 3>&-
    exec chroot . "$@" "$directory" </dev/null >/var/log/init.log 2>&1
}

# systemd is to find nothing of the machine that it could manage: it has a cgroup
# of its own, and what says how the kernel works is read-only (of /proc/sys, only
# while it starts: where a part of /proc is hidden, no build can mount another).
prepare_systemd() {
    mount --bind root/proc/sys root/proc/sys
    mount -o remount,bind,ro root/proc/sys
    mount -t cgroup2 cgroup2 root/sys
    cgroup=offload-lab-$address
    mkdir -p "root/sys/$cgroup"
    echo "$cgroup" >cgroup
    echo 0 >"root/sys/$cgroup/cgroup.procs"
    umount root/sys
    mount -t sysfs -o ro sysfs root/sys
    mount -t tmpfs -o mode=755 run root/run
    mkdir root/run/sshd
    echo "$name" >root/etc/hostname
    has "$name" unprivileged ||
        cp "$here/guix-daemon.service" root/etc/systemd/system/
}

# The kernel forgets no cgroup by itself.
remove_cgroup() {
    unshare --mount sh -eu -c '
        mount -t cgroup2 cgroup2 "$1"
        [ ! -d "$1/$2" ] || find "$1/$2" -depth -type d -exec rmdir {} +
    ' sh "$directory/root" "$(cat "$directory/cgroup")"
}

# Where groups of processes can be given a share of the processors: by cgroups of
# the first version, or of the second.
find_cpu_groups() {
    for groups in /sys/fs/cgroup/cpu /sys/fs/cgroup/unified /sys/fs/cgroup; do
        [ ! -e $groups/cpu.cfs_quota_us ] && [ ! -e $groups/cgroup.controllers ] || break
    done
    [ ! -e $groups/cgroup.subtree_control ] || echo +cpu >$groups/cgroup.subtree_control
}

# Let all that a host runs, and what that starts, use so much of a processor.
limit_cpu() {
    find_cpu_groups
    find_pid "$1"
    group=$groups/offload-lab-cpu-$(address_of "$1")
    echo "$group" >"$lab/hosts/$1/cpu"
    mkdir -p "$group"
    quota=$((1000 * $2))
    if [ -e "$group/cpu.max" ]; then
        echo "$quota 100000" >"$group/cpu.max"
    else
        echo 100000 >"$group/cpu.cfs_period_us"
        echo "$quota" >"$group/cpu.cfs_quota_us"
    fi
    space=$(readlink "/proc/$pid/ns/pid")
    for process in /proc/[0-9]*; do
        [ "$(readlink "$process/ns/pid" 2>/dev/null)" != "$space" ] ||
            echo "${process#/proc/}" >"$group/cgroup.procs"
    done
}

make_devices() {
    mount -t tmpfs -o mode=755 dev "$1"
    mknod -m 666 "$1/null" c 1 3
    mknod -m 666 "$1/zero" c 1 5
    mknod -m 666 "$1/full" c 1 7
    mknod -m 666 "$1/random" c 1 8
    mknod -m 666 "$1/urandom" c 1 9
    mknod -m 666 "$1/tty" c 5 0
    mkdir "$1/pts" "$1/shm"
    mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts "$1/pts"
    mount -t tmpfs -o mode=1777 shm "$1/shm"
    ln -s pts/ptmx "$1/ptmx"
    ln -s /proc/self/fd "$1/fd"
    ln -s fd/0 "$1/stdin"
    ln -s fd/1 "$1/stdout"
    ln -s fd/2 "$1/stderr"
}

# Nobody may reap what lost its parent, when this runs in a container.
is_dead() { ! grep -q '^State:[[:space:]]*[^Z]' "/proc/$1/status" 2>/dev/null; }

# Killing process 1 kills all others in its pid namespace; the mounts go with
# the last of them.
destroy_host() {
    directory=$lab/hosts/$1
    if find_pid "$1"; then
        kill -KILL "$pid"
        until is_dead "$pid"; do sleep 0.02; done
    fi
    [ ! -e "$directory/cgroup" ] || retry remove_cgroup
    [ ! -e "$directory/cpu" ] || retry rmdir "$(cat "$directory/cpu")"
    rm -rf --one-file-system "$directory"
}

# Become COMMAND in a host.  It is told when this process dies, lest it go on
# alone in there.
enter() {
    find_pid "$1" || fail "host '$1' is not up: run 'lab up $1'"
    shift
    exec nsenter --target "$pid" --mount --pid --uts --ipc --root --wd \
        /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        setpriv --pdeathsig TERM "$@" 9>&-
}

inside() { (enter "$@"); }
